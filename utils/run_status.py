"""Whether a run directory holds a finished run, and why not. Reads JSON files only; a run that is going on is left
alone."""

import json
import os
from pathlib import Path

from utils.errors import UserError
from utils.runs import read_metrics

FINISHED = 'finished'


def run_status(run_directory: str | os.PathLike, finetuning_steps: int | None = None) -> str:
    """`FINISHED`, or what keeps the run from being so, in words: never started, stopped at a step, damaged.

    Finished: `summary.json`, which a run writes at its very end, tells of every step that `config.json` asks for, and
    `metrics.jsonl` has just these.

    finetuning_steps: it is enough that `metrics.jsonl` has so many fine-tuning updates, whatever came after them.
    """
    run_directory = Path(run_directory)
    try:
        config = read_json(run_directory / 'config.json')
        if not (run_directory / 'metrics.jsonl').exists():
            return 'stopped before the first line of metrics'
        rows = read_metrics(run_directory / 'metrics.jsonl')
        reached = max((row['step'] for row in rows), default=0)
        before = run_start(config) + config['pretraining_steps']
        if finetuning_steps is not None and reached >= before + finetuning_steps:
            return FINISHED
        wanted = before + config['finetuning_steps']
        if not (run_directory / 'summary.json').exists():
            return f'not finished: at step {reached} of {wanted}'
        summarised = max(read_json(run_directory / 'summary.json')['steps'].values(), default=0)
    except UserError as error:
        return str(error)
    except (KeyError, TypeError, AttributeError) as error:
        return f'damaged: config.json, metrics.jsonl or summary.json is not what a run writes ({error!r})'
    if not summarised == reached >= wanted:
        return f'not finished: at step {reached} of {max(reached, wanted)}'
    return FINISHED


def run_start(config: dict) -> int:
    """The step that a run starts at: the last one of the pre-training that it fine-tunes, else 0."""
    return config.get('start', {}).get('steps_before', 0)


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file. Raises `UserError`: missing, or not a JSON object."""
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f'{path.name} is missing') from error
    except (OSError, ValueError) as error:
        raise UserError(f'{path.name} is damaged: {error}') from error
    if not isinstance(content, dict):
        raise UserError(f'{path.name} is damaged: expected a JSON object')
    return content
