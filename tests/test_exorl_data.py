"""ExORL's data from episode files to the arrays that training reads: splitting, labelling, loading, and what is wrong
with a file. Episodes are short."""
# ruff: noqa: F811 (imported fixtures are arguments of the same name)

import tracemalloc

import numpy as np
import pytest

import envs
from envs import convert_exorl, data, episode_parts, exorl_episodes
from tests.tiny_exorl import SIZES, STEPS, copy_of, episodes_of, jobs_in_this_process, raw  # noqa: F401 (fixtures)
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures('jobs_in_this_process')


def convert(raw, folder, tasks=('run',), sizes=SIZES, **options):
    return convert_exorl.convert('cheetah', list(tasks), 'rnd', str(raw), str(folder), sizes=sizes, **options)


# --- Format ---


def test_an_episode_is_exorls_format(raw):
    paths = exorl_episodes.list_episodes(exorl_episodes.buffer_path(raw, 'cheetah', 'rnd'))
    assert [path.name for path in paths] == [f'episode_{index:06d}_{STEPS}.npz' for index in range(10)]
    episode = episodes_of(raw)[0]
    shapes = {'observation': 17, 'action': 6, 'reward': 1, 'discount': 1, 'physics': 18}
    assert {name: array.shape for name, array in episode.items()} == {
        name: (STEPS + 1, width) for name, width in shapes.items()
    }
    assert not episode['action'][0].any() and episode['reward'][0] == 0 and (episode['discount'] == 1).all()


def test_a_row_belongs_to_the_step_that_led_to_it(raw):
    env = envs.make_env('cheetah_run')
    for index in (0, 7):
        episode = episodes_of(raw)[index]
        np.testing.assert_array_equal(env.reset(seed=index)[0], episode['observation'][0])
        for row in range(1, STEPS + 1):
            observation, reward, *_ = env.step(episode['action'][row])
            np.testing.assert_array_equal(observation, episode['observation'][row])
            np.testing.assert_array_equal(env.physics.get_state(), episode['physics'][row])
            assert np.float32(reward) == episode['reward'][row, 0]


def test_sets_are_disjoint_and_in_the_order_of_the_files(raw, tmp_path):
    paths = convert(raw, tmp_path)
    assert [path.name for path in paths] == [
        'exorl-cheetah.npz',
        'exorl-cheetah_run-ft.npz',
        'exorl-cheetah_run-ft-val.npz',
        'exorl-cheetah-val.npz',
    ]
    episodes = episodes_of(raw)
    chosen = {
        ('pretraining', 'train'): episodes[0:5],
        ('finetuning', 'train'): episodes[5:7],
        ('finetuning', 'val'): episodes[7:8],
        ('pretraining', 'val'): episodes[8:9],
    }
    for (phase, split), expected in chosen.items():
        rows = data.load_raw('cheetah_run', phase, split, tmp_path)
        np.testing.assert_array_equal(rows['observations'], np.concatenate([e['observation'] for e in expected]))
        terminals = rows['terminals'].reshape(len(expected), STEPS + 1)
        assert terminals[:, -1].all() and not terminals[:, :-1].any()
        actions = rows['actions'].reshape(len(expected), STEPS + 1, 6)
        for mine, episode in zip(actions, expected, strict=True):
            np.testing.assert_array_equal(mine[:-1], episode['action'][1:])
        assert ('rewards' in rows) == ('masks' in rows) == (phase == 'finetuning')
        if phase == 'finetuning':
            rewards = rows['rewards'].reshape(len(expected), STEPS + 1)
            for mine, episode in zip(rewards, expected, strict=True):
                np.testing.assert_array_equal(mine[:-1], episode['reward'][1:, 0])  # Cheetah's live task is run.
            assert rows['rewards'].dtype == rows['masks'].dtype == np.float32 and (rows['masks'] == 1).all()
            assert np.ptp(rewards) > 0
    cut = data.load_raw('cheetah_run', 'pretraining', 'train', tmp_path, max_transitions=2 * STEPS + 1)
    assert len(cut['terminals']) == 2 * (STEPS + 1) and cut['terminals'][-1]


