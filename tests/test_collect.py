"""Collecting play data: determinism, interruption, what is in the way, what is in the files. Episodes are short."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import envs
from envs import collect_ogbench, data, episode_parts, play
from tests.waiting import wait_until
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
TASK = 'cube-single-play-singletask-task1-v0'
LENGTH = 120
EPISODES = {'train': 6, 'val': 2}
NAMES = {'train': 'cube-single-play-v0.npz', 'val': 'cube-single-play-v0-val.npz'}
PATIENCE_SECONDS = 600  # Only a hang takes as long, even on a machine that is busy with other things.


def command(folder, **settings):
    settings = {
        'env_name': 'cube-single-v0',
        'split': 'pretrain',
        'num_episodes': EPISODES['train'],
        'val_episodes': EPISODES['val'],
        'seed': 5,
        'workers': 2,
        'episode_length': LENGTH,
        'dataset_dir': folder,
    } | settings
    return [sys.executable, '-m', 'envs.collect_ogbench', *(f'--{name}={value}' for name, value in settings.items())]


def run(folder, **settings):
    return subprocess.run(
        command(folder, **settings), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def arrays(path):
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


@contextlib.contextmanager
def interrupted_run(folder, parts=2, **settings):
    """A real process, caught when some episodes are finished and others are not. Nothing of it is left afterwards."""
    process = subprocess.Popen(
        command(folder, **settings), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def has_parts_or_ended():
        return len(list(folder.glob('*.parts/*.npz'))) >= parts or process.poll() is not None

    try:
        wait_until(has_parts_or_ended, 'episodes', PATIENCE_SECONDS)
        assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.wait()


def children(pid):
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def is_running(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')')[-1].split()[0] != 'Z'
    except OSError:
        return False


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    """The files of one uninterrupted run with one worker; not to be changed."""
    folder = tmp_path_factory.mktemp('reference')
    result = run(folder, workers=1)
    assert result.returncode == 0, result.stderr
    assert set(contents(folder)) == set(NAMES.values())
    return folder


def test_the_file_is_the_published_format(reference):
    for file, name in NAMES.items():
        stored = arrays(reference / name)
        rows = EPISODES[file] * (LENGTH + 1)
        shapes = {'observations': (28,), 'actions': (5,), 'qpos': (21,), 'qvel': (20,), 'terminals': ()}
        assert set(stored) == {*shapes, 'metadata'}
        for key, shape in shapes.items():
            assert stored[key].shape == (rows, *shape)
            assert stored[key].dtype == (bool if key == 'terminals' else np.float32)
        assert np.abs(stored['actions']).max() <= 1
        np.testing.assert_array_equal(np.flatnonzero(stored['terminals']), np.arange(LENGTH, rows, LENGTH + 1))


def test_the_file_says_how_it_was_made(reference):
    metadata = data.load_raw(TASK, 'pretraining', 'train', reference)['source']['metadata']
    assert metadata['env_name'] == 'cube-single-v0' and metadata['split'] == 'pretrain'
    assert (metadata['seed'], metadata['episodes'], metadata['episode_length']) == (5, 6, LENGTH)
    assert set(metadata['versions']) >= {'ogbench', 'mujoco', 'numpy'}


def test_ogbenchs_own_loader_reads_the_same_transitions(reference):
    from ogbench.utils import load_dataset

    theirs = load_dataset(reference / NAMES['train'], add_info=True)
    ours = data.load_raw(TASK, 'pretraining', 'train', reference)
    inside = ~ours['terminals']
    np.testing.assert_array_equal(theirs['observations'], ours['observations'][inside])
    np.testing.assert_array_equal(theirs['actions'], ours['actions'][inside])
    np.testing.assert_array_equal(theirs['next_observations'], ours['observations'][np.flatnonzero(inside) + 1])


def test_rows_are_what_the_simulator_does(reference):
    """From a row's state, the row's action leads to the next row's state (up to the storing of states as float32)."""
    stored = arrays(reference / NAMES['train'])
    simulator = envs.make_env(TASK).unwrapped
    simulator.reset(seed=0)
    rows = range(4, 50, 9)
    for row in rows:
        simulator.set_state(stored['qpos'][row].astype(np.float64), stored['qvel'][row].astype(np.float64))
        observation = simulator.compute_observation()
        # All but the gripper's contact force and joints' driven state follow from positions and velocities.
        np.testing.assert_allclose(observation[:12], stored['observations'][row][:12], atol=1e-5)
        np.testing.assert_allclose(observation[19:], stored['observations'][row][19:], atol=1e-4)
        simulator.step(stored['actions'][row])
        moved = simulator.compute_ob_info()['qpos'][:6]
        np.testing.assert_allclose(moved, stored['qpos'][row + 1][:6], atol=0.02)


