"""Coordinates against what the simulators themselves say, what is done next on states made by hand, and pictures."""
# ruff: noqa: F811 (imported fixtures are arguments of the same name)

import numpy as np
import pytest

import envs
from envs import convert_exorl, data, state_views
from tests.tiny_exorl import SIZES, STEPS, episodes_of, jobs_in_this_process, raw  # noqa: F401 (fixtures)
from utils.errors import UserError


def seen(task, observation):
    """{label: value} of all coordinates of one state."""
    panels = state_views.panels(envs.task_spec(task))
    return {c.label: float(c.of(observation)) for panel in panels for c in (panel.x, panel.y)}


def after_some_steps(task, steps=12):
    env = envs.make_env(task)
    observation, _ = env.reset(seed=1)
    generator = np.random.default_rng(0)
    for _ in range(steps):
        observation, *_ = env.step(generator.uniform(-1, 1, env.action_space.shape))
    return env, observation


@pytest.mark.parametrize('domain', ['cube-double', 'scene', 'puzzle-4x4'])
def test_coordinates_of_ogbench(domain):
    task = f'{domain}-play-singletask-task1-v0'
    env, observation = after_some_steps(task)
    truth, found = env.unwrapped.compute_ob_info(), seen(task, observation)
    effector = truth['proprio/effector_pos']
    expected = {'gripper x (m)': effector[0], 'gripper y (m)': effector[1]}
    for index in range(state_views.CUBES[domain]):
        name = 'cube' if index == 0 else f'cube {index + 1}'
        x, y, _ = truth[f'privileged/block_{index}_pos']
        expected |= {f'{name} x (m)': x, f'{name} y (m)': y}
    if domain == 'scene':
        expected |= {'drawer (m)': truth['privileged/drawer_pos'][0], 'window (m)': truth['privileged/window_pos'][0]}
        expected |= {f'button {i + 1} (state)': truth[f'privileged/button_{i}_state'] for i in range(2)}
    elif domain == 'puzzle-4x4':
        expected |= {'buttons in state 1': sum(truth[f'privileged/button_{i}_state'] for i in range(16))}
        expected |= {'gripper z (m)': effector[2]}
    else:
        expected |= {'gripper z (m)': effector[2]}
        expected |= {'gripper opening (0 open, 1 closed)': truth['proprio/gripper_opening'][0]}
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('domain', envs.EXORL_TASKS)
def test_coordinates_of_exorl(domain):
    task = f'{domain}_{envs.EXORL_TASKS[domain][0]}'
    env, observation = after_some_steps(task)
    found, physics = seen(task, observation), env.physics
    if domain == 'cheetah':
        position, velocity = physics.named.data.qpos, physics.named.data.qvel
        expected = {
            'forward speed (m/s)': velocity['rootx'],
            'torso angle (rad)': position['rooty'],
            'height over the start (m)': position['rootz'],
            'vertical speed (m/s)': velocity['rootz'],
        }
    elif domain == 'walker':
        expected = {
            'forward speed (m/s)': physics.named.data.qvel['rootx'],
            'torso angle (rad)': physics.named.data.qpos['rooty'],
            'torso height (m)': physics.torso_height(),
            'spin (rad/s)': physics.named.data.qvel['rooty'],
        }
    elif domain == 'quadruped':
        forward, sideways, _ = physics.torso_velocity()
        expected = {'forward speed (m/s)': forward, 'sideways speed (m/s)': sideways}
        expected |= {'torso upright (cosine)': float(physics.torso_upright())}
    else:
        site = physics.named.data.site_xpos
        (name,) = [name for name in site.axes.row.names if name.endswith('pinchsite')]
        expected = dict(zip(('hand x (m)', 'hand y (m)', 'hand z (m)'), site[name], strict=True))
    assert found == pytest.approx({label: np.asarray(value).item() for label, value in expected.items()}, abs=1e-5)


def test_images_have_no_coordinates():
    spec = envs.task_spec('visual-scene-play-singletask-task1-v0')
    assert state_views.panels(spec) == () and state_views.behaviour(spec, np.zeros((3, 1)), np.full(3, 2)) is None


# --- Behaviour ---