def test_each_task_has_its_own_labels(raw, tmp_path):
    convert(raw, tmp_path, tasks=['cheetah_run', 'run_backward'])
    forward = data.load_raw('cheetah_run', 'finetuning', 'train', tmp_path)
    backward = data.load_raw('cheetah_run_backward', 'finetuning', 'train', tmp_path)
    np.testing.assert_array_equal(forward['observations'], backward['observations'])
    assert ((forward['rewards'] == 0) | (backward['rewards'] == 0)).all()
    assert forward['rewards'].any() and backward['rewards'].any()
    assert forward['source']['fingerprint'] != backward['source']['fingerprint']


def test_the_files_say_how_they_were_made(raw, tmp_path):
    path = convert(raw, tmp_path)[1]
    metadata = data.load_raw('cheetah_run', 'finetuning', 'train', tmp_path)['source']['metadata']
    assert (metadata['domain'], metadata['task'], metadata['algo']) == ('cheetah', 'cheetah_run', 'rnd')
    assert set(metadata['versions']) >= {'mujoco', 'dm_control', 'numpy'} and metadata['source']
    with np.load(path) as archive:
        assert str(archive['created']).startswith('20')


def test_made_again_nothing_changes_and_other_episodes_are_in_the_way(raw, tmp_path, capsys):
    first = {path: path.stat().st_mtime_ns for path in convert(raw, tmp_path)}
    assert {path: path.stat().st_mtime_ns for path in convert(raw, tmp_path)} == first
    assert capsys.readouterr().out.count('already there') == 4
    with pytest.raises(UserError, match=r'made with other settings .*--overwrite'):
        convert(raw, tmp_path, sizes=(4 * STEPS, *SIZES[1:]))
    fingerprint = data.load_raw('cheetah_run', 'pretraining', 'val', tmp_path)['source']['fingerprint']
    convert(raw, tmp_path, sizes=(4 * STEPS, *SIZES[1:]), overwrite=True)
    assert data.load_raw('cheetah_run', 'pretraining', 'val', tmp_path)['source']['fingerprint'] != fingerprint
    convert(raw, tmp_path, overwrite=True)  # Back again: the content, not the time of making, is what counts.
    assert data.load_raw('cheetah_run', 'pretraining', 'val', tmp_path)['source']['fingerprint'] == fingerprint
    assert not list(tmp_path.glob('.*'))


# --- What is wrong ---


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'sizes': (6 * STEPS, 3 * STEPS, STEPS, STEPS)}, 'holds 10 episodes of 6 transitions.*need 11.*collect_exorl'),
        ({'sizes': (5 * STEPS, STEPS - 1, STEPS, STEPS)}, '--finetuning_size=5: these episodes have 6'),
        ({'tasks': ['fly']}, '--task=fly: cheetah has no such task; expected some of run'),
        ({'tasks': ['run_backwards']}, 'did you mean run_backward'),
    ],
)
def test_what_cannot_be_made_is_refused(raw, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as caught:
        convert(raw, tmp_path, **options)
    assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())


def test_no_episodes_name_the_commands_that_get_them(tmp_path):
    with pytest.raises(UserError, match=r'holds no episodes.*envs\.download_exorl.*envs\.collect_exorl'):
        convert(tmp_path, tmp_path)
    with pytest.raises(UserError, match='--domain=cheetha: no ExORL domain; did you mean cheetah'):
        convert_exorl.convert('cheetha', None, 'rnd', str(tmp_path), str(tmp_path))
    with pytest.raises(UserError, match='--algo'):
        convert_exorl.convert('cheetah', None, '../rnd', str(tmp_path), str(tmp_path))


def changed(name, change):
    def damage(path):
        with np.load(path) as archive:
            arrays = {key: archive[key] for key in archive.files}
        arrays[name] = change(arrays[name])
        np.savez(path, **{key: array for key, array in arrays.items() if array is not None})

    return damage


def with_value(row, value):
    def change(array):
        array = array.copy()
        array[row, 1] = value
        return array

    return change


def shortened(path):
    path.write_bytes(path.read_bytes()[:700])


