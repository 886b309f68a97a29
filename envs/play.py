"""Scripted play in OGBench's manipulation environments, one episode at a time, each a pure function of its seed.

The scripts are the package's own plan oracles with the settings of the published play data. Which episodes to make, and
the files they go to, is the business of `collect_ogbench.py`; this module knows neither files nor processes.
"""

import numpy as np

from envs import ogbench_env

# Settings of the published play data sets.
PLAN_NOISE = 0.1
PLAN_NOISE_SMOOTHING = 0.5
STACKING_PROBABILITY = {'cube-double': (0.0, 0.25)}  # Drawn once an episode, uniformly; 0 where not listed.

# A scene episode in which the cube leaves the cameras' view is thrown away: right of the table, or left of it and not
# at the height of the drawer's bottom. Metres.
SCENE_RIGHT_EDGE, SCENE_LEFT_EDGE = 0.29, -0.3
SCENE_DRAWER_HEIGHTS = (0.06, 0.08)
CUBE_POSITION = slice(14, 17)  # of the first cube, in qpos
MAX_REDRAWS = 100


class ScriptedPlay:
    """Holds one simulator and its oracles; `episode` may be called any number of times, in any order."""

    def __init__(self, dataset_env: str):
        from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

        # What is played does not depend on what is observed: an image domain's episodes are those of the state domain.
        self._domain = dataset_env.removesuffix('-v0').removeprefix('visual-')
        self._simulator = ogbench_env.make_play_env(dataset_env)
        settings = {'env': self._simulator, 'noise': PLAN_NOISE, 'noise_smoothing': PLAN_NOISE_SMOOTHING}
        if self._domain.startswith('cube'):
            self._oracles = {'cube': cube_plan.CubePlanOracle(**settings)}
        elif self._domain.startswith('puzzle'):
            self._oracles = {'button': button_plan.ButtonPlanOracle(gripper_always_closed=True, **settings)}
        else:
            self._oracles = {
                'cube': cube_plan.CubePlanOracle(**settings),
                'button': button_plan.ButtonPlanOracle(**settings),
                'drawer': drawer_plan.DrawerPlanOracle(**settings),
                'window': window_plan.WindowPlanOracle(**settings),
            }

    def episode(self, seed: tuple[int, ...], rows: int) -> dict[str, np.ndarray]:
        """One episode of play.

        Args:
            seed: non-negative integers that name the episode; equal seeds give bit-equal episodes.
            rows: number of states, one more than there are transitions.

        Returns:
            Arrays of `rows` rows: observations float32, or uint8 images; actions in [-1, 1], qpos and qvel float32;
            terminals bool, True on the last row only; button_states int64 where there are buttons. The action of the
            last row was never carried out.
        """
        for attempt in range(MAX_REDRAWS):
            episode = self._attempt(np.random.SeedSequence((*seed, attempt)), rows)
            if self._is_visible(episode['qpos']) and all(np.isfinite(values).all() for values in episode.values()):
                return episode
        raise RuntimeError(
            f'{self._domain}: {MAX_REDRAWS} redraws of one episode all lost the cube; has the simulator changed?'
        )

    def _attempt(self, seed: np.random.SeedSequence, rows: int) -> dict[str, np.ndarray]:
        simulator_seed, oracle_seed, own_seed = seed.spawn(3)
        np.random.seed(oracle_seed.generate_state(8))  # The oracles draw from NumPy's global generator.
        stacking = np.random.default_rng(own_seed).uniform(*STACKING_PROBABILITY.get(self._domain, (0.0, 0.0)))

        observation, info = self._simulator.reset(seed=int(simulator_seed.generate_state(1)[0]))
        oracle = self._oracle(observation, info)
        columns = {'observations': [], 'actions': [], 'qpos': [], 'qvel': []}
        if 'button_states' in info:
            columns['button_states'] = []
        for row in range(rows):
            action = np.clip(oracle.select_action(observation, info), -1.0, 1.0)
            values = info | {'observations': observation, 'actions': action}
            for name, column in columns.items():
                column.append(values[name])
            if row == rows - 1:
                break
            observation, _, _, _, info = self._simulator.step(action)
            if oracle.done:
                observation, info = self._simulator.set_new_target(p_stack=stacking)
                oracle = self._oracle(observation, info)

        kept = {'button_states': np.int64, 'observations': np.uint8 if observation.dtype == np.uint8 else np.float32}
        episode = {name: np.array(column, kept.get(name, np.float32)) for name, column in columns.items()}
        episode['terminals'] = np.arange(rows) == rows - 1
        return episode

    def _oracle(self, observation, info):
        oracle = self._oracles[info['privileged/target_task']]
        oracle.reset(observation, info)
        return oracle

    def _is_visible(self, qpos: np.ndarray) -> bool:
        if self._domain != 'scene':
            return True
        y, z = qpos[:, CUBE_POSITION].T[1:]
        low, high = SCENE_DRAWER_HEIGHTS
        return not ((y >= SCENE_RIGHT_EDGE) | ((y <= SCENE_LEFT_EDGE) & ((z < low) | (z > high)))).any()
