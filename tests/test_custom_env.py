"""The environment of a user's own data: its actions, what is refused, and what is warned of."""

import numpy as np
import pytest

import envs
from envs import custom
from tests.test_custom_data import make_arrays, warnings, write_npz  # noqa: F401
from utils.errors import UserError


def pendulum_spec(tmp_path, env_name='Pendulum-v1', columns=3):
    arrays = make_arrays(observations=np.zeros((9, columns)))
    return envs.task_spec(env_name, write_npz(tmp_path / 'pendulum.npz', **arrays))


def test_environment_takes_actions_in_unit_range(tmp_path):
    env = custom.make_env(pendulum_spec(tmp_path))
    env.reset(seed=0)
    env.unwrapped.state = np.zeros(2)
    env.step(np.ones(1, np.float32))
    assert env.unwrapped.last_u == 2.0, 'Pendulum’s largest torque'
    env.close()


@pytest.mark.parametrize(
    ('env_name', 'columns', 'message'),
    [
        ('Pendulam-v1', 3, 'gymnasium cannot make it'),
        ('no_such_module:Pendulum-v1', 3, 'gymnasium cannot make it'),
        ('Pendulum-v1', 4, r'its observation space is Box.*needs a Box of shape \(4,\)'),
        ('CartPole-v1', 4, r'its action space is Discrete\(2\)'),
    ],
)
def test_environment_of_other_data_is_refused(tmp_path, env_name, columns, message):
    with pytest.raises(UserError, match=message):
        custom.make_env(pendulum_spec(tmp_path, env_name, columns))


@pytest.fixture
def register():
    """Registers a constructor, under an id that it returns, until the test is over."""
    import gymnasium

    ids = []

    def add(constructor, **options):
        ids.append(f'Own{len(ids)}-v0')
        gymnasium.register(ids[-1], constructor, **options)
        return ids[-1]

    yield add
    for name in ids:
        del gymnasium.registry[name]


def make_line_env(low=-1.0, high=1.0):
    """An environment that never ends, and refuses actions out of bounds; its constructor takes no render_mode."""
    import gymnasium

    class LineEnv(gymnasium.Env):
        metadata = {'render_modes': ['rgb_array']}

        def __init__(self):
            self.observation_space = gymnasium.spaces.Box(-1, 1, (3,))
            self.action_space = gymnasium.spaces.Box(np.float32(low), np.float32(high), (1,))

        def reset(self, seed=None, options=None):
            return np.zeros(3, np.float32), {}

        def step(self, action):
            assert self.action_space.contains(action), action
            return np.zeros(3, np.float32), float(action[0]), False, False, {}

    return LineEnv


@pytest.mark.parametrize(('low', 'high'), [(-0.7, 1.1), (-0.9, 2.6), (-2.0, 2.0)])
def test_rescaled_actions_stay_inside_the_bounds(tmp_path, register, low, high):
    """In float32, 1 is rescaled to 1.1000001 and −1 to −0.90000004."""
    env = custom.make_env(pendulum_spec(tmp_path, register(make_line_env(low, high))))
    env.reset(seed=0)
    rewards = [env.step(np.full(1, action, np.float32))[1] for action in (-1, 0, 1)]
    np.testing.assert_allclose(rewards, [low, (low + high) / 2, high], atol=1e-6)
    env.close()


def test_constructor_that_takes_no_render_mode(tmp_path, register):
    spec = pendulum_spec(tmp_path, register(make_line_env(), max_episode_steps=5))
    custom.make_env(spec).close()
    with pytest.raises(UserError, match=r'TypeError: .*render_mode.*--video_episodes=0 makes none'):
        custom.make_env(spec, render_mode='rgb_array')


@pytest.mark.parametrize('error', [RuntimeError('no licence\nfound'), AssertionError(), KeyError('size')])
def test_what_a_constructor_raises_is_one_line(tmp_path, register, error):
    def construct():
        raise error

    with pytest.raises(UserError) as refusal:
        custom.make_env(pendulum_spec(tmp_path, register(construct)))
    reason = ': '.join([type(error).__name__, *str(error).splitlines()[:1]])
    assert f'gymnasium cannot make it ({reason}); with --dataset, expected' in str(refusal.value)


def test_environment_without_spaces_is_refused(tmp_path, register):
    import gymnasium

    with pytest.raises(UserError, match='its observation space is None'):
        custom.make_env(pendulum_spec(tmp_path, register(gymnasium.Env)))


def test_environment_that_may_never_end_is_warned_of_once(tmp_path, register, warnings, monkeypatch):  # noqa: F811
    spec = pendulum_spec(tmp_path, register(make_line_env()))
    with monkeypatch.context() as patch:
        patch.setattr(custom.multiprocessing, 'parent_process', lambda: 'a worker has one')
        custom.make_env(spec)
    assert not warnings
    for _ in range(2):
        custom.make_env(spec)
    assert len(warnings) == 1 and 'without max_episode_steps' in warnings[0]
    custom.make_env(pendulum_spec(tmp_path, register(make_line_env(), max_episode_steps=5)))
    assert len(warnings) == 1