def bit_flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


# Episode 6 is of the labelled training set.
@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (shortened, 'cannot be read.*damaged'),
        (bit_flipped, 'cannot be read.*damaged'),
        (changed('physics', lambda _: None), 'holds no physics, only'),
        (changed('observation', lambda o: np.zeros((len(o), 24), np.float32)), r'shape \(7, 24\).*another domain'),
        (changed('action', lambda a: a[:-1]), r'action has shape \(6, 6\), but cheetah with 6 steps needs \(7, 6\)'),
        (changed('physics', lambda p: p[:, :-1]), r'physics has shape \(7, 17\)'),
        (changed('observation', with_value(3, np.nan)), 'observation holds a NaN or an infinity, first in row 3'),
        (changed('physics', with_value(2, np.inf)), 'physics holds a NaN or an infinity, first in row 2'),
        (changed('action', with_value(1, 1.5)), 'actions reach 1.5'),
        (changed('observation', lambda o: np.array([None] * len(o))), 'cannot be read'),
    ],
)
def test_a_bad_episode_is_named(raw, tmp_path, damage, message):
    buffer = copy_of(raw, tmp_path / 'raw')
    damage(buffer / f'episode_000006_{STEPS}.npz')
    with pytest.raises(UserError, match=f'episode_000006_{STEPS}.npz.*{message}') as caught:
        convert(tmp_path / 'raw', tmp_path / 'data')
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'data' / 'exorl-cheetah_run-ft.npz').exists() and not list(tmp_path.glob('data/.*'))


@pytest.mark.parametrize(
    ('origin', 'message'),
    [
        ({'made_by': 'python -m envs.collect_exorl', 'policy': 'rnd'}, r'delete it\. rnd .*--pretraining_size'),
        ({'made_by': 'python -m envs.collect_exorl', 'policy': 'ou'}, 'delete it, and fetch or collect it again'),
        (
            {'made_by': 'python -m envs.download_exorl'},
            r'python -m envs\.download_exorl --domain=cheetah --algo=rnd --exorl_dir=.*/raw --overwrite fetches all',
        ),
    ],
)
def test_what_to_do_about_a_bad_episode_depends_on_where_it_came_from(raw, tmp_path, origin, message):
    buffer = copy_of(raw, tmp_path / 'raw')
    exorl_episodes.write_metadata(buffer, origin)
    shortened(buffer / f'episode_000006_{STEPS}.npz')
    with pytest.raises(UserError, match=message) as caught:
        convert(tmp_path / 'raw', tmp_path / 'data')
    assert '\n' not in str(caught.value)


def test_what_to_do_about_too_few_episodes_depends_on_where_they_came_from(raw, tmp_path):
    buffer = copy_of(raw, tmp_path / 'raw')
    for index in (3, 6):
        (buffer / f'episode_{index:06d}_{STEPS}.npz').unlink()
    collected = {'made_by': 'python -m envs.collect_exorl', 'policy': 'rnd', 'seed': 3, 'num_envs': 2}
    for origin, message in (
        (collected, rf'collect_exorl --domain=.* --policy=rnd --seed=3 --num_envs=2 --num_transitions={9 * STEPS}$'),
        ({'made_by': 'python -m envs.download_exorl'}, 'anew with python -m envs.download_exorl .*--overwrite'),
        ({}, 'in another --exorl_dir with python -m envs.collect_exorl'),
    ):
        exorl_episodes.write_metadata(buffer, origin)
        with pytest.raises(UserError, match=rf'ask for less \(--pretraining_size={4 * STEPS}\), or .*{message}'):
            convert(tmp_path / 'raw', tmp_path / 'data')
    convert(tmp_path / 'raw', tmp_path / 'data', sizes=(4 * STEPS, *SIZES[1:]))


def test_one_process_converts_a_domain_and_removes_what_a_killed_one_left(raw, tmp_path):
    leftover = tmp_path / '.exorl-cheetah_run-ft.npz.99.tmp'
    leftover.write_bytes(b'half a set')
    others = tmp_path / '.exorl-walker.npz.99.tmp'
    others.write_bytes(b'half a set')
    with (
        episode_parts.hold(tmp_path / '.exorl-cheetah.lock', 'mine'),
        pytest.raises(UserError, match='another process is converting episodes of cheetah'),
    ):
        convert(raw, tmp_path)
    assert leftover.exists()
    paths = convert(raw, tmp_path)
    assert set(tmp_path.iterdir()) == {*paths, others}


