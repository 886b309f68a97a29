"""`RunConfig`: every value that one run was asked for, its origin, and the range it must lie in.

Each flag is a field here and nowhere else. How the command line and the presets fill them is `utils/flags.py`; how step
counts and intervals go together, `utils/intervals.py`; what an agent's settings mean, `agents/`.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from utils import presets
from utils.errors import UserError, expanded

DEFAULT, COMMAND_LINE = 'default', 'command line'  # Two of the origins in `RunConfig.sources`.
# Flags that decide where and how a run is done, or what is shown of it, never what is learned: such runs are the same.
OPERATIONAL_FLAGS = frozenset(
    {
        'save_dir', 'run_group', 'run_name', 'restore_path', 'dataset_dir', 'dataset_location', 'chunk_size',
        'save_interval', 'keep_interval', 'eval_workers', 'eval_async', 'video_episodes', 'video_frame_skip',
        'wandb_mode', 'nan_policy', 'compilation_cache', 'profile', 'mesh_seeds', 'mesh_batch', 'distributed',
        'coordinator_address', 'num_processes', 'process_id',
    }
)  # fmt: skip
MAX_SEED = 2**31 - 1


def _flag(default, help_text: str, *, minimum=None, choices=None, preset=False):
    """A field that is a flag. `preset`: left open here and filled in by the preset."""
    metadata = {'help': help_text, 'minimum': minimum, 'choices': choices, 'preset': preset}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run: the resolved value of every flag, the agent's settings, and where each came from.

    `chunk_size` may still be 0 (automatic) until `flags.set_up_jax` has seen the device. `sources` maps a flag's name,
    or 'agent.<key>', to the origin of its value.
    """

    agent: FrozenConfigDict
    agent_name: str
    sources: dict[str, str]

    env_name: str = _flag(None, 'The task; envs.TASKS lists them. With --dataset: a gymnasium environment, or none.')
    dataset: str = _flag(None, 'Your own data, an npz or HDF5 file or minari:<id>, in place of the task’s.')
    preset: str = _flag('paper', 'What fills in the values left open.', choices=tuple(presets.PRESETS))
    seed: int = _flag(0, 'First random seed.', minimum=0)
    num_seeds: int = _flag(1, 'Seeds trained side by side: seed, seed + 1, …', minimum=1)

    pretraining_steps: int = _flag(None, 'Reward-free updates; 0 skips the phase.', minimum=0, preset=True)
    finetuning_steps: int = _flag(None, 'Updates on labelled data; 0 skips the phase.', minimum=0, preset=True)
    pretraining_size: int = _flag(None, 'Reward-free transitions used, at most.', minimum=1, preset=True)
    finetuning_size: int = _flag(None, 'Labelled transitions used, at most.', minimum=1, preset=True)
    log_interval: int = _flag(None, 'Updates from one line of metrics to the next.', minimum=1, preset=True)
    eval_interval: int = _flag(None, 'Fine-tuning updates from one evaluation to the next.', minimum=1, preset=True)
    save_interval: int = _flag(None, 'Updates from one checkpoint to the next.', minimum=1, preset=True)
    keep_interval: int = _flag(
        0, 'Updates of a phase from one checkpoint that stays to the next; 0: the ends of the phases stay.', minimum=0
    )
    chunk_size: int = _flag(0, 'Updates compiled into one device call; 0 chooses.', minimum=0)

    eval_episodes: int = _flag(None, 'Episodes per seed and evaluation; 0 never evaluates.', minimum=0, preset=True)
    eval_workers: int = _flag(0, 'Processes that step environments; 0 takes one for each core.', minimum=0)
    eval_async: bool = _flag(False, 'Go on training while an evaluation runs; the results are the same.')
    video_episodes: int = _flag(0, 'Episodes recorded as mp4 at each evaluation.', minimum=0)
    video_frame_skip: int = _flag(3, 'Steps from one frame of a video to the next.', minimum=1)

    dataset_dir: str = _flag('~/.ogbench/data', 'Where data sets are.')
    dataset_location: str = _flag('auto', 'Where batches are sampled from.', choices=('auto', 'device', 'host'))
    obs_norm_type: str = _flag(
        None, 'Normalisation of state observations.', choices=('none', 'normal', 'bounded'), preset=True
    )
    obs_norm_per_split: bool = _flag(
        None, 'A normaliser for every file, as published, instead of one for all.', preset=True
    )
    next_actions_across_episodes: bool = _flag(
        None, 'Take the next row’s action even where another episode begins, as published.', preset=True
    )
    p_aug: float = _flag(None, 'Probability of a random crop for a batch of images.', preset=True)
    frame_stack: int = _flag(None, 'Images stacked into one observation.', minimum=1, preset=True)

    mesh_seeds: int = _flag(0, 'Devices that the seeds are spread over; 0 chooses.', minimum=0)
    mesh_batch: int = _flag(0, 'Devices that share each batch; 0 chooses.', minimum=0)
    distributed: bool = _flag(False, 'This is one of several processes that train one run.')
    coordinator_address: str = _flag(None, 'Host:port of process 0, where SLURM, MPI or a TPU pod do not say it.')
    num_processes: int = _flag(0, 'Processes of the run; 0 asks SLURM, MPI or the TPU pod.', minimum=0)
    process_id: int = _flag(-1, 'Number of this process, from 0; -1 asks SLURM, MPI or the TPU pod.', minimum=-1)

    save_dir: str = _flag('exp', 'Runs are written to <save_dir>/<run_group>/<run_name>.')
    run_group: str = _flag(None, 'Folder of related runs; by default the name of the preset.')
    run_name: str = _flag(
        None, 'By default <env_name>_<agent>_sd<seed>[_<phase>], so that the same command resumes its run.'
    )
    restore_path: str = _flag(None, 'A run, or one of its checkpoints, to start from.')
    wandb_mode: str = _flag('disabled', 'Copy metrics to Weights & Biases.', choices=('online', 'offline', 'disabled'))
    nan_policy: str = _flag('stop', 'What a NaN or infinite loss does.', choices=('stop', 'warn'))

    compilation_cache: bool = _flag(True, 'Keep compiled programs in ~/.cache/infom (or XDG_CACHE_HOME).')
    precision: str = _flag(
        'tensorfloat32',
        'Matrix products on an accelerator; a CPU always computes in float32.',
        choices=('highest', 'tensorfloat32', 'bfloat16'),
    )
    profile: int = _flag(0, 'Updates of each phase to profile, into <run>/profile; 0 for none.', minimum=0)
    xla_flags: str = _flag('', 'Options for XLA, appended to XLA_FLAGS of the environment.')

    @property
    def run_dir(self) -> Path:
        return expanded(self.save_dir) / self.run_group / self.run_name

    @property
    def block(self) -> int:
        return block_size(self.agent, self.finetuning_steps)

    def to_dict(self) -> dict[str, Any]:
        """Every value and its source, as JSON knows them (tuples become lists)."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.loads(json.dumps(values | {'agent': self.agent.to_dict()}))

    def describe(self) -> str:
        """The first lines of a run's log: what came from where, one line for each origin other than the defaults."""
        groups: dict[str, list[str]] = {}
        for name, value in self._items().items():
            if self.sources[name] != DEFAULT:
                groups.setdefault(self.sources[name], []).append(f'{name}={value}')
        return '\n'.join(f'{source}: {", ".join(items)}' for source, items in groups.items())

    def table(self) -> str:
        """Every value with its origin, one line each."""
        items = {name: str(value) for name, value in self._items().items()}
        name_width, value_width = (max(map(len, column)) for column in (items, items.values()))
        return '\n'.join(
            f'{name:{name_width}}  {value:{value_width}}  {self.sources[name]}' for name, value in items.items()
        )

    def _items(self) -> dict[str, Any]:
        """Flags and 'agent.<key>' with their values, in the order in which they are shown."""
        values = {name: getattr(self, name) for name in flag_fields()}
        return values | {f'agent.{key}': value for key, value in self.agent.items()}


