"""ExORL's tasks as gymnasium environments, and the labelling of stored simulator states with a task's reward.

What is added to dm_control's task: flat float32 observations, actions in [-1, 1], seeds, the time limit as truncation,
images. The tasks themselves are in `exorl_tasks.py`, files of episodes in `exorl_episodes.py`.
"""

import logging

import gymnasium
import numpy as np
from dm_control.rl import control
from gymnasium.envs.registration import EnvSpec

from envs import EXORL_EPISODE_LENGTHS, TaskSpec, exorl_tasks

RENDER_SIZE = 256  # Pixels a side: a multiple of 16, as video encoders want it.
CAMERAS = {'cheetah': 'side', 'walker': 'side', 'quadruped': 'x', 'jaco': 'front_close'}
# What dm_control and MuJoCo log at every construction and at some resets, of which a user can make nothing.
NOISE = ("compiler attribute 'settotalmass' is deprecated", 'Failed to converge after ')

logger = logging.getLogger(__name__)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(NOISE)


logging.getLogger('absl').addFilter(_is_no_noise)


class ExORLEnv(gymnasium.Env):
    """One task: see `envs.make_env`; `info` is empty. Episodes have `episode_length` steps, the domain's by default.

    `physics` is dm_control's; `physics.get_state()` is what ExORL's episode files store of it.
    """

    def __init__(
        self, spec: TaskSpec, seed: int = 0, render_mode: str | None = None, episode_length: int | None = None
    ):
        self._task = exorl_tasks.make_task(spec.domain, spec.name.removeprefix(f'{spec.domain}_'))
        self._domain = spec.domain
        self._first_seed = seed
        self._steps = 0
        self._observation = None
        bounds = self._task.action_spec()
        self._action_low, self._action_range = bounds.minimum, bounds.maximum - bounds.minimum
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, spec.observation_shape, np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (spec.action_size,), np.float32)
        self.spec = EnvSpec(spec.name, max_episode_steps=episode_length or EXORL_EPISODE_LENGTHS[spec.domain])
        self.metadata = {
            'render_modes': ['rgb_array'],
            'render_fps': round(1 / exorl_tasks.CONTROL_TIMESTEPS[spec.domain]),
        }

    @property
    def physics(self):
        return self._task.physics

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is None:
            seed, self._first_seed = self._first_seed, None
        else:
            self._first_seed = None
        if seed is not None:
            # MuJoCo's state is wholly reset at each episode, so this generator is all that one hands on to the next.
            self._task.task.random.seed(np.random.SeedSequence(seed).generate_state(8))
        self._steps = 0
        self._observation = self._flat(self._task.reset().observation)
        return self._observation.copy(), {}

    def step(self, action):
        scaled = (
            self._action_low + (np.clip(np.asarray(action, np.float64), -1.0, 1.0) + 1.0) / 2.0 * self._action_range
        )
        self._steps += 1
        truncated = self._steps >= self.spec.max_episode_steps
        try:
            step = self._task.step(scaled)
        except control.PhysicsError as error:
            # As dm_control's composer does: an episode that cannot be simulated any further ends there, worth nothing.
            logger.warning('%s: the simulation diverged and the episode ends: %s', self.spec.id, error)
            return self._observation.copy(), 0.0, True, truncated, {}
        self._observation = self._flat(step.observation)
        return self._observation.copy(), float(step.reward), False, truncated, {}

    def render(self):
        return self.physics.render(height=RENDER_SIZE, width=RENDER_SIZE, camera_id=CAMERAS[self._domain])

    def close(self):
        self.physics.free()

    @staticmethod
    def _flat(observation) -> np.ndarray:
        return np.concatenate([np.ravel(part) for part in observation.values()]).astype(np.float32)

    # --- Stored states ---

    def reward_of_state(self, state: np.ndarray) -> float:
        """R(s) of a stored state (n,)."""
        with self.physics.reset_context():
            self.physics.set_state(state)
        return float(self._task.task.get_reward(self.physics))


def make_task_env(spec: TaskSpec, seed: int, render_mode: str | None) -> ExORLEnv:
    """An environment (see `envs.make_env`) for a `TaskSpec` of the ExORL suite."""
    return ExORLEnv(spec, seed=seed, render_mode=render_mode)


def label_physics(env: ExORLEnv, physics: np.ndarray) -> np.ndarray:
    """Rewards (rows,) float32 of stored states (rows, n): each row's own reward R(s)."""
    return np.array([env.reward_of_state(state) for state in np.asarray(physics, np.float64)], np.float32)
