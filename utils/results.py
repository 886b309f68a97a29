"""Collects the runs under a directory into tidy CSV files, and into tables beside the published figures.

    python -m utils.results exp/infom_ogbench [--output=results/mine] [--metrics='evaluation/*,*/flow_loss']

writes into `--output` (by default the directory's own `results/`)

    results.csv   one line for each line of the runs' metrics: run, method, agent, task, seed, step, settings, metrics
    scores.csv    one line for each seed of each run: last three evaluations, best, drop, stability
    tables.md, tables.tex

What counts as a run, and as one method, is decided in `utils/collected_runs.py`; what does not count is named.
"""

import ast
import csv
import fnmatch
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from absl import flags

from utils import cli, tables
from utils.collected_runs import SUITE_SCORES, Collection, Curve, collect, method_title, suite_of
from utils.errors import UserError, expanded
from utils.runs import RESERVED_KEYS, atomic_path, read_metrics, require_writable, write_csv

FLAGS = flags.FLAGS

IDENTITY = ('run', 'method', 'agent', 'env_name', 'domain', 'seed', 'phase', 'step')
SCORES = ('evaluations', 'first', 'final', 'final_three', 'best', 'drop', 'stability')
# Signs of a critic or a flow that diverges, reported beside each score where a run has them.
DIAGNOSTICS = (
    'validation/flow_loss', 'diagnostics/flow_outside', 'training/q_mean', 'validation/q_mean', 'diagnostics/q_outside',
    'training/actor_mse',
)  # fmt: skip


def write_results(collection: Collection, path: Path, patterns: Sequence[str]) -> int:
    """Writes `results.csv` and returns its number of lines. Metrics: those that match one of the patterns."""
    settings = sorted({key for curve in collection.curves for key in curve.settings})
    of_run: dict[str, dict[int, Curve]] = defaultdict(dict)
    for curve in collection.curves:
        of_run[curve.run][curve.seed] = curve
    runs = [run for run in collection.runs if run.name in of_run]
    names = sorted({name for run in runs for last in run.last.values() for name in last} - set(RESERVED_KEYS))
    metrics = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not metrics:
        raise UserError(f'--metrics={",".join(patterns)} matches no metric: there are {", ".join(names)}')

    def rows():  # Run by run: the lines of all runs together may not fit into memory.
        for run in runs:
            for row in read_metrics(run.directory / 'metrics.jsonl'):
                curve = of_run[run.name].get(row['seed'])
                if curve is None or row['step'] > run.end or all(row.get(name) is None for name in metrics):
                    continue
                identity = [run.name, curve.method, curve.agent, curve.env_name, curve.domain]
                chosen = [_cell(curve.settings[key]) if key in curve.settings else '' for key in settings]
                yield [*identity, row['seed'], row['phase'], row['step'], *chosen, *map(row.get, metrics)]

    return write_csv(path, [*IDENTITY, *settings, *metrics], rows())


def write_scores(collection: Collection, path: Path) -> None:
    """Writes `scores.csv`."""
    last = {(run.name, seed): values for run in collection.runs for seed, values in run.last.items()}

    def rows():
        for curve in collection.curves:
            identity = [curve.run, curve.method, curve.agent, curve.env_name, curve.domain, curve.seed, curve.unit]
            diagnostics = [last[curve.run, curve.seed].get(name) for name in DIAGNOSTICS]
            yield [*identity, *(curve.scores[name] for name in SCORES), *diagnostics]

    header = ['run', 'method', 'agent', 'env_name', 'domain', 'seed', 'unit', *SCORES, *DIAGNOSTICS]
    write_csv(path, header, rows())


