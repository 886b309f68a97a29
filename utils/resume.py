"""Whether a checkpoint, or a run directory, belongs to what was asked for. Reads and compares; loads and writes
nothing."""

import json
from pathlib import Path

from utils import checkpoints, runs
from utils.errors import UserError
from utils.run_config import OPERATIONAL_FLAGS
from utils.run_status import read_json

# Agent settings that shape the parameters, or that pre-training has already baked into them.
PRETRAINED_SETTINGS = (
    'encoder',
    'latent_dim',
    'discount',
    'const_std',
    'clip_flow_goals',
    'value_hidden_dims',
    'actor_hidden_dims',
    'reward_hidden_dims',
    'intention_encoder_hidden_dims',
    'repr_hidden_dims',
    'intention_encoder',
    'value_layer_norm',
    'actor_layer_norm',
    'reward_layer_norm',
    'intention_encoder_layer_norm',
    'tanh_squash',
    'encoder_hidden_dims',
    'transition_hidden_dims',
    'transition_layer_norm',
    'repr_layer_norm',
)
# Run settings that may change between two starts of one run: besides how it is done, how long, and where own data lie,
# of which the content is compared. The agent has a check of its own.
FREE_SETTINGS = OPERATIONAL_FLAGS | {'finetuning_steps', 'dataset', 'preset', 'sources', 'agent', 'agent_name'}
UNKNOWN = '(unknown)'  # What a run says of a setting that the code did not have when it began.


# What a checkpoint says of the pre-training in it, and what a run reads of its own checkpoint besides: names and types.
_OF_PRETRAINING = {
    'phase_step': int, 'offset': int, 'domain': str, 'agent_name': str, 'agent_config': dict, 'normalizer': dict,
    'data': dict, 'seed': int, 'num_seeds': int,
}  # fmt: skip
_OF_OWN_RUN = {'evaluation_due': bool, 'metrics_lines': int, 'partial_metrics': list, 'wall_seconds': (int, float)}