@pytest.mark.parametrize(('steps', 'message'), [(4, '4 steps, where episode_000000_6.npz has 6'), (1, '1 steps; 2')])
def test_episodes_of_another_length_are_named(raw, tmp_path, steps, message):
    buffer = copy_of(raw, tmp_path / 'raw')
    (buffer / f'episode_000006_{STEPS}.npz').rename(buffer / f'episode_000006_{steps}.npz')
    with pytest.raises(UserError, match=f'episode_000006_{steps}.npz: an episode of {message}'):
        convert(tmp_path / 'raw', tmp_path / 'data')


def test_loading_names_what_is_missing_or_wrong(raw, tmp_path):
    with pytest.raises(UserError) as missing:
        data.load_raw('cheetah_walk', 'finetuning', 'val', tmp_path)
    command = f'envs.convert_exorl --domain=cheetah --task=walk --dataset_dir={tmp_path}'
    assert 'exorl-cheetah_walk-ft-val.npz' in str(missing.value) and command in str(missing.value)
    paths = convert(raw, tmp_path)
    paths[1].rename(tmp_path / 'exorl-cheetah_walk-ft.npz')
    with pytest.raises(UserError, match='its task is cheetah_run, not cheetah_walk'):
        data.load_raw('cheetah_walk', 'finetuning', 'train', tmp_path)
    paths[0].rename(tmp_path / 'exorl-walker.npz')
    with pytest.raises(UserError, match=r'exorl-walker\.npz: observations have shape .*24'):
        data.load_raw('walker_run', 'pretraining', 'train', tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:300])
    with pytest.raises(UserError, match=r'cannot be read.*convert_exorl'):
        data.load_raw('cheetah_run', 'finetuning', 'val', tmp_path)
    with np.load(paths[3]) as archive:
        arrays = {name: archive[name] for name in archive.files}
    rows = len(arrays['terminals'])
    for rewards, message in (
        (None, 'holds no rewards'),
        (np.zeros(rows - 1, np.float32), 'rewards have shape'),
        (np.full(rows, np.nan, np.float32), 'rewards hold a NaN'),
        (np.full(rows, 1e300), 'rewards hold a NaN or an infinity'),
        (np.full(rows, '1.0'), 'rewards are of type <U3'),
    ):
        labelled = arrays if rewards is None else arrays | {'rewards': rewards}
        np.savez(tmp_path / 'exorl-cheetah_run-ft.npz', **labelled)
        with pytest.raises(UserError, match=message):
            data.load_raw('cheetah_run', 'finetuning', 'train', tmp_path)


def test_memory_does_not_grow_with_the_number_of_episodes(tmp_path, monkeypatch):
    """But for one number a label, which the output holds, too, and the names of the files."""
    steps = 300
    buffer = exorl_episodes.buffer_path(tmp_path, 'cheetah', 'rnd')
    buffer.mkdir(parents=True)
    rows = np.zeros((steps + 1, 17), np.float32)
    for index in range(132):
        episode = {'observation': rows, 'action': rows[:, :6], 'physics': np.zeros((steps + 1, 18))}
        exorl_episodes.write_episode(buffer, index, episode)
    labels = np.zeros(steps + 1, np.float32)
    monkeypatch.setattr(convert_exorl, 'make_labeller', lambda _: lambda job: {task: labels.copy() for task in job[1]})
    peaks = []
    for number, count in enumerate((12, 12, 120)):  # The first call pays for imports.
        sizes = (count * steps, 4 * steps, steps, steps)
        tracemalloc.start()
        convert(tmp_path, tmp_path / f'data{number}', sizes=sizes)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / 'data2' / 'exorl-cheetah.npz').stat().st_size > 3_000_000
    assert peaks[2] < peaks[1] + 100_000