def read_results(path: Path) -> list[Curve]:
    """The evaluations in a `results.csv`.

    Raises:
        UserError: not readable, not such a file, cut off, or with the name of an unknown task.
    """
    groups: dict[tuple, list[dict]] = defaultdict(list)
    try:
        with open(path, newline='', encoding='utf-8') as file:
            reader = csv.DictReader(_whole_lines(file, path))
            missing = set(IDENTITY) - set(reader.fieldnames or ())
            if missing:
                raise UserError(f'{path} has no column {sorted(missing)[0]}: expected a results.csv of utils.results')
            settings = [name for name in reader.fieldnames if name not in IDENTITY and '/' not in name]
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f'{path} is damaged: line {reader.line_num} has more or fewer cells than the first')
                metric = SUITE_SCORES[suite_of(row['env_name'])][0]
                if row['phase'] == 'finetuning' and row.get(metric):
                    groups[row['run'], int(row['seed'])].append(row)
        return [_curve_of_rows(rows, settings) for rows in groups.values()]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'cannot read {path}: {error}') from error


def _whole_lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of a file. Raises `UserError` where the last one does not end: a number that is cut is another one."""
    for line in file:
        if not line.endswith(('\n', '\r')):
            raise UserError(f'{path} is cut off inside its last line: write it again with utils.results')
        yield line


def _curve_of_rows(rows: list[dict], settings: Sequence[str]) -> Curve:
    first = rows[0]
    metric, _, factor = SUITE_SCORES[suite_of(first['env_name'])]
    steps = np.array([int(row['step']) for row in rows])
    return Curve(
        run=first['run'],
        agent=first['agent'],
        variant=_variant(first['agent'], first['method']),
        env_name=first['env_name'],
        seed=int(first['seed']),
        settings={key: _parse(first[key]) for key in settings if first[key] != ''},
        steps=steps - steps[0],
        values=factor * np.array([float(row[metric]) for row in rows]),
    )


def _variant(agent: str, method: str) -> tuple[str, ...]:
    """`Curve.variant` from a method's name."""
    settings = method.removeprefix(method_title(agent)).strip()
    return tuple(settings.split(', ')) if settings else ()


def _cell(value):
    """A setting as `_parse` reads it back; an empty cell is a setting that the agent does not have."""
    return repr(value) if value in (None, '') else value


def _parse(text: str):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def load_curves(path: Path) -> list[Curve]:
    """The curves of a `results.csv`, or of the runs under a directory. Raises `UserError`: neither, or none in it."""
    if not path.is_file():
        return collect(path).curves
    curves = read_results(path)
    if not curves:
        raise UserError(f'{path} holds no evaluation: write it with --metrics=evaluation/* or without --metrics')
    return curves


def report(collection: Collection, form: str) -> str:
    """All tables in 'markdown' or 'latex', with the notes and what was left out."""
    bodies = [getattr(table, form)() for table in tables.all_tables(collection.curves)]
    remarks = [*collection.notes, *(f'Left out: {run}: {reason}' for run, reason in collection.left_out)]
    if form == 'latex':
        return '\n'.join([*(f'% {remark}' for remark in remarks), *bodies])
    heading = f'# Results of {len({curve.run for curve in collection.curves})} runs, {len(collection.curves)} seeds\n'
    return '\n'.join([heading, *(f'- {remark}' for remark in remarks), '', *bodies])


def main(argv):
    directory = expanded(argv[1])
    collection = collect(directory, FLAGS.finetuning_steps)
    output = expanded(FLAGS.output) if FLAGS.output else directory / 'results'
    require_writable(output)
    lines = write_results(collection, output / 'results.csv', FLAGS.metrics)
    write_scores(collection, output / 'scores.csv')
    for name, form in (('tables.tex', 'latex'), ('tables.md', 'markdown')):
        with atomic_path(output / name) as temporary:
            temporary.write_text(report(collection, form))
    print((output / 'tables.md').read_text())
    for run, reason in collection.left_out:
        print(f'left out: {run}: {reason}', file=sys.stderr)
    print(f'{len(collection.curves)} seeds, {lines} lines: {output}/results.csv, scores.csv, tables.md, tables.tex')


if __name__ == '__main__':
    flags.DEFINE_string('output', None, 'Where the files go (default: results/ in the directory itself).')
    flags.DEFINE_integer(
        'finetuning_steps',
        None,
        'Compare all runs after so many updates, stopped ones too; shorter ones are left out.',
        lower_bound=1,
    )
    flags.DEFINE_list('metrics', ['*'], 'Metrics in results.csv, by name or pattern.')
    cli.run(main, positional=('save_dir',))
