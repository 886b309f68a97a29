"""ExORL's tasks: sizes, seeds, limits, dm_control's own tasks as a reference, rewards from formulas written here."""

import functools
import re

import mujoco
import numpy as np
import pytest

import envs
from envs import exorl_env, exorl_tasks
from tests.test_envs import run_python

TASKS = [f'{domain}_{task}' for domain, tasks in envs.EXORL_TASKS.items() for task in tasks]
# Observation, action, state, steps in an episode, seconds a step.
SIZES = {
    'cheetah': (17, 6, 18, 1000, 0.01),
    'walker': (24, 6, 18, 1000, 0.025),
    'quadruped': (78, 12, 57, 1000, 0.02),
    'jaco': (42, 9, 18, 250, 0.04),
}
JACO_GOALS = {'top_left': (-1, 1), 'top_right': (1, 1), 'bottom_left': (-1, -1), 'bottom_right': (1, -1)}


@functools.lru_cache
def task_env(name):
    """One environment a task for the whole file."""
    return envs.make_env(name, seed=0)


def play(env, seed, steps):
    """Observations, rewards and states of an episode of random actions."""
    observations, rewards, states = [env.reset(seed=seed)[0]], [], [env.physics.get_state()]
    generator = np.random.default_rng(5)
    for _ in range(steps):
        observation, reward, *_ = env.step(generator.uniform(-1, 1, env.action_space.shape))
        observations.append(observation)
        rewards.append(reward)
        states.append(env.physics.get_state())
    return np.array(observations), np.array(rewards), np.array(states)


@pytest.mark.parametrize('name', TASKS)
def test_a_task_has_the_documented_sizes(name):
    observation_size, action_size, state_size, length, seconds = SIZES[envs.task_spec(name).domain]
    env = task_env(name)
    observation, info = env.reset(seed=1)
    assert observation.shape == env.observation_space.shape == (observation_size,) and info == {}
    assert env.action_space.shape == (action_size,) and (env.action_space.low, env.action_space.high) == (
        pytest.approx(-1),
        pytest.approx(1),
    )
    assert env.unwrapped.physics.get_state().shape == (state_size,)
    assert (env.spec.id, env.spec.max_episode_steps) == (name, length)
    start = env.physics.time()
    observation, reward, terminated, truncated, info = env.step(np.ones(action_size, np.float32))
    assert observation.dtype == np.float32 and np.isfinite(observation).all()
    assert isinstance(reward, float) and 0 <= reward <= 1 and (terminated, truncated, info) == (False, False, {})
    assert env.physics.time() - start == pytest.approx(seconds)


@pytest.mark.parametrize('domain', SIZES)
def test_the_time_limit_truncates(domain):
    env = task_env(f'{domain}_{envs.EXORL_TASKS[domain][0]}')
    env.reset(seed=0)
    length = SIZES[domain][3]
    ends = [env.step(np.zeros(env.action_space.shape))[2:4] for _ in range(length)]
    assert ends == [(False, False)] * (length - 1) + [(False, True)]
    env.reset()
    assert env.step(np.zeros(env.action_space.shape))[3] is False


