"""Acting in a domain without a task and writing down what happens, in ExORL's format; and the two policies that learn
nothing.

`random` and `ou` give each episode as a pure function of its seed. The policy that learns is in `rnd.py`; which
episodes to make is the business of `collect_exorl.py`.
"""

import contextlib
import logging
from pathlib import Path

import numpy as np
from dm_control.rl import control

from envs import EXORL_TASKS, coverage, exorl_env, exorl_episodes, task_spec

# The Ornstein-Uhlenbeck process of `ou`, exact at whole steps: how much of it is left after one, and its spread.
OU_MEMORY = float(np.exp(-0.15))
OU_STD = 0.5

logger = logging.getLogger(__name__)


def reward_task(domain: str) -> str:
    """The task whose live rewards the episode files of a domain hold: nothing learns from them."""
    return f'{domain}_{EXORL_TASKS[domain][0]}'


class EpisodeRecorder:
    """Runs one episode after the other in one simulator, and writes each when it is finished.

    Every episode has all its steps, whatever the simulator does: a step that diverges is taken again without an action,
    and if that diverges, too, the last state is repeated, without an action, until the end.
    """

    def __init__(self, domain: str, episode_length: int, buffer: str | Path):
        self._domain, self._length, self._buffer = domain, episode_length, Path(buffer)
        spec = task_spec(reward_task(domain))
        self._env = exorl_env.ExORLEnv(spec, episode_length=episode_length + 1)  # Its end is decided here.
        self.action_size = spec.action_size

    def start(self, index: int, seed: int) -> np.ndarray:
        """Begins the episode of that index and returns its first observation."""
        self._index = int(index)
        self._is_stuck = False
        observation, _ = self._env.reset(seed=int(seed))
        self._rows = {'observation': [], 'action': [], 'reward': [], 'physics': []}
        self._record(observation, np.zeros(self.action_size), 0.0)
        return observation

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes one step; returns the next observation (d,) and the action (a,) that was taken, which the file holds.

        Both are float32. The action is the given one, clipped to [-1, 1], unless the simulator could not take it.
        """
        nothing = np.zeros(self.action_size, np.float32)
        attempts = () if self._is_stuck else (np.clip(action, -1.0, 1.0).astype(np.float32), nothing)
        for attempt in attempts:
            observation, reward, diverged, *_ = self._env.step(attempt)
            if not diverged:
                self._record(observation, attempt, reward)
                return observation, attempt
            self._step_back()
        if not self._is_stuck:
            logger.warning('%s: episode %d cannot be simulated any further and stays', self._domain, self._index)
            self._is_stuck = True
        for name, rows in self._rows.items():
            rows.append(nothing if name == 'action' else rows[-1])
        return self._rows['observation'][-1], nothing

    def _step_back(self) -> None:
        """Puts the simulator into the last state that is recorded."""
        with contextlib.suppress(control.PhysicsError), self._env.physics.reset_context():
            self._env.physics.set_state(self._rows['physics'][-1])

    def _record(self, observation, action, reward) -> None:
        row = {
            'observation': observation,
            'action': action,
            'reward': [reward],
            'physics': self._env.physics.get_state(),
        }
        for name, value in row.items():
            self._rows[name].append(value)

    def finish(self) -> np.ndarray:
        """Writes the episode and returns the cells of the coverage grid that it visited."""
        # States keep their precision, so that rewards computed from them are the live ones.
        episode = {
            name: np.array(rows, np.float64 if name == 'physics' else np.float32) for name, rows in self._rows.items()
        }
        episode['discount'] = np.ones_like(episode['reward'])
        exorl_episodes.write_episode(self._buffer, self._index, episode)
        return coverage.visited_cells(self._domain, episode['observation'], episode['physics'])


def random_actions(generator: np.random.Generator, steps: int, size: int) -> np.ndarray:
    """Independent actions (steps, size), uniform in [-1, 1]."""
    return generator.uniform(-1.0, 1.0, (steps, size))


def ou_actions(generator: np.random.Generator, steps: int, size: int) -> np.ndarray:
    """Actions (steps, size) that wander: an Ornstein-Uhlenbeck process in its stationary state, clipped to [-1, 1]."""
    noise = generator.normal(size=(steps, size))
    actions = np.empty((steps, size))
    actions[0] = OU_STD * noise[0]
    for step in range(1, steps):
        actions[step] = OU_MEMORY * actions[step - 1] + OU_STD * np.sqrt(1 - OU_MEMORY**2) * noise[step]
    return np.clip(actions, -1.0, 1.0)


ACTIONS = {'random': random_actions, 'ou': ou_actions}


def make_explorer(domain: str, policy: str, episode_length: int, buffer: str):
    """A function that makes and writes one episode, for `worker_pool`; its job is (index, seed words)."""
    recorder = EpisodeRecorder(domain, episode_length, buffer)

    def explore(job) -> np.ndarray:
        index, seed = job
        start_seed, action_seed = np.random.SeedSequence(seed).spawn(2)
        actions = ACTIONS[policy](np.random.default_rng(action_seed), episode_length, recorder.action_size)
        recorder.start(index, int(start_seed.generate_state(1)[0]))
        for action in actions.astype(np.float32):
            recorder.step(action)
        return recorder.finish()

    return explore