def flag_fields() -> dict[str, dataclasses.Field]:
    """The fields of `RunConfig` that are flags, by name."""
    return {field.name: field for field in dataclasses.fields(RunConfig) if 'help' in field.metadata}


def block_size(agent: ConfigDict, finetuning_steps: int) -> int:
    """Updates that cannot be parted: fine-tuning runs in blocks of `actor_freq`, the last of which trains the actor."""
    return agent.get('actor_freq', 1) if finetuning_steps else 1


def check_flags(values: dict[str, Any], task) -> None:
    """Raises UserError for a flag out of its range, alone or for this task (`envs.TaskSpec`)."""
    for name, field in flag_fields().items():
        minimum = field.metadata['minimum']
        if minimum is not None and values[name] < minimum:
            expected = 'a positive number' if minimum == 1 else f'{minimum} or more'
            raise UserError(f'--{name}={values[name]}: expected {expected}')
    if values['seed'] + values['num_seeds'] - 1 > MAX_SEED:
        raise UserError(f'--seed={values["seed"]} --num_seeds={values["num_seeds"]}: seeds go up to {MAX_SEED}')
    if not 0 <= values['p_aug'] <= 1:
        raise UserError(f'--p_aug={values["p_aug"]}: expected a probability, from 0 to 1')
    if task.visual and values['obs_norm_type'] != 'none':
        raise UserError(f'--obs_norm_type={values["obs_norm_type"]}: images are not normalised; leave it out')
    if not task.visual and (values['p_aug'] > 0 or values['frame_stack'] > 1):
        raise UserError(
            f'--p_aug={values["p_aug"]} --frame_stack={values["frame_stack"]}: these are for image tasks, and '
            f'{task.name} has state observations; leave them out'
        )
    for name in ('run_group', 'run_name'):
        if values[name] is not None and not re.fullmatch(r'[\w+=@,][\w+=@,.-]*', values[name]):
            raise UserError(f'--{name}={values[name]!r}: expected the name of a folder (letters, digits, _+=@,.-)')
    for name in ('save_dir', 'dataset_dir', 'dataset', 'restore_path'):
        if values[name] == '':
            raise UserError(f'--{name} is empty: give a path or leave it out')
    if not (values['pretraining_steps'] or values['finetuning_steps'] or values['restore_path']):
        raise UserError('nothing to do: every phase has 0 steps; raise --pretraining_steps or --finetuning_steps')