@pytest.mark.parametrize('domain', SIZES)
def test_an_episode_follows_from_its_seed_alone(domain):
    name = f'{domain}_{envs.EXORL_TASKS[domain][1]}'
    env = envs.make_env(name, seed=3)
    first, _ = env.reset()
    expected = play(env, 3, 10)
    np.testing.assert_array_equal(first, expected[0][0])  # make_env's seed is the first reset's.
    assert not np.array_equal(play(env, 4, 12)[0][0], first)
    for one, two in zip(expected, play(env, 3, 10), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(env.reset()[0], env.reset()[0])  # Unseeded resets go on.
    env.close()


@pytest.mark.parametrize('domain', SIZES)
def test_actions_are_clipped_and_scaled_to_the_simulators_bounds(domain):
    env = task_env(f'{domain}_{envs.EXORL_TASKS[domain][0]}')
    bounds = {
        'quadruped': (np.tile([-1, -1, -0.8], 4), np.tile([1, 1.1, 0.8], 4)),
        'jaco': (-np.repeat([0.6283, 0.8378, 5], 3), np.repeat([0.6283, 0.8378, 5], 3)),
    }.get(domain, (-np.ones(6), np.ones(6)))
    for action, expected in ((-7.0, bounds[0]), (-1.0, bounds[0]), (1.0, bounds[1]), (0.0, np.mean(bounds, axis=0))):
        env.reset(seed=0)
        env.step(np.full(env.action_space.shape, action))
        np.testing.assert_allclose(env.physics.data.ctrl, expected, atol=1e-4)


@pytest.mark.parametrize(
    'name', ['cheetah_run', *(f'{d}_{t}' for d in ('walker', 'quadruped') for t in ('walk', 'run'))]
)
def test_tasks_of_the_suite_are_the_suites_own(name):
    from dm_control import suite

    domain, task = name.split('_')
    env, theirs = task_env(name), suite.load(domain, task)
    env.reset(seed=2)
    theirs.task.random.seed(np.random.SeedSequence(2).generate_state(8))
    check_against(env, theirs, lambda step: step.observation.values())


def test_jaco_is_what_dm_controls_own_loop_makes_of_it():
    from dm_control import composer

    env = task_env('jaco_reach_top_left')
    env.reset(seed=2)
    task = exorl_tasks.ReachPoint(exorl_tasks.JACO_GOALS['reach_top_left'])
    theirs = composer.Environment(task, random_state=np.random.RandomState(0), strip_singleton_obs_buffer_dim=True)
    theirs.random_state.seed(np.random.SeedSequence(2).generate_state(8))

    def parts(step):
        arm, hand = 'jaco_arm/', 'jaco_arm/jaco_hand/'
        names = [
            arm + 'joints_pos',
            arm + 'joints_torque',
            arm + 'joints_vel',
            hand + 'joints_pos',
            hand + 'joints_vel',
        ]
        return [step.observation[name] for name in [*names, hand + 'pinch_site_pos', hand + 'pinch_site_rmat']]

    check_against(env, theirs, parts)
    assert task.control_timestep == SIZES['jaco'][4]


def check_against(env, theirs, parts):
    """Both start from the same random numbers and take the same actions."""
    low, high = theirs.action_spec().minimum, theirs.action_spec().maximum
    generator = np.random.default_rng(1)
    theirs.reset()
    for _ in range(20):
        action = generator.uniform(-1, 1, env.action_space.shape)
        step = theirs.step(low + (action + 1) / 2 * (high - low))
        observation, reward, *_ = env.step(action)
        flat = np.concatenate([np.ravel(part) for part in parts(step)])
        np.testing.assert_allclose(observation, flat, rtol=1e-6, atol=1e-6)
        assert reward == pytest.approx(step.reward, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize('name', TASKS)
def test_stored_states_give_the_rewards_of_their_episode(name):
    env = task_env(name)
    _, rewards, states = play(env, seed=7, steps=40)
    np.testing.assert_array_equal([env.reward_of_state(state) for state in states[1:]], rewards)
    np.testing.assert_array_equal(exorl_env.label_physics(env, states[1:]), rewards.astype(np.float32))
    assert rewards.std() > 0


# --- Rewards, from the formulas and from MuJoCo's bodies, without dm_control's or MuJoCo's sensors ---


def lin(x, bound, margin, value):
    return 1.0 if x >= bound else max(0.0, 1 - (1 - value) * (bound - x) / margin)


def bell(excess, margin):
    return 0.1 ** ((excess / margin) ** 2) if excess > 0 else 1.0


def body_velocities(model, data):
    """Mass, position, linear velocity, angular velocity and inertia of every body about its centre of mass."""
    for body in range(1, model.nbody):
        velocity = np.zeros(6)
        mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_BODY, body, velocity, 0)
        rotation = data.ximat[body].reshape(3, 3)
        inertia = rotation @ np.diag(model.body_inertia[body]) @ rotation.T
        yield model.body_mass[body], data.xipos[body], velocity[3:], velocity[:3], inertia


def expected_reward(name, model, data):
    domain, task = name.split('_', 1)
    mass, position, velocity, spin, inertia = map(np.array, zip(*body_velocities(model, data), strict=True))
    centre = mass @ position / mass.sum()
    speed = mass @ velocity / mass.sum()
    if domain == 'jaco':
        x, y = JACO_GOALS[task.removeprefix('reach_')]
        distance = np.linalg.norm(data.site('jaco_arm/jaco_hand/pinchsite').xpos - [0.09 * x, 0.09 * y, 0.001])
        return bell(distance - 0.05, 0.05)
    if domain == 'cheetah':
        direction, bound = {'run': (1, 10), 'walk': (1, 2), 'run_backward': (-1, 10), 'walk_backward': (-1, 2)}[task]
        return float(np.clip(direction * speed[0] / bound, 0, 1))
    torso = data.body('torso')
    upright = (1 + torso.xmat[8]) / 2
    if domain == 'quadruped':
        local = torso.xmat.reshape(3, 3).T @ site_velocity(model, data, 'torso')
        return (
            upright
            * {
                'walk': np.clip(0.5 + local[0] / (2 * 0.5), 0, 1),
                'run': np.clip(0.5 + local[0] / (2 * 5), 0, 1),
                'stand': 1.0,
                'jump': np.clip(0.5 + centre[2] / 2, 0, 1),
            }[task]
        )
    stand = (3 * bell(1.2 - torso.xpos[2], 0.6) + upright) / 4
    if task == 'stand':
        return stand
    momentum = sum(
        m * np.cross(x - centre, v - speed) + i @ w
        for m, x, v, w, i in zip(mass, position, velocity, spin, inertia, strict=True)
    )
    term = {'walk': speed[0] / 1, 'run': speed[0] / 8, 'flip': momentum[1] / 5}[task]
    return stand * (5 * np.clip(term, 0, 1) + 1) / 6


def site_velocity(model, data, site):
    velocity = np.zeros(6)
    mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_SITE, model.site(site).id, velocity, 0)
    return velocity[3:]