def _plain(value):
    """Through JSON and back, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value))


def read_meta(path, own=False):
    """The metadata of the checkpoint `path`, with all that a start reads of them; own: it is of the run that starts.

    Raises UserError where they cannot be read, or are not what a run writes.
    """
    meta = checkpoints.load_meta(path)
    checkpoints.require_types(path, meta, _OF_PRETRAINING | (_OF_OWN_RUN if own else {}))
    if meta['phase'] not in ('pretraining', 'finetuning'):
        raise checkpoints.damaged(path, f'its metadata have phase={meta["phase"]!r}')
    if not meta['normalizer'].keys() >= {'kind', 'shift', 'scale'}:
        raise checkpoints.damaged(path, 'its metadata have an incomplete normalizer')
    if not all(isinstance(data, dict) and 'fingerprint' in data for data in meta['data'].values()):
        raise checkpoints.damaged(path, 'its metadata have data without a fingerprint')
    if own and not all(isinstance(chunk, dict) for chunk in meta['partial_metrics']):
        raise checkpoints.damaged(path, 'its metadata have something else in partial_metrics')
    return meta


def check_compatible(meta, task, config, path):
    """Raises UserError naming the first field in which the checkpoint differs from the task, agent or seeds asked
    for."""
    if meta['domain'] != task.domain:
        raise UserError(
            f'{path} was pre-trained on {meta["domain"]}, but --env_name={task.name} belongs to {task.domain}: '
            f'give a checkpoint of {task.domain}, or a {meta["domain"]} task'
        )
    if meta['num_seeds'] != config.num_seeds:
        raise UserError(
            f'{path} holds {meta["num_seeds"]} seeds, but --num_seeds={config.num_seeds}: '
            f'use --num_seeds={meta["num_seeds"]}'
        )
    saved, wanted = meta['agent_config'], _plain(config.agent.to_dict())
    if meta['agent_name'] != config.agent_name:
        raise UserError(
            f'{path} was trained with {_agent_flag(meta["agent_name"])}, now it is {config.agent_name}: '
            'use the agent of that run'
        )
    for name in PRETRAINED_SETTINGS:
        if name in saved and name in wanted and saved[name] != wanted[name]:
            raise UserError(
                f'{path} was trained with agent.{name}={saved[name]!r}, now it is {wanted[name]!r}: '
                f'use the settings of that run (its --preset, or --agent.{name}={saved[name]})'
            )
    frame_stack = meta.get('frame_stack', 1)  # Older checkpoints are of state tasks.
    if frame_stack != config.frame_stack:
        raise UserError(
            f'{path} was trained with frame_stack={frame_stack}, now it is {config.frame_stack}: use the same'
        )
    if meta['normalizer']['kind'] != config.obs_norm_type:
        raise UserError(
            f'{path} was trained with obs_norm_type={meta["normalizer"]["kind"]}, '
            f'now it is {config.obs_norm_type}: use the same'
        )


def check_same_run(directory, config):
    """Raises UserError where the run directory's `config.json` differs from `config` in a setting that changes what is
    learned."""
    saved, now = _read_config(directory), config.to_dict()
    if saved.get('agent_name', UNKNOWN) not in (config.agent_name, UNKNOWN):
        raise UserError(
            f'{directory} holds a run with {_agent_flag(saved["agent_name"])}, now it is {config.agent_name}: '
            'use another --run_name, or the same agent'
        )
    if not saved.get('finetuning_steps'):  # Without fine-tuning a run had no use for the length of its schedule.
        now['agent'].pop('schedule_steps', None)
    pairs = [(f'--{k}', saved.get(k, UNKNOWN), v) for k, v in now.items() if k not in FREE_SETTINGS]
    pairs += [(f'--agent.{k}', saved['agent'].get(k, UNKNOWN), v) for k, v in now['agent'].items()]
    for name, before, after in pairs:
        if before == UNKNOWN and after is not None:
            raise UserError(
                f'{directory} holds a run of a version of the code that had no {name}, now it is {after}: use another '
                '--run_name, or that version'
            )
        if before not in (after, UNKNOWN):
            raise UserError(
                f'{directory} holds a run with {name}={before}, now it is {after}: '
                f'use another --run_name, or the same settings'
            )


def _read_config(directory):
    """What `config.json` holds. Raises UserError: missing, or not what a run writes."""
    path = directory / 'config.json'
    try:
        saved = read_json(path)
        if not isinstance(saved.get('agent'), dict):
            raise UserError('expected the settings of a run')
    except UserError as error:
        raise UserError(
            f'{path} cannot be read ({error}): the run cannot be resumed; use another --run_name'
        ) from error
    return saved


def _agent_flag(name):
    """How a command asks for the agent."""
    return f'--agent=agents/{name}.py'


def check_length(meta, config, directory):
    """Raises UserError where the run in `directory` has been trained for longer than `config` asks for."""
    done = meta['phase_step'] if meta['phase'] == 'finetuning' else 0
    if done > config.finetuning_steps:
        raise UserError(
            f'{directory} holds a run with {done} fine-tuning updates, more than --finetuning_steps='
            f'{config.finetuning_steps}: use another --run_name, or at least as many'
        )


def start_info(path, meta, pretraining_steps):
    """What `config.json` and checkpoints say of a run's start: at the checkpoint `path` of another run with metadata
    `meta`, or from scratch (None).

    steps_before: the step at which the counting of this run's own updates starts. pretraining: what was restored; the
    digest tells of its settings, data and length, and is the same for all seeds.
    """
    if path is None:
        return {'origin': 'scratch', 'checkpoint': None, 'steps_before': 0}
    known = [meta['agent_name'], meta['agent_config'], meta['data'], meta['normalizer'], meta['step']]
    return {
        'origin': '--restore_path',
        'checkpoint': str(path),
        'steps_before': max(0, meta['step'] - pretraining_steps),
        'pretraining': {'digest': runs.digest(known), 'seed': meta['seed'], 'step': meta['step']},
    }


def check_start(meta, config, directory):
    """The start of the run in `directory`, from the metadata of its own checkpoint.

    Raises UserError where `--restore_path` now leads to another pre-training. One that has gone on since is the same,
    and where there is none any more, the run has no need of it.
    """
    # Checkpoints did not always hold it.
    started = meta.get('start') or _read_config(directory).get('start')
    if not (isinstance(started, dict) and started.keys() >= {'origin', 'checkpoint'}):
        raise UserError(f'{directory / "config.json"} does not say how the run started: use another --run_name')
    known = started['origin'] == 'scratch' or 'pretraining' in started
    if config.restore_path is None or not known:
        return started
    try:
        path = checkpoints.resolve(Path(config.restore_path), phase='pretraining')
        now = start_info(path, read_meta(path), config.pretraining_steps)
    except UserError:
        return started
    folder = directory / 'checkpoints' if started['checkpoint'] is None else Path(started['checkpoint']).parent
    if path.resolve().parent != folder.resolve() and now['pretraining'] != started.get('pretraining'):
        raise UserError(
            f'{directory} holds a run that started from {started["checkpoint"] or "scratch"}, now it is {path}: '
            'use another --run_name, or the same --restore_path'
        )
    return started


def check_same_data(saved, found, directory):
    """Raises UserError where a data file is not the one that the run in `directory` was started with."""
    for name in sorted(saved.keys() & found.keys()):
        if saved[name]['fingerprint'] != found[name]['fingerprint']:
            raise UserError(
                f'the {name} data are not those that the run in {directory} was started with: '
                f'restore them, or use another --run_name'
            )
