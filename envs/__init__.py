"""The benchmark's tasks by name, and one function that makes any of them into a gymnasium environment.

Importing this package is cheap: no simulator is loaded before `make_env` is called. Simulators live in
`ogbench_env.py` and `exorl_env.py`; getting data sets in `collect_*.py`, `download_*.py` and `convert_exorl.py`;
loading them in `data.py`; a user's own data and environments in `custom.py`. Nothing here knows about the agents of
`agents/`.
"""

import dataclasses
import difflib
import re

from envs import rendering
from utils.errors import UserError

rendering.prefer_backend()

EXORL_TASKS = {
    'cheetah': ('run', 'run_backward', 'walk', 'walk_backward'),
    'walker': ('walk', 'run', 'stand', 'flip'),
    'quadruped': ('run', 'jump', 'stand', 'walk'),
    'jaco': ('reach_top_left', 'reach_top_right', 'reach_bottom_left', 'reach_bottom_right'),
}
# (observation size, action size) of each simulator; numbers in its state; steps in an episode.
EXORL_SIZES = {'cheetah': (17, 6), 'walker': (24, 6), 'quadruped': (78, 12), 'jaco': (42, 9)}
EXORL_PHYSICS_SIZES = {'cheetah': 18, 'walker': 18, 'quadruped': 57, 'jaco': 18}
EXORL_EPISODE_LENGTHS = {'cheetah': 1000, 'walker': 1000, 'quadruped': 1000, 'jaco': 250}
OGBENCH_OBSERVATION_SIZES = {'cube-single': 28, 'cube-double': 37, 'scene': 40, 'puzzle-4x4': 83}
OGBENCH_ACTION_SIZE = 5
IMAGE_SHAPE = (64, 64, 3)
NO_ENV = 'none'  # In place of an environment's name: data without one.

OGBENCH_STATE_DOMAINS = tuple(OGBENCH_OBSERVATION_SIZES)
OGBENCH_DOMAINS = OGBENCH_STATE_DOMAINS + tuple(f'visual-{domain}' for domain in OGBENCH_STATE_DOMAINS)

TASKS = (
    tuple(f'{domain}_{task}' for domain, tasks in EXORL_TASKS.items() for task in tasks)
    + tuple(f'{domain}-play-singletask-task{k}-v0' for domain in OGBENCH_STATE_DOMAINS for k in range(1, 6))
    + tuple(f'visual-{domain}-play-singletask-task1-v0' for domain in OGBENCH_STATE_DOMAINS)
)


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """What a task's name stands for.

    Attributes:
        name: the benchmark's name of the task.
        suite: 'ogbench' or 'exorl'; 'custom' for a user's own data.
        domain: the tasks of one domain share reward-free data, hence one pre-trained checkpoint.
        visual: whether observations are images (uint8) rather than state vectors (float32).
        env_id: the simulator's own id of the task.
        dataset_env: what `--env_name` of the collecting and downloading commands takes.
        reward_at: which state of a transition its reward label is computed from, 'observations' or 'next_observations'.
        observation_shape: shape of one observation.
        action_size: number of action dimensions, each in [-1, 1].
    """

    name: str
    suite: str
    domain: str
    visual: bool
    env_id: str
    dataset_env: str
    reward_at: str
    observation_shape: tuple[int, ...]
    action_size: int


def suggest(word: str, known) -> str:
    """', did you mean …?' with the nearest of the known names, or '' if nothing is near."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f'; did you mean {" or ".join(near)}?' if near else ''


def task_spec(env_name: str, dataset: str | None = None) -> TaskSpec:
    """What `env_name` stands for: one of `TASKS`, or `X-play-singletask-v0` for an OGBench environment's default task.

    With a `dataset` of the user's own, it is a gymnasium environment's id or `NO_ENV`: see `custom.py`.

    Raises:
        UserError: there is no task of that name; the message gives the nearest ones.
    """
    if dataset is not None:
        from envs import custom

        return custom.task_spec(dataset, env_name)
    match = re.fullmatch(r'(.+)-play-singletask(-task[1-5])?-v0', env_name)
    if match and match[1] in OGBENCH_DOMAINS and (env_name in TASKS or match[2] is None):
        domain, task = match[1], match[2] or ''
        visual = domain.startswith('visual-')
        shape = IMAGE_SHAPE if visual else (OGBENCH_OBSERVATION_SIZES[domain],)
        return TaskSpec(
            name=env_name,
            suite='ogbench',
            domain=domain,
            visual=visual,
            env_id=f'{domain}-singletask{task}-v0',
            dataset_env=f'{domain}-v0',
            reward_at='observations',
            observation_shape=shape,
            action_size=OGBENCH_ACTION_SIZE,
        )
    if env_name in TASKS:
        domain = env_name.split('_')[0]
        observation_size, action_size = EXORL_SIZES[domain]
        return TaskSpec(
            name=env_name,
            suite='exorl',
            domain=domain,
            visual=False,
            env_id=env_name,
            dataset_env=domain,
            reward_at='next_observations',
            observation_shape=(observation_size,),
            action_size=action_size,
        )
    hint = suggest(env_name, TASKS) or f'; the {len(TASKS)} tasks are listed in envs.TASKS, for instance {TASKS[16]}'
    raise UserError(f'unknown task {env_name!r}{hint}')


def make_env(env_name: str, seed: int = 0, render_mode: str | None = None, frame_stack: int = 1):
    """Makes a task into a gymnasium environment.

    Args:
        env_name: a name that `task_spec` knows.
        seed: seeds the first `reset()` that is not given a seed of its own. `reset(seed=k)` starts the same episode
            every time, whatever happened before it, and the same actions then give the same episode.
        render_mode: None, or 'rgb_array' for `render()` to return (H, W, 3) uint8 images.
        frame_stack: the newest so many images make one observation, stacked on the channel axis, oldest first; before
            there are as many, the episode's first image is repeated. Image tasks only.

    Returns:
        A `gymnasium.Env`: observations float32 (or uint8 images), actions float32 in [-1, 1] and clipped to it, the
        time limit reported as truncation, and in OGBench `info['success']` 0.0 or 1.0. Close it when done: it may hold
        an OpenGL context.

    Raises:
        UserError: unknown task, or images are asked for where nothing can render them.
    """
    spec = task_spec(env_name)
    if render_mode not in (None, 'rgb_array'):
        raise UserError(f'render_mode={render_mode!r}: expected None or rgb_array')
    if spec.visual:
        rendering.require_backend()
    elif frame_stack != 1:
        raise UserError(f'frame_stack={frame_stack}: {env_name} has state observations; expected 1')
    if spec.suite == 'exorl':
        from envs.exorl_env import make_task_env

        return make_task_env(spec, seed=seed, render_mode=render_mode)
    from envs.ogbench_env import make_task_env, stack_frames

    env = make_task_env(spec, seed=seed, render_mode=render_mode)
    return env if frame_stack == 1 else stack_frames(env, frame_stack)