def varied_states(name, env, count=60):
    """States that see all of the reward: fast and slow, high and low, near the goal and far from it."""
    generator = np.random.default_rng(0)
    states = play(env, seed=1, steps=count)[2][1:]
    nq = env.physics.model.nq
    states[:, nq : nq + env.physics.model.nv] *= generator.uniform(0, 8, (count, 1))
    heights, speeds = {'walker': 0, 'quadruped': 2}, {'cheetah': 0, 'walker': 1}
    domain = name.split('_')[0]
    if domain in speeds:
        states[:, nq + speeds[domain]] += generator.uniform(-12, 12, count)
    if domain in heights:
        states[:, heights[domain]] += generator.uniform(-0.5, 1.0, count)
    if domain == 'jaco':
        goal = exorl_tasks.JACO_GOALS[name.removeprefix('jaco_')]
        robot = env._task.task._reach
        for state in states[::2]:
            with env.physics.reset_context():
                env.physics.set_state(state)
                target = goal + generator.uniform(0, 0.08, 3)
                robot.arm.set_site_to_xpos(env.physics, np.random.RandomState(0), robot.hand.tool_center_point, target)
            state[:] = env.physics.get_state()
    return states


@pytest.mark.parametrize('name', TASKS)
def test_rewards_are_those_of_the_formulas(name):
    env = task_env(name)
    states = varied_states(name, env)
    model = env.physics.model.ptr
    expected = []
    for state in states:
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = state[: model.nq], state[model.nq : model.nq + model.nv]
        data.act[:] = state[model.nq + model.nv :]
        mujoco.mj_forward(model, data)
        expected.append(expected_reward(name, model, data))
    rewards = [env.reward_of_state(state) for state in states]
    np.testing.assert_allclose(rewards, expected, rtol=1e-7, atol=1e-12)
    assert np.ptp(expected) > 0.2, 'the states must see the reward change'


def test_a_diverged_simulation_ends_the_episode(caplog):
    env = task_env('cheetah_run')
    env.reset(seed=0)
    env.step(np.zeros(6))
    env.physics.data.qvel[:] = 1e12
    observation, reward, terminated, truncated, _ = env.step(np.ones(6))
    assert (reward, terminated, truncated) == (0.0, True, False) and np.isfinite(observation).all()
    assert re.search('cheetah_run: the simulation diverged', caplog.text)
    assert np.isfinite(env.reset(seed=0)[0]).all()


@pytest.mark.parametrize('name', ['quadruped_jump', 'jaco_reach_top_left'])
def test_rendering_works_and_leaves_no_noise_behind(name):
    result = run_python(
        'import envs, warnings; warnings.simplefilter("error")\n'
        f'env = envs.make_env("{name}", render_mode="rgb_array"); env.reset(seed=0)\n'
        'image = env.render()\n'
        'import sys; assert "jax" not in sys.modules\n'  # Evaluation makes environments in processes of their own.
        'print(env.render_mode, env.metadata["render_fps"], image.shape, image.dtype, image.std() > 5)'
    )  # Not closed on purpose.
    fps = {'quadruped_jump': '50', 'jaco_reach_top_left': '25'}[name]
    assert result.stdout.split() == ['rgb_array', fps, '(256,', '256,', '3)', 'uint8', 'True'], result
    assert result.stderr == ''