def test_the_object_that_is_moved_next():
    scene = np.zeros((10, envs.OGBENCH_OBSERVATION_SIZES['scene']))
    ends = np.repeat([5, 9], [6, 4])
    cube, second_button, drawer = 19, 33, 36
    scene[2:6, second_button] = 1.0  # Pressed between rows 1 and 2.
    scene[4:6, [cube, drawer]] = 1.0  # The drawer takes the cube along between rows 3 and 4.
    scene[6:, cube] = 5.0  # Another episode: nobody moved it there from row 5 on.
    scene[8:, cube + 1] += 0.01  # A millimetre: it settles.
    spec = envs.task_spec('scene-play-singletask-task1-v0')
    behaviour = state_views.behaviour(spec, scene, ends)
    assert behaviour.names == ('button 1', 'button 2', 'drawer', 'window', 'cube')
    np.testing.assert_array_equal(behaviour.values, [1, 1, 2, 2, -1, -1, -1, -1, -1, -1])


def test_the_coming_speed_of_a_body_stays_inside_the_episode():
    observations = np.zeros((60, envs.EXORL_SIZES['cheetah'][0]))
    observations[:, 8] = np.r_[np.arange(40), np.full(20, 100.0)]
    ends = np.repeat([39, 59], [40, 20])
    behaviour = state_views.behaviour(envs.task_spec('cheetah_run'), observations, ends)
    assert behaviour.names is None and behaviour.values[3] == pytest.approx(3 + 12)
    assert behaviour.values[39] == 39 and behaviour.values[40] == 100


# --- Pictures ---


def test_a_stored_state_looks_as_it_did(tmp_path):
    spec = envs.task_spec('scene-play-singletask-task1-v0')
    env = envs.make_env(spec.name, render_mode='rgb_array')
    env.reset(seed=0)
    simulator, states, pictures = env.unwrapped, {'qpos': [], 'qvel': [], 'button_states': []}, []
    for _ in range(2):
        for _ in range(10):
            env.step(np.array([1, 0.5, -0.5, 0.2, 1]))
        info = simulator.compute_ob_info() | {'button_states': simulator._cur_button_states}
        for name, rows in states.items():
            rows.append(info[name].copy())
        pictures.append(env.render().astype(float))
    env.close()
    path = data.task_path(spec, 'pretraining', 'val', tmp_path)
    np.savez(path, observations=np.zeros((2, 40)), **states)
    stored = state_views.load_states(spec, 'pretraining', 'val', tmp_path, 2)
    renderer = state_views.StateRenderer(spec)
    drawn = [renderer(stored, row).astype(float) for row in (1, 0)][::-1]
    renderer.close()
    for picture, other, again in zip(pictures, pictures[::-1], drawn, strict=True):
        assert np.abs(picture - again).mean() < 0.1 < np.abs(other - again).mean()


def test_files_without_states_and_damaged_ones(tmp_path):
    spec = envs.task_spec('cube-single-play-singletask-task1-v0')
    path = data.task_path(spec, 'pretraining', 'val', tmp_path)
    np.savez(path, observations=np.zeros((2, 28)))
    assert state_views.load_states(spec, 'pretraining', 'val', tmp_path, 2) is None
    path.write_bytes(b'PK nothing')
    with pytest.raises(UserError, match=r'val\.npz cannot be read'):
        state_views.load_states(spec, 'pretraining', 'val', tmp_path, 2)


def test_validation_files_of_exorl_hold_the_physics(raw, tmp_path, jobs_in_this_process):
    convert_exorl.convert('cheetah', ['run'], 'rnd', str(raw), str(tmp_path), sizes=SIZES)
    spec = envs.task_spec('cheetah_run')
    held_out = episodes_of(raw)[7]['physics']
    states = state_views.load_states(spec, 'finetuning', 'val', tmp_path, STEPS + 1)
    np.testing.assert_array_equal(states['physics'], held_out)
    assert state_views.load_states(spec, 'finetuning', 'train', tmp_path, STEPS + 1) is None
    renderer = state_views.StateRenderer(spec)
    assert renderer(states, 3).std() > 0
    renderer.close()