# Settings that agents share by name. What only one agent has, its module's `validate_config` checks.
_AGENT_RANGES = (
    ('discount', lambda x: 0 < x < 1, 'a number between 0 and 1'),
    ('tau', lambda x: 0 < x <= 1, 'a number above 0, at most 1'),
    ('actor_tau', lambda x: 0 < x <= 1, 'a number above 0, at most 1'),
    ('expectile', lambda x: 0.5 <= x < 1, 'a number from 0.5 up to, but not, 1'),
    ('lr', lambda x: x > 0, 'a positive number'),
    ('actor_lr', lambda x: x > 0, 'a positive number'),
    ('batch_size', lambda x: x >= 1, 'a positive number'),
    ('actor_freq', lambda x: x >= 1, 'a positive number'),
    ('latent_dim', lambda x: x >= 1, 'a positive number'),
)


def check_agent(agent: ConfigDict) -> None:
    """Raises UserError for a setting out of its range, of those that agents share."""
    for key, test, expected in _AGENT_RANGES:
        if agent.get(key) is not None and not test(agent[key]):
            raise UserError(f'--agent.{key}={agent[key]}: expected {expected}')
    for key, value in agent.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f'--agent.{key}={value}: expected a finite number')
        if key.endswith('hidden_dims') and not (value and all(type(width) is int and width > 0 for width in value)):
            raise UserError(f'--agent.{key}={value}: expected the widths of one or more layers, as in (256, 256)')


def check_encoder(agent: ConfigDict, task, for_states: str | None) -> None:
    """Raises UserError for an image encoder on states, images without one, or an encoder that does not exist.

    for_states: the agent's default, with which it works on states.
    """
    encoder = agent.get('encoder')
    if task.visual == (encoder in (None, 'mlp')):
        kind, example = ('images', 'impala_small') if task.visual else ('state observations', for_states or 'none')
        raise UserError(f'--agent.encoder={encoder}: {task.name} has {kind}; use for instance {example}')
    from utils.encoders import make_encoder  # It brings JAX in, which reading a run's settings does not need.

    make_encoder(encoder)
