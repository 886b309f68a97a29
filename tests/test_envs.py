"""The forty names, and OGBench's twenty state tasks as environments: shapes, seeds, limits, pictures. Not the data,
and not the image tasks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import envs
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
STATE_TASKS = [f'{domain}-play-singletask-task{k}-v0' for domain in envs.OGBENCH_STATE_DOMAINS for k in range(1, 6)]
HORIZONS = {'cube-single': 200, 'cube-double': 500, 'scene': 750, 'puzzle-4x4': 500}
DIMENSIONS = {'cube-single': 28, 'cube-double': 37, 'scene': 40, 'puzzle-4x4': 83}


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    variables = {
        name: value for name, value in os.environ.items() if name not in ('MUJOCO_GL', 'DISPLAY')
    } | environment
    return subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600
    )


def test_there_are_forty_tasks():
    assert len(envs.TASKS) == len(set(envs.TASKS)) == 40
    suites = [envs.task_spec(name).suite for name in envs.TASKS]
    assert suites.count('exorl') == 16 and suites.count('ogbench') == 24
    assert sum(envs.task_spec(name).visual for name in envs.TASKS) == 4
    assert {name for name in envs.TASKS if name.startswith('jaco')} == {
        f'jaco_reach_{vertical}_{side}' for vertical in ('top', 'bottom') for side in ('left', 'right')
    }
    for name in ('cheetah_run_backward', 'walker_flip', 'quadruped_jump', 'visual-scene-play-singletask-task1-v0'):
        assert name in envs.TASKS


def test_task_spec_of_an_ogbench_task():
    spec = envs.task_spec('puzzle-4x4-play-singletask-task3-v0')
    assert (spec.suite, spec.domain, spec.visual, spec.reward_at) == ('ogbench', 'puzzle-4x4', False, 'observations')
    assert (spec.env_id, spec.dataset_env) == ('puzzle-4x4-singletask-task3-v0', 'puzzle-4x4-v0')
    assert (spec.observation_shape, spec.action_size) == ((83,), 5)


def test_rewards_of_exorl_belong_to_the_next_state():
    for name in envs.TASKS:
        spec = envs.task_spec(name)
        assert spec.reward_at == ('next_observations' if spec.suite == 'exorl' else 'observations')


def test_tasks_of_one_domain_share_their_data():
    domains = {}
    for name in envs.TASKS:
        spec = envs.task_spec(name)
        domains.setdefault(spec.domain, set()).add(spec.dataset_env)
    assert len(domains) == 12 and all(len(datasets) == 1 for datasets in domains.values())


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r'did you mean .*cube-single-play-singletask-task1-v0'):
        envs.task_spec('cube-singel-play-singletask-task1-v0')
    with pytest.raises(UserError, match=r'envs\.TASKS'):
        envs.task_spec('pong')
    for wrong in (
        'scene-play-singletask-task6-v0',
        'visual-scene-play-singletask-task2-v0',
        'scene-singletask-task1-v0',
        '',
    ):
        with pytest.raises(UserError):
            envs.task_spec(wrong)


def test_a_wrong_render_mode_is_a_users_mistake():
    with pytest.raises(UserError, match='rgb_array'):
        envs.make_env(STATE_TASKS[0], render_mode='human')


def test_importing_envs_is_light_and_chooses_a_headless_renderer():
    heavy = ('jax', 'mujoco', 'gymnasium', 'ogbench', 'dm_control', 'wandb', 'matplotlib')
    result = run_python(
        f"import os, sys, envs; print([m for m in {heavy} if m in sys.modules], os.environ['MUJOCO_GL'])"
    )
    modules, backend = result.stdout.rsplit(maxsplit=1)
    assert modules == '[]' and backend in ('egl', 'osmesa', 'disable'), result
    kept = run_python("import os, envs; print(os.environ['MUJOCO_GL'])", MUJOCO_GL='glfw')
    assert kept.stdout.strip() == 'glfw'
    displayed = run_python("import os, envs; print(os.environ.get('MUJOCO_GL'))", DISPLAY=':0')
    assert displayed.stdout.strip() == 'None'


@pytest.mark.parametrize('name', STATE_TASKS)
def test_a_state_task_resets_and_steps(name):
    domain = envs.task_spec(name).domain
    env = envs.make_env(name, seed=3)
    observation, info = env.reset()
    assert observation.shape == env.observation_space.shape == (DIMENSIONS[domain],)
    assert observation.dtype == np.float32 and info == {'success': 0.0}
    assert env.action_space.shape == (5,) and env.action_space.dtype == np.float32
    first = observation
    for action in (np.ones(5, np.float32), -np.ones(5, np.float32)):
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation.dtype == np.float32 and np.isfinite(observation).all()
        assert isinstance(reward, float) and -16 <= reward <= 0
        assert (terminated, truncated, info) == (False, False, {'success': 0.0})
    assert env.spec.max_episode_steps == HORIZONS[domain]
    assert env.unwrapped.cur_task_id == int(name.split('task')[-1][0])
    np.testing.assert_array_equal(env.reset(seed=3)[0], first)
    env.close()


def episode(env, seed, steps=25):
    observations = [env.reset(seed=seed)[0]]
    generator = np.random.default_rng(5)
    rewards = []
    for _ in range(steps):
        observation, reward, *_ = env.step(generator.uniform(-1, 1, 5).astype(np.float32))
        observations.append(observation)
        rewards.append(reward)
    return np.array(observations), np.array(rewards)


@pytest.mark.parametrize('domain', envs.OGBENCH_STATE_DOMAINS)
def test_an_episode_follows_from_its_seed_alone(domain):
    env = envs.make_env(f'{domain}-play-singletask-v0', seed=3)  # Without a number: the default task.
    first, _ = env.reset()
    expected = episode(env, seed=3)
    np.testing.assert_array_equal(first, expected[0][0])  # make_env's seed is the first reset's.
    other = episode(env, seed=4, steps=60)
    assert not np.array_equal(other[0][0], first)
    repeated = episode(env, seed=3)
    for one, two in zip(expected, repeated, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(env.reset()[0], env.reset()[0])  # Unseeded resets go on.
    env.close()


def test_actions_are_clipped_and_the_time_limit_truncates():
    env = envs.make_env('cube-single-play-singletask-task1-v0')
    env.reset(seed=0)
    far = env.step(np.full(5, 7.0))[0]
    env.reset(seed=0)
    np.testing.assert_array_equal(far, env.step(np.ones(5, np.float32))[0])
    for step in range(1, HORIZONS['cube-single']):
        _, _, terminated, truncated, _ = env.step(np.zeros(5, np.float32))
        assert not terminated and truncated == (step == HORIZONS['cube-single'] - 1)
    env.close()


def test_rendering_works_and_leaves_no_noise_behind():
    result = run_python(
        'import envs, warnings; warnings.simplefilter("error")\n'
        'env = envs.make_env("cube-single-play-singletask-task1-v0", render_mode="rgb_array"); env.reset(seed=0)\n'
        'image = env.render()\n'
        'import sys; assert "jax" not in sys.modules\n'  # Evaluation makes environments in processes of their own.
        'print(env.render_mode, env.metadata["render_fps"], image.shape, image.dtype, image.std() > 5)'
    )  # Not closed on purpose.
    assert result.stdout.split() == ['rgb_array', '20', '(256,', '256,', '3)', 'uint8', 'True'], result
    assert result.stderr == ''
