"""A user's own data set, an npz or HDF5 file or one of Minari's, and a gymnasium environment to evaluate in.

One data set serves both phases: pre-training sees it without its rewards, fine-tuning with them. Its last episodes are
the validation set. What a file has to hold is in `docs/custom_data.md`, and `custom_files.py` reads it; the benchmark's
own data are read by `data.py`.
"""

import hashlib
import multiprocessing
import re
from pathlib import Path

import numpy as np

from envs import TaskSpec, custom_files
from envs.custom_files import LABELS, MINARI
from envs.data import require_set
from utils.errors import UserError

SUITE = 'custom'
PREFIX = 'custom-'  # Of task names; no name of the benchmark's tasks begins with it.


def task_name(dataset: str) -> str:
    """What runs and results call the task of a data set, which need not exist any more: 'custom-' and its name."""
    stem = dataset.removeprefix(MINARI) if dataset.startswith(MINARI) else Path(dataset).stem
    return PREFIX + re.sub(r'[^\w+=@,.-]', '-', stem)


def task_spec(dataset: str, env_name: str) -> TaskSpec:
    """What `--dataset` and `--env_name` stand for; opens the data set for its shapes, and reads none of its rows.

    Data sets with observations and actions of the same sizes are one domain: a checkpoint pre-trained on one can be
    fine-tuned on another.

    Raises:
        UserError: there is no such data set, or it lacks an array or has one of the wrong shape.
    """
    observation_size, action_size = custom_files.sizes(dataset)
    return TaskSpec(
        name=task_name(dataset),
        suite=SUITE,
        domain=f'custom data of {observation_size} observations and {action_size} actions',
        visual=False,
        env_id=env_name,
        dataset_env=dataset,
        reward_at='next_observations',
        observation_shape=(observation_size,),
        action_size=action_size,
    )


def load_raw(dataset: str, phase: str, split: str, max_transitions: int | None = None) -> dict:
    """Loads one split of a data set, as `envs.data.load_raw` does for the benchmark's.

    Args:
        dataset: a path, or 'minari:<id>'.
        phase: 'pretraining' (rewards are dropped) or 'finetuning'.
        split: 'train', or 'val': the last tenth of the episodes.
        max_transitions: keep as many whole episodes, from the first on, as hold no more transitions than this.

    Raises:
        UserError: the data set cannot be used; the message names it, and what is wrong.
    """
    require_set(phase, split)
    labels = LABELS if phase == 'finetuning' else ()
    raw = custom_files.read(dataset, labels, split, max_transitions)
    digest = hashlib.sha256()
    for name in sorted(raw):
        digest.update(name.encode())
        digest.update(raw[name])
    raw['source'] = {
        'file': dataset if dataset.startswith(MINARI) else Path(dataset).name,
        'fingerprint': digest.hexdigest(),
        'rows': len(raw['terminals']),
        'episodes': int(raw['terminals'].sum()),
        'metadata': None,
    }
    return raw


def make_env(spec: TaskSpec, render_mode: str | None = None):
    """The gymnasium environment of a data set's task, its actions rescaled to [-1, 1].

    Args:
        spec: what `task_spec` gave.
        render_mode: None, or 'rgb_array', which the environment's constructor must then take.

    Returns:
        A `gymnasium.Env` that hands on actions inside its own bounds. Logs a warning, once, if nothing limits the
        length of its episodes.

    Raises:
        UserError: gymnasium cannot make it, or its spaces are not those of the data.
    """
    import gymnasium

    options = {} if render_mode is None else {'render_mode': render_mode}  # Not every constructor takes one.
    try:
        env = gymnasium.make(spec.env_id, disable_env_checker=True, **options)
    except Exception as error:  # Whatever gymnasium, the module or the constructor raises.
        if render_mode is None:
            advice = 'with --dataset, expected a registered environment (module:id imports the module first), or none'
        else:
            advice = f'films need one that takes render_mode={render_mode}; --video_episodes=0 makes none'
        reason = ': '.join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise UserError(f'--env_name={spec.env_id}: gymnasium cannot make it ({reason}); {advice}') from error
    sizes = {'observation': spec.observation_shape, 'action': (spec.action_size,)}
    spaces = {kind: getattr(env, f'{kind}_space', None) for kind in sizes}
    for kind, shape in sizes.items():
        if not isinstance(spaces[kind], gymnasium.spaces.Box) or spaces[kind].shape != shape:
            env.close()
            raise UserError(
                f'--env_name={spec.env_id}: its {kind} space is {spaces[kind]}, but {spec.dataset_env} needs a Box of '
                f'shape {shape}; is it the environment of other data?'
            )
    if not (np.isfinite(env.action_space.low).all() and np.isfinite(env.action_space.high).all()):
        env.close()
        raise UserError(f'--env_name={spec.env_id}: its actions have no bounds, so [-1, 1] cannot be scaled to them')
    # `gymnasium.make` runs in every worker, too; what there is to say is said by the run.
    if (env.spec is None or env.spec.max_episode_steps is None) and multiprocessing.parent_process() is None:
        custom_files.warn_once(
            f'--env_name={spec.env_id}: it is registered without max_episode_steps; an evaluation never ends unless '
            'the environment ends its episodes by itself'
        )
    # Rounding takes rescaled ±1 beyond the bounds. `ClipAction` would take the bounds away that are to be scaled to.
    low, high = env.action_space.low, env.action_space.high
    env = gymnasium.wrappers.TransformAction(env, lambda action: np.clip(action, low, high), None)
    return gymnasium.wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0))
