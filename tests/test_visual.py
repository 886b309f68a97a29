"""Image tasks: what is collected, what is observed, and what a stack of frames is. Rendering is slow: few frames."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import envs
from envs import collect_ogbench, data, rendering
from utils.datasets import Dataset, gather_observations
from utils.errors import UserError
from utils.normalizers import Normalizer

ROOT = Path(__file__).parent.parent
DOMAINS = [domain for domain in envs.OGBENCH_DOMAINS if domain.startswith('visual-')]
DOMAIN = 'visual-cube-single'
TASK = f'{DOMAIN}-play-singletask-task1-v0'
LENGTH = 5
EPISODES = {'train': 2, 'val': 1}


def collect(folder, workers, domain=DOMAIN, split='pretrain', episodes=EPISODES):
    return collect_ogbench.collect(f'{domain}-v0', split, episodes, 5, workers, str(folder), episode_length=LENGTH)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Reward-free images by one worker; not to be changed."""
    folder = tmp_path_factory.mktemp('images')
    collect(folder, workers=1)
    return folder


def test_images_are_stored_as_bytes_of_the_state_domains_episodes(folder, tmp_path):
    collect(tmp_path, workers=1, domain='cube-single')
    with (
        np.load(folder / f'{DOMAIN}-play-v0.npz') as images,
        np.load(tmp_path / 'cube-single-play-v0.npz') as states,
    ):
        assert images.keys() == states.keys()
        for name in ('actions', 'qpos', 'qvel', 'terminals'):
            np.testing.assert_array_equal(images[name], states[name])
        observations = images['observations']
    assert observations.shape == (2 * (LENGTH + 1), 64, 64, 3) and observations.dtype == np.uint8
    assert all(image.std() > 20 for image in observations)
    assert len({image.tobytes() for image in observations}) == len(observations)


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(folder, tmp_path):
    for path in collect(tmp_path, workers=2):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_an_environment_sees_what_the_data_hold(folder):
    """In a row's state, put into the task's simulator, the observation is the row's image."""
    with np.load(folder / f'{DOMAIN}-play-v0.npz') as archive:
        stored = {name: archive[name] for name in archive.files}
    env = envs.make_env(TASK)
    env.reset(seed=0)
    simulator = env.unwrapped
    for row in (0, LENGTH + 1):  # First rows: a later one's image is of the physics step before its qpos.
        simulator.set_state(stored['qpos'][row].astype(np.float64), stored['qvel'][row].astype(np.float64))
        # States are stored as float32: shading may differ by a level or two.
        differences = simulator.compute_observation().astype(int) - stored['observations'][row]
        assert np.abs(differences).max() <= 4
    one, other = stored['observations'][[0, LENGTH + 1]].astype(int)
    assert (np.abs(one - other) > 4).mean() > 0.05
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize('domain', DOMAINS)
def test_observations_are_stacked_frames(domain):
    task = f'{domain}-play-singletask-task1-v0'
    plain, stacked = envs.make_env(task, render_mode='rgb_array'), envs.make_env(task, frame_stack=3)
    frames = [plain.reset(seed=4)[0]]
    frames += [plain.step(action)[0] for action in np.full((3, 5), 0.7, np.float32)]
    observations = [stacked.reset(seed=4)[0]]
    observations += [stacked.step(action)[0] for action in np.full((3, 5), 0.7, np.float32)]
    assert frames[0].shape == plain.observation_space.shape == (64, 64, 3)
    assert stacked.observation_space.shape == (64, 64, 9)
    assert observations[0].dtype == stacked.observation_space.dtype == frames[0].dtype == np.uint8
    assert not np.array_equal(frames[3], frames[2])
    # The data set's own stacking, of the same frames.
    raw = {
        'observations': np.array(frames),
        'actions': np.zeros((4, 5), np.float32),
        'terminals': np.arange(4) == 3,
    }
    dataset = Dataset.create(raw, Normalizer('none'), frame_stack=3)
    np.testing.assert_array_equal(observations, gather_observations(dataset, np.arange(4)))
    picture = plain.render()
    assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[::4, ::4], frames[3])
    np.testing.assert_array_equal(plain.reset(seed=4)[0], frames[0])  # Rendering the picture has changed no setting.
    assert len(plain.render()) == 256
    for env in (plain, stacked):
        env.close()


def test_state_tasks_have_no_frames_to_stack():
    with pytest.raises(UserError, match='state observations'):
        envs.make_env('scene-play-singletask-task1-v0', frame_stack=3)


