"""Whether a checkpoint, or a run directory, belongs to what was asked for. Reads and compares; loads and writes
nothing."""

import json

from utils.errors import UserError
from utils.run_config import OPERATIONAL_FLAGS

# Agent settings that shape the parameters, or that pre-training has already baked into them.
PRETRAINED_SETTINGS = (
    'agent_name',
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
# Run settings that may change between two starts of one run: besides how it is done, how long.
FREE_SETTINGS = OPERATIONAL_FLAGS | {'finetuning_steps', 'preset', 'sources', 'agent'}


def _plain(value):
    """Through JSON and back, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value))


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
    path = directory / 'config.json'
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f'{path} cannot be read ({error}): the run cannot be resumed; use another --run_name'
        ) from error
    now = config.to_dict()
    pairs = [(f'--{k}', saved.get(k), v) for k, v in now.items() if k not in FREE_SETTINGS]
    pairs += [(f'--agent.{k}', saved.get('agent', {}).get(k), v) for k, v in now['agent'].items()]
    for name, before, after in pairs:
        if before != after:
            raise UserError(
                f'{directory} holds a run with {name}={before}, now it is {after}: '
                f'use another --run_name, or the same settings'
            )


def check_same_data(saved, found, directory):
    """Raises UserError where a data file is not the one that the run in `directory` was started with."""
    for name in sorted(saved.keys() & found.keys()):
        if saved[name]['fingerprint'] != found[name]['fingerprint']:
            raise UserError(
                f'the {name} data are not those that the run in {directory} was started with: '
                f'restore them, or use another --run_name'
            )