def test_episodes_differ_between_files_and_splits(reference):
    seeds = {
        collect_ogbench.episode_seed(seed, split, file, index)
        for seed in range(3) for split in ('pretrain', 'finetune') for file in ('train', 'val') for index in range(4)
    }  # fmt: skip
    assert len(seeds) == 3 * 2 * 2 * 4
    train, val = arrays(reference / NAMES['train'])['qpos'], arrays(reference / NAMES['val'])['qpos']
    starts = np.concatenate([train[:: LENGTH + 1], val[:: LENGTH + 1]])
    assert len(np.unique(starts, axis=0)) == EPISODES['train'] + EPISODES['val']


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(reference, tmp_path):
    result = run(tmp_path, workers=3)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path) == contents(reference)
    assert re.search(r'\d+ transitions in [\d.]+ s', result.stdout) and '100%' in result.stderr


def test_the_same_command_again_is_quick_and_changes_nothing(reference):
    before = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    result = run(reference, workers=1)
    assert result.returncode == 0 and result.stdout.count('already there') == 2
    assert {path: path.stat().st_mtime_ns for path in reference.iterdir()} == before


@pytest.mark.slow
def test_killed_and_continued_equals_uninterrupted(reference, tmp_path):
    with interrupted_run(tmp_path) as process:
        workers = children(process.pid)
        assert len(workers) >= 2
        process.kill()  # -9: it cannot clean up.
        process.wait()
        wait_until(
            lambda: not any(is_running(worker) for worker in workers),
            'the workers of a killed command',
            PATIENCE_SECONDS,
        )
    assert not list(tmp_path.glob('*.npz'))
    finished = sorted(tmp_path.glob('*.parts/*.npz'))
    finished[0].write_bytes(finished[0].read_bytes()[:1000])  # As a power cut might leave it.
    (finished[0].parent / '000003.99.tmp').write_bytes(b'half an episode')
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr
    assert f'continuing: {len(finished) - 1} of 8 episodes are already there' in result.stdout
    assert contents(tmp_path) == contents(reference)


def test_a_worker_that_dies_stops_it_in_one_line(tmp_path):
    with interrupted_run(tmp_path, parts=1) as process:
        for child in children(process.pid):
            if 'spawn_main' in Path(f'/proc/{child}/cmdline').read_text():
                os.kill(child, signal.SIGKILL)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2
    assert 'ended with code -9' in errors.splitlines()[-1] and 'Traceback' not in errors


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_in_one_line(tmp_path, number):
    with interrupted_run(tmp_path, parts=1) as process:
        workers = children(process.pid)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 128 + number
        wait_until(
            lambda: not any(is_running(worker) for worker in workers),
            'the workers of a stopped command',
            PATIENCE_SECONDS,
        )
    assert 'the same command continues' in errors and 'Traceback' not in errors
    assert list(tmp_path.glob('*.parts/*.npz')) and not list(tmp_path.glob('*.npz'))


def test_a_file_of_other_settings_is_in_the_way(reference, tmp_path):
    (tmp_path / NAMES['train']).write_bytes((reference / NAMES['train']).read_bytes())
    before = contents(tmp_path)
    for settings, message in (({'seed': 6}, 'seed 5 instead of 6'), ({'num_episodes': 7}, 'episodes 6 instead of 7')):
        result = run(tmp_path, **settings)
        assert result.returncode == 2 and message in result.stderr and '--overwrite' in result.stderr
    assert contents(tmp_path) == before
    np.savez(tmp_path / NAMES['train'], observations=np.zeros((3, 28)))  # As if downloaded.
    result = run(tmp_path)
    assert result.returncode == 2 and 'downloaded' in result.stderr
    # Told to overwrite, it does; and parts that an interrupted command of other settings left are not mixed in.
    folder = episode_parts.EpisodeParts(tmp_path / NAMES['val'], {'seed': 4}).folder
    episode_parts.write_part(folder, 0, {'observations': np.zeros((9, 28), np.float32)})
    result = run(tmp_path, num_episodes=1, val_episodes=1, episode_length=2, overwrite=True, workers=1)
    assert result.returncode == 0, result.stderr
    assert 'starting over' in result.stdout
    assert set(contents(tmp_path)) == set(NAMES.values())
    assert all(len(arrays(tmp_path / name)['terminals']) == 3 for name in NAMES.values())


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'num_episodes': 0}, 'num_episodes'),
        ({'val_episodes': -1}, 'val_episodes'),
        ({'workers': 0}, 'workers'),
        ({'seed': -1}, 'seed'),
        ({'episode_length': 0}, 'episode_length'),
        ({'seed': 'x'}, 'seed'),
        ({'split': 'test'}, 'split'),
        ({'env_name': 'cube-singel-v0'}, 'did you mean cube-single-v0'),
        ({'env_name': 'cheetah'}, 'expected one of cube-single-v0'),
        ({'nonsense': 1}, 'nonsense'),
    ],
)
def test_bad_flags_are_one_line(tmp_path, settings, message):
    result = run(tmp_path, **settings)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr, result.stderr
    assert not contents(tmp_path)


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    result = run(tmp_path / 'file' / 'data')
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert str(tmp_path / 'file') in result.stderr


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    limited = ['bash', '-c', 'ulimit -f 8; exec "$@"', 'bash', *command(tmp_path)]  # Files of at most 8 KiB.
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert result.stderr.splitlines()[-1].startswith('error: File too large')
    assert not list(tmp_path.glob('*.npz')) and not list(tmp_path.glob('*.parts/*.npz'))
    assert not list(tmp_path.glob('*.parts/*.tmp'))