def test_images_are_labelled_from_states_and_need_no_renderer(tmp_path, monkeypatch):
    """Rewards are the state task's, for the same qpos, on a machine that can render nothing."""
    monkeypatch.setattr(rendering, 'require_backend', lambda: pytest.fail('a renderer was asked for'))
    rows = 6
    rng = np.random.default_rng(0)
    qpos = rng.uniform(-0.5, 0.5, (rows, 21)).astype(np.float32)
    simulator = envs.make_env('cube-single-play-singletask-task1-v0').unwrapped
    qpos[2, 14:17] = simulator.task_infos[0]['goal_xyzs'][0]
    images = rng.integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8)
    stored = {'actions': np.zeros((rows, 5), np.float32), 'terminals': np.arange(rows) == rows - 1, 'qpos': qpos}
    np.savez(data.dataset_path(tmp_path, DOMAIN, 'finetuning', 'train'), observations=images, **stored)
    raw = data.load_raw(TASK, 'finetuning', 'train', tmp_path)
    np.testing.assert_array_equal(raw['rewards'], [-1, -1, 0, -1, -1, -1])
    np.testing.assert_array_equal(raw['masks'], [1, 1, 0, 1, 1, 1])
    np.testing.assert_array_equal(raw['observations'], images)


def test_images_must_be_bytes(tmp_path):
    path = data.dataset_path(tmp_path, DOMAIN, 'pretraining', 'train')
    rows = 3
    stored = {'actions': np.zeros((rows, 5), np.float32), 'terminals': np.arange(rows) == rows - 1}
    np.savez(path, observations=np.zeros((rows, 64, 64, 3), np.float32), **stored)
    with pytest.raises(UserError, match='uint8'):
        data.load_raw(TASK, 'pretraining', 'train', tmp_path)
    np.savez(path, observations=np.zeros((rows, 28), np.float32), **stored)
    with pytest.raises(UserError, match='another environment'):
        data.load_raw(TASK, 'pretraining', 'train', tmp_path)


# ---------------------------------------------------------------------------------------------- finding a renderer


@dataclasses.dataclass
class Machine:
    """Back ends that work, and those that were tried."""

    working: set
    tried: list

    def attempt(self, backend):
        self.tried.append(backend)
        return None if backend in self.working else 'it is broken'


@pytest.fixture
def machine(monkeypatch):
    """A machine without a display on which nothing has been tried yet."""
    for name in ('MUJOCO_GL', rendering.WORKING, 'DISPLAY', 'WAYLAND_DISPLAY'):
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, 'mujoco', raising=False)
    monkeypatch.setattr(rendering, '_chosen_by_us', False)
    machine = Machine(set(), [])
    monkeypatch.setattr(rendering, '_try', machine.attempt)
    return machine


def test_the_first_back_end_that_works_is_used(machine):
    machine.working = {'osmesa'}
    rendering.prefer_backend()
    assert rendering.require_backend() == os.environ['MUJOCO_GL'] == 'osmesa'
    assert machine.tried == ['egl', 'osmesa']
    assert rendering.require_backend() == 'osmesa' and len(machine.tried) == 2, 'once is enough'


def test_what_the_user_has_set_is_not_replaced(machine, monkeypatch):
    machine.working = {'osmesa'}
    monkeypatch.setenv('MUJOCO_GL', 'egl')
    rendering.prefer_backend()
    with pytest.raises(UserError, match='MUJOCO_GL=egl: it is broken'):
        rendering.require_backend()
    assert machine.tried == ['egl'] and os.environ['MUJOCO_GL'] == 'egl'


def test_no_renderer_is_one_line_that_says_what_to_install(machine):
    rendering.prefer_backend()
    with pytest.raises(UserError, match=r'egl: it is broken; .*osmesa: it is broken.*apt install libegl1'):
        rendering.require_backend()


def test_the_command_without_a_renderer(tmp_path):
    """MuJoCo with rendering disabled stands for a machine without any driver."""
    command = [sys.executable, '-m', 'envs.collect_ogbench', f'--env_name={DOMAIN}-v0', f'--dataset_dir={tmp_path}']
    environment = {name: value for name, value in os.environ.items() if name != rendering.WORKING}
    result = subprocess.run(
        command, cwd=ROOT, env=environment | {'MUJOCO_GL': 'disable'}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert 'images cannot be rendered on this machine (MUJOCO_GL=disable: ' in result.stderr
    assert not list(tmp_path.iterdir())
