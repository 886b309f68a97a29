"""OGBench's manipulation simulators made reproducible: `make_task_env` to act in a task, `make_play_env` for scripts.

The physics, tasks and rewards are the `ogbench` package's. What is added: every random draw follows the seed, an
episode does not depend on the ones before it, and a state is measured once a step. Task names are in
`envs/__init__.py`, scripted play in `play.py`.
"""

import atexit
import copy
import functools
import weakref

import gymnasium
import numpy as np

from envs import IMAGE_SHAPE

# Video frames a side: a multiple of 16, as video encoders want it.
RENDER_SIZE = 256
MAGNIFICATION = RENDER_SIZE // IMAGE_SHAPE[0]  # Of an image task's observations.
FRAMES_PER_SECOND = 20


class _Reproducible:
    """Mixed in before a `ManipSpaceEnv`: makes `reset(seed=k)` start exactly the same episode every time.

    Three things in the package stand against that. The task environments shake the goal scene with actions from an
    action space that is new, thus unseeded, at each call. A reset leaves the constraint solver's warm start as the last
    episode's model (the scene's locks are joint dampings) had made it. And the button states carry over.

    It also keeps the dictionary of measurements, which the package computes three times a step, until the state
    changes.
    """

    _actions = None
    _measured = None
    _compiled_damping = None
    _closes_at_exit = False

    @property
    def action_space(self):
        if self._actions is None:
            self._actions = gymnasium.spaces.Box(-1.0, 1.0, (5,), np.float32)
        return self._actions

    def reset(self, *args, seed=None, **kwargs):
        if seed is not None:
            self.action_space.seed(seed)
        return super().reset(*args, seed=seed, **kwargs)

    def post_compilation(self):
        super().post_compilation()
        self._compiled_damping = self._model.dof_damping.copy()

    def initialize_episode(self):
        import mujoco

        self._model.dof_damping[:] = self._compiled_damping
        mujoco.mj_resetData(self._model, self._data)
        if hasattr(self, '_cur_button_states'):
            self._cur_button_states[:] = 0
            self._target_button_states[:] = 0
        self._measured = None
        super().initialize_episode()
        self._measured = None

    def compute_ob_info(self):
        if self._measured is None:
            self._measured = super().compute_ob_info()
        return self._measured

    def pre_step(self):
        super().pre_step()  # The last look at the old state: the physics step follows.
        self._measured = None

    def set_new_target(self, *args, **kwargs):
        self._measured = None
        return super().set_new_target(*args, **kwargs)

    def set_state(self, *args, **kwargs):
        super().set_state(*args, **kwargs)
        self._measured = None

    def _initialize_renderer(self):
        super()._initialize_renderer()
        if not self._closes_at_exit:
            # A context that outlives the OpenGL library complains on stderr. Exit functions run in reverse order: this
            # one, registered after the library's own, which the first renderer registers, comes before it.
            atexit.register(_close_renderer, weakref.ref(self))
            self._closes_at_exit = True


@functools.cache
def _reproducible(cls):
    return type(f'Reproducible{cls.__name__}', (_Reproducible, cls), {})


def _make(env_id: str, **kwargs):
    """`gymnasium.make(env_id, **kwargs)` of one of ogbench's ids, with the reproducible subclass of its class."""
    import ogbench  # noqa: F401 (importing it registers the ids)
    from gymnasium.envs.registration import load_env_creator

    spec = copy.deepcopy(gymnasium.spec(env_id))
    spec.entry_point = _reproducible(load_env_creator(spec.entry_point))
    return gymnasium.make(spec, disable_env_checker=True, **kwargs)


def _close_renderer(simulator_reference) -> None:
    """Frees the OpenGL context of a simulator that is still alive; the package itself never does."""
    simulator = simulator_reference()
    if simulator is not None and simulator._renderer is not None:
        simulator._renderer.close()
        simulator._renderer = None


def _without_shadows(scene) -> None:
    """Videos are for people, who lose nothing; without a GPU a frame takes a third of the time."""
    import mujoco

    scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0


class TaskEnv(gymnasium.Wrapper):
    """One task as the training code wants it: float32 (or uint8 images), clipped actions, a lean `info`, a seed from
    the start."""

    metadata = {'render_modes': ['rgb_array'], 'render_fps': FRAMES_PER_SECOND}

    def __init__(self, env, spec, seed: int, render_mode: str | None):
        super().__init__(env)
        self._first_seed = seed
        self._render_mode = render_mode
        self._visual = spec.visual
        low, high, dtype = (0, 255, np.uint8) if spec.visual else (-np.inf, np.inf, np.float32)
        self.observation_space = gymnasium.spaces.Box(low, high, spec.observation_shape, dtype)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (spec.action_size,), np.float32)
        self._simulator_reference = weakref.ref(env.unwrapped)

    @property
    def render_mode(self):
        return self._render_mode

    def reset(self, *, seed=None, options=None):
        if seed is None:
            seed, self._first_seed = self._first_seed, None
        else:
            self._first_seed = None
        observation, _ = self.env.reset(seed=seed, options=options)
        return observation.astype(self.observation_space.dtype), {'success': 0.0}

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(np.clip(action, -1.0, 1.0))
        return (
            observation.astype(self.observation_space.dtype),
            float(reward),
            bool(terminated),
            bool(truncated),
            {'success': float(info['success'])},
        )

    def render(self):
        if self._visual:
            # What the policy sees, magnified. The renderer keeps its settings, and the next observation has shadows.
            return self.unwrapped.render().repeat(MAGNIFICATION, axis=0).repeat(MAGNIFICATION, axis=1)
        return self.unwrapped.render(scene_callback=_without_shadows)

    def close(self):
        _close_renderer(self._simulator_reference)
        super().close()


def make_task_env(spec, seed: int, render_mode: str | None) -> TaskEnv:
    """A single-task environment (see `envs.make_env`) for a `TaskSpec` of the OGBench suite."""
    # An image task's size is that of its observations.
    size = {} if render_mode is None or spec.visual else {'width': RENDER_SIZE, 'height': RENDER_SIZE}
    return TaskEnv(_make(spec.env_id, **size), spec, seed, render_mode)


def stack_frames(env, number: int):
    """The environment with its newest `number` images (H, W, C) in each observation: (H, W, number·C), oldest first."""
    height, width, channels = env.observation_space.shape
    space = gymnasium.spaces.Box(0, 255, (height, width, number * channels), np.uint8)
    stacked = gymnasium.wrappers.FrameStackObservation(env, number, padding_type='reset')
    return gymnasium.wrappers.TransformObservation(stacked, lambda frames: np.concatenate(frames, axis=-1), space)


def make_play_env(dataset_env: str):
    """The goal-less simulator that scripted play runs in, for instance of 'cube-single-v0'; its episodes have no end.

    The targets of the scripts are not drawn: play data are the same whether rendered or not.
    """
    return _make(dataset_env, mode='data_collection', terminate_at_goal=False, visualize_info=False).unwrapped