def test_two_commands_do_not_make_the_same_file(tmp_path):
    held = episode_parts.EpisodeParts(tmp_path / NAMES['train'], {})
    with pytest.raises(UserError, match='another process'):
        episode_parts.EpisodeParts(tmp_path / NAMES['train'], {})
    held.close()
    episode_parts.EpisodeParts(tmp_path / NAMES['train'], {}).close()


def test_the_parts_of_a_finished_file_are_removed_and_no_others(tmp_path, monkeypatch):
    target, versions = tmp_path / 'a.npz', {'versions': {'numpy': '1'}}
    rows = {'observations': np.zeros((3, 28), np.float32)}

    def parts(settings, indices):
        made = episode_parts.EpisodeParts(target, settings | versions)
        for index in indices:
            episode_parts.write_part(made.folder, index, rows)
        return made

    killed = parts({'seed': 4}, (0, 1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(episode_parts.shutil, 'rmtree', lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        killed.join(2, {'seed': 4, 'episodes': 2} | versions)  # Killed when the file has its name.
    assert target.exists() and killed.folder.exists()
    episode_parts.discard_joined(target)
    assert killed.folder.exists()  # In use.
    killed.close()
    episode_parts.discard_joined(target)
    assert list(tmp_path.iterdir()) == [target]
    for settings, indices in (({'seed': 5}, (0,)), ({'seed': 4}, (0, 1, 2))):  # On the way to another file.
        parts(settings, indices).close()
        episode_parts.discard_joined(target)
        assert killed.folder.exists()
    (killed.folder / 'settings.json').unlink()
    (killed.folder / '000002.npz').unlink()
    episode_parts.discard_joined(target)  # The removal itself was cut off.
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize('domain', ['cube-double', 'scene', 'puzzle-4x4'])
def test_play_in_the_other_domains(domain):
    scripted_play = play.ScriptedPlay(f'{domain}-v0')
    episode = scripted_play.episode((0, 1), rows=60)
    expected = {'cube-double': (37, 28), 'scene': (40, 25), 'puzzle-4x4': (83, 30)}[domain]
    assert (episode['observations'].shape, episode['qpos'].shape) == ((60, expected[0]), (60, expected[1]))
    buttons = {'scene': 2, 'puzzle-4x4': 16}.get(domain)
    assert ('button_states' in episode) == (buttons is not None)
    if buttons:
        assert episode['button_states'].shape == (60, buttons) and episode['button_states'].dtype == np.int64
    if domain == 'puzzle-4x4':
        assert episode['observations'][20:, 17].min() > 0.8 * 3  # The gripper closes, and stays closed.
    # Episodes do not depend on the ones before them.
    scripted_play.episode((9, 9), rows=90)
    again = scripted_play.episode((0, 1), rows=60)
    for name, values in episode.items():
        np.testing.assert_array_equal(again[name], values)


def test_a_scene_whose_cube_is_lost_is_drawn_again(monkeypatch):
    scripted_play = object.__new__(play.ScriptedPlay)
    scripted_play._domain = 'scene'
    attempts = []

    def attempt(seed, rows):
        attempts.append(tuple(seed.entropy))
        qpos = np.zeros((rows, 25), np.float32)
        # Right of the table; left of it on the floor; left of it in the drawer, where it may be.
        qpos[3, 15], qpos[3, 16] = [(0.3, 0.02), (-0.35, 0.02), (-0.35, 0.066)][len(attempts) - 1]
        return {'qpos': qpos}

    monkeypatch.setattr(scripted_play, '_attempt', attempt, raising=False)
    scripted_play.episode((1, 2), rows=5)
    assert attempts == [(1, 2, 0), (1, 2, 1), (1, 2, 2)]


def test_finetuning_data_are_labelled(tmp_path):
    result = run(tmp_path, split='finetune', num_episodes=1, val_episodes=1, episode_length=40, workers=1)
    assert result.returncode == 0, result.stderr
    assert set(contents(tmp_path)) == {'cube-single-play-ft-v0.npz', 'cube-single-play-ft-v0-val.npz'}
    raw = data.load_raw(TASK, 'finetuning', 'val', tmp_path)
    assert set(np.unique(raw['rewards'])) <= {-1.0, 0.0} and len(raw['rewards']) == 41
    np.testing.assert_array_equal(raw['masks'], (raw['rewards'] < 0).astype(np.float32))


def test_the_default_folder_is_ogbenchs_own():
    from ogbench.utils import DEFAULT_DATASET_DIR

    assert data.DEFAULT_DATASET_DIR == DEFAULT_DATASET_DIR
    path = data.dataset_path(DEFAULT_DATASET_DIR, 'scene', 'pretraining', 'train')
    assert str(path) == os.path.expanduser('~/.ogbench/data/scene-play-v0.npz')
