"""A user's own data: what is read from npz, HDF5 and Minari, what is refused, and the example of the documentation."""

import os
import re
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import h5py
import numpy as np
import pytest

import envs
from envs import custom, custom_files
from utils import runs
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def make_arrays(lengths=(3, 4, 2), **replaced):
    """Episodes of so many rows; observation (e, t) and action 0.1·t in row t of episode e."""
    rows = [(episode, t, t == length - 1) for episode, length in enumerate(lengths) for t in range(length)]
    steps = np.array([t for _, t, _ in rows], float)
    arrays = {
        'observations': np.array([(episode, t) for episode, t, _ in rows], float),
        'actions': 0.1 * steps[:, None],
        'terminals': np.array([last for _, _, last in rows]),
        'rewards': steps,
        'masks': 1.0 - np.array([t == 1 and not last for _, t, last in rows]),
    }
    arrays |= replaced
    return {name: array for name, array in arrays.items() if array is not None}


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def nan_at(shape, row):
    array = np.zeros(shape)
    array[row] = np.nan
    return array


def test_npz_and_hdf5_hold_the_same_and_the_last_episodes_are_for_validation(tmp_path):
    arrays = make_arrays()
    npz = write_npz(tmp_path / 'mine.npz', **arrays)
    with h5py.File(tmp_path / 'mine.hdf5', 'w') as file:
        for name, array in arrays.items():
            file[name] = array
    for path in (npz, str(tmp_path / 'mine.hdf5')):
        spec = envs.task_spec('none', path)
        assert (spec.name, spec.observation_shape, spec.action_size) == ('custom-mine', (2,), 1)
        train = custom.load_raw(path, 'finetuning', 'train')
        validation = custom.load_raw(path, 'finetuning', 'val')
        np.testing.assert_array_equal(train['observations'], arrays['observations'][:7])
        np.testing.assert_array_equal(validation['observations'], [[2, 0], [2, 1]])
        np.testing.assert_array_equal(train['rewards'], [0, 1, 0, 0, 1, 2, 0], 'a final state has none')
        np.testing.assert_array_equal(train['masks'], [1, 0, 1, 1, 0, 1, 1])
        assert train['terminals'].tolist() == [False, False, True, False, False, False, True]
        assert {array.dtype.name for name, array in train.items() if name not in ('terminals', 'source')} == {'float32'}
        assert (train['source']['rows'], train['source']['episodes']) == (7, 2)
    fingerprints = {custom.load_raw(path, 'finetuning', 'train')['source']['fingerprint'] for path in (npz, path)}
    assert len(fingerprints) == 1, 'the same data'
    assert validation['source']['fingerprint'] not in fingerprints


def test_a_tenth_of_the_episodes_is_for_validation(tmp_path):
    path = write_npz(tmp_path / 'mine.npz', **make_arrays(lengths=(2,) * 30))
    assert custom.load_raw(path, 'pretraining', 'train')['source']['episodes'] == 27
    validation = custom.load_raw(path, 'pretraining', 'val')
    assert sorted(set(validation['observations'][:, 0])) == [27, 28, 29]


def test_pretraining_sees_no_reward(tmp_path):
    path = write_npz(tmp_path / 'mine.npz', **make_arrays(rewards=np.full(9, np.nan)))
    raw = custom.load_raw(path, 'pretraining', 'train')
    assert not {'rewards', 'masks'} & raw.keys()


def test_masks_are_one_where_the_file_has_none(tmp_path):
    path = write_npz(tmp_path / 'mine.npz', **make_arrays(masks=None))
    assert (custom.load_raw(path, 'finetuning', 'train')['masks'] == 1).all()


def test_size_is_cut_between_episodes(tmp_path):
    path = write_npz(tmp_path / 'mine.npz', **make_arrays(lengths=(3, 3, 3, 3)))
    for size, episodes in ((2, 1), (3, 1), (4, 2), (100, 3)):
        assert custom.load_raw(path, 'pretraining', 'train', size)['source']['episodes'] == episodes
    with pytest.raises(UserError, match='first episode has 2 transitions, and only 1 were wanted'):
        custom.load_raw(path, 'pretraining', 'train', 1)


def test_next_observations_give_the_final_states(tmp_path):
    """Transitions (0→1→2) and (10→11), and a validation episode."""
    path = write_npz(
        tmp_path / 'transitions.npz',
        observations=np.array([[0.0], [1], [10], [20]]),
        next_observations=np.array([[1.0], [2], [11], [21]]),
        actions=np.array([[0.1], [0.2], [0.3], [0.4]]),
        rewards=np.array([1.0, 2, 3, 4]),
        masks=np.array([1.0, 0, 1, 1]),
        terminals=np.array([0, 1, 1, 1]),
    )
    raw = custom.load_raw(path, 'finetuning', 'train')
    np.testing.assert_array_equal(raw['observations'][:, 0], [0, 1, 2, 10, 11])
    assert raw['terminals'].tolist() == [False, False, True, False, True]
    np.testing.assert_array_equal(raw['rewards'], [1, 2, 0, 3, 0])
    np.testing.assert_allclose(raw['actions'][:, 0], [0.1, 0.2, 0, 0.3, 0])
    np.testing.assert_array_equal(custom.load_raw(path, 'finetuning', 'val')['observations'][:, 0], [20, 21])


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as a warning, in a list."""
    logged = []
    custom_files.warn_once.cache_clear()
    monkeypatch.setattr(custom_files.logging, 'warning', logged.append)
    return logged


def make_transitions(**replaced):
    """Transitions (0→1→2, terminated), (10→11→12, cut off), and a validation episode."""
    states = np.array([0.0, 1, 10, 11, 20])[:, None]
    arrays = {
        'observations': 0.1 * states,
        'next_observations': 0.1 * (states + 1),
        'actions': np.full((5, 1), 0.5),
        'rewards': np.ones(5),
        'terminals': np.array([0, 1, 0, 0, 1]),
        'timeouts': np.array([0, 0, 0, 1, 0]),
    }
    arrays |= replaced
    return {name: array for name, array in arrays.items() if array is not None}


@pytest.mark.parametrize('cut_off', ['timeouts', 'truncations'])
@pytest.mark.parametrize(('masks', 'expected'), [(None, [1, 0, 1, 1]), (np.array([1.0, 1, 0, 1, 1]), [1, 1, 0, 1])])
def test_a_cut_off_ends_an_episode_and_terminates_nothing(tmp_path, cut_off, masks, expected):
    arrays = make_transitions(masks=masks)
    arrays[cut_off] = arrays.pop('timeouts')
    raw = custom.load_raw(write_npz(tmp_path / 'd4rl.npz', **arrays), 'finetuning', 'train')
    np.testing.assert_allclose(raw['observations'][:, 0], [0, 0.1, 0.2, 1, 1.1, 1.2], rtol=1e-6)
    assert raw['terminals'].tolist() == [False, False, True] * 2
    np.testing.assert_array_equal(raw['masks'][~raw['terminals']], expected)


@pytest.mark.parametrize(
    ('replaced', 'split', 'message'),
    [
        # Only true terminations are marked.
        ({'terminals': np.array([0, 0, 0, 1, 1]), 'timeouts': None}, 'train', 'row 1 are not the .* of row 2'),
        ({'terminals': np.array([0, 1, 1, 0, 1]), 'timeouts': None}, 'val', 'row 3 are not the .* of row 4'),
        ({'next_observations': np.array([[0.11], [0.2], [1.1], [1.2], [2.1]])}, 'train', 'row 0 are not .* of row 1'),
        ({'terminals': np.array([0, 1, 0, 1, 1])}, 'train', 'true wherever timeouts are.*expected.*or masks'),
        ({'rewards': nan_at(5, 3)}, 'train', 'rewards hold a NaN or an infinity, first in row 3'),
        ({'next_observations': nan_at((5, 1), 4)}, 'val', 'next_observations hold a NaN .*, first in row 4'),
        ({'timeouts': np.zeros((5, 1))}, 'train', r'timeouts have shape \(5, 1\)'),
        ({'timeouts': nan_at(5, 2)}, 'train', 'timeouts hold a NaN or an infinity, first in row 2'),
    ],
)
def test_transitions_that_contradict_themselves_are_refused(tmp_path, replaced, split, message):
    path = write_npz(tmp_path / 'mine.npz', **make_transitions(**replaced))
    with pytest.raises(UserError, match=rf'mine\.npz.*{message}'):
        custom.load_raw(path, 'finetuning', split)


def test_cut_offs_that_say_nothing_new_change_nothing(tmp_path):
    """Final states whose rows `terminals` mark already; and transitions that only limits end, whose masks are 1."""
    arrays = make_arrays()
    raw, known = (
        custom.load_raw(write_npz(tmp_path / f'{name}.npz', **arrays, **more), 'finetuning', 'train')
        for name, more in (
            ('plain', {}),
            ('more', {'timeouts': arrays['terminals'], 'truncations': 0 * arrays['terminals']}),
        )
    )
    assert raw.keys() == known.keys()
    for name in raw.keys() - {'source'}:
        np.testing.assert_array_equal(raw[name], known[name])
    ends = np.array([0, 1, 0, 1, 1])
    path = write_npz(tmp_path / 'limits.npz', **make_transitions(terminals=ends, timeouts=ends))
    limited = custom.load_raw(path, 'finetuning', 'train')
    assert limited['masks'][~limited['terminals']].all()


def test_transitions_stored_with_another_rounding_follow_each_other(tmp_path):
    arrays = make_transitions()
    arrays['observations'] = arrays['observations'].astype(np.float32)
    custom.load_raw(write_npz(tmp_path / 'mine.npz', **arrays), 'finetuning', 'train')


def test_arrays_in_column_order_are_read(tmp_path):
    arrays = make_arrays()
    path = write_npz(tmp_path / 'mine.npz', **arrays | {'observations': np.asfortranarray(arrays['observations'])})
    raw = custom.load_raw(path, 'pretraining', 'train')
    np.testing.assert_array_equal(raw['observations'], arrays['observations'][:7])


def test_transitions_without_final_states_are_refused(tmp_path):
    path = write_npz(tmp_path / 'mine.npz', **make_transitions(next_observations=None))
    with pytest.raises(UserError, match=r'where timeouts are true and terminals are not.*like transitions.*add next_'):
        custom.load_raw(path, 'pretraining', 'train')
    terminals = make_arrays()['terminals']
    path = write_npz(tmp_path / 'mine.npz', **make_arrays(masks=1.0 - terminals))
    for phase in ('pretraining', 'finetuning'):
        with pytest.raises(UserError, match=r'in 2 of 2 episodes the last row has .* a mask of 0.*add next_'):
            custom.load_raw(path, phase, 'train')


@pytest.mark.parametrize('padding', ['zeros', 'the row before'])
def test_padded_final_states_are_no_transitions(tmp_path, padding):
    arrays = make_arrays()
    last = np.flatnonzero(arrays['terminals'])
    for name in ('actions', 'rewards', 'masks'):
        arrays[name][last] = 0 if padding == 'zeros' else arrays[name][last - 1]
    raw = custom.load_raw(write_npz(tmp_path / 'mine.npz', **arrays), 'finetuning', 'train')
    assert raw['masks'].tolist() == [1, 0, 1, 1, 0, 1, 1]


def test_rewards_of_final_states_are_warned_of_once(tmp_path, warnings):
    path = write_npz(tmp_path / 'mine.npz', **make_arrays())
    for phase in ('pretraining', 'finetuning'):
        custom.load_raw(path, phase, 'train')
    assert len(warnings) == 1 and 'mine.npz: the last row of most episodes has an action and a reward' in warnings[0]
    rewards = make_arrays()['rewards'] * ~make_arrays()['terminals']
    custom.load_raw(write_npz(tmp_path / 'zero.npz', **make_arrays(rewards=rewards)), 'finetuning', 'train')
    assert len(warnings) == 1


@pytest.mark.parametrize('anything', [np.nan, np.inf, -7.0])
def test_final_states_have_any_action_reward_and_mask(tmp_path, anything):
    arrays = make_arrays()
    for name in ('actions', 'rewards', 'masks'):
        arrays[name][arrays['terminals']] = anything
    raw = custom.load_raw(write_npz(tmp_path / 'mine.npz', **arrays), 'finetuning', 'train')
    for name, blank in (('actions', 0), ('rewards', 0), ('masks', 1)):
        assert (raw[name][raw['terminals']] == blank).all()
    np.testing.assert_allclose(raw['actions'][:, 0], [0, 0.1, 0, 0, 0.1, 0.2, 0], rtol=1e-6)


def peak_of(function):
    """(what the function returns, the most bytes held at a time while it ran)."""
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize('suffix', ['npz', 'h5'])
def test_reading_holds_one_array_beside_what_is_kept(tmp_path, suffix):
    rows, columns = 50_000, 16
    states = np.random.default_rng(0).normal(size=(rows + 1, columns))
    arrays = {
        'observations': states[:-1],
        'next_observations': states[1:],
        'actions': np.zeros((rows, 1)),
        'rewards': np.ones(rows),
        'terminals': np.arange(1, rows + 1) % 100 == 0,
    }
    path = str(tmp_path / f'large.{suffix}')
    if suffix == 'npz':
        np.savez(path, **arrays)
    else:
        with h5py.File(path, 'w') as file:
            for name, array in arrays.items():
                file[name] = array
    raw, peak = peak_of(lambda: custom.load_raw(path, 'finetuning', 'train'))
    kept = sum(array.nbytes for name, array in raw.items() if name != 'source')
    assert peak < kept + 1.25 * arrays['observations'].nbytes
    if suffix == 'h5':  # Of which no more is read than is wanted.
        _, peak = peak_of(lambda: custom.load_raw(path, 'finetuning', 'train', 1000))
        assert peak < 0.25 * arrays['observations'].nbytes


@pytest.mark.parametrize(
    ('replaced', 'message'),
    [
        ({'terminals': None, 'actions': None}, 'it holds no actions, terminals; expected observations, actions'),
        ({'actions': np.zeros((8, 1))}, r'actions have shape \(8, 1\); with 9 terminals, expected \(9, a\)'),
        ({'observations': np.zeros((9, 8, 8, 3))}, r'observations have shape \(9, 8, 8, 3\)'),
        ({'rewards': np.zeros((9, 1))}, r'rewards have shape \(9, 1\).*expected \(9,\)'),
        ({'next_observations': np.zeros((9, 5))}, r'next_observations have shape \(9, 5\), observations \(9, 2\)'),
        ({'terminals': np.zeros(9)}, 'no row of its 9 is terminal'),
        ({'terminals': np.arange(9) == 4}, 'its last 4 rows belong to an episode without an end'),
        ({'terminals': np.ones(9)}, 'every episode of the train split is a single row'),
        ({'terminals': np.arange(9) == 8}, 'a single episode; expected two or more'),
        ({'rewards': None}, 'it holds no rewards, which fine-tuning needs'),
        ({'observations': nan_at((9, 2), 5)}, 'observations hold a NaN or an infinity, first in row 5'),
        ({'rewards': nan_at(9, 1)}, 'rewards hold a NaN or an infinity, first in row 1'),
        ({'actions': np.full((9, 1), 2.0)}, r'actions reach 2; expected \[-1, 1\]'),
        ({'masks': np.full(9, -1.0)}, r'masks reach beyond \[0, 1\]'),
        ({'actions': np.array([[{}]] * 9)}, 'actions are of type object; expected real numbers'),
        ({'observations': np.full((9, 2), '1.0')}, 'observations are of type <U3; expected real numbers'),
        ({'rewards': np.zeros(9, complex)}, 'rewards are of type complex128; expected real numbers'),
        ({'observations': np.full((9, 2), 1e300)}, r'observations hold .* an infinity, first in row 0 \(as float32\)'),
        ({'terminals': nan_at(9, 5)}, 'terminals hold a NaN or an infinity, first in row 5'),
    ],
)
def test_bad_arrays_are_named_with_their_file(tmp_path, replaced, message):
    path = write_npz(tmp_path / 'mine.npz', **make_arrays(**replaced))
    with pytest.raises(UserError, match=rf'mine\.npz.*{message}'):
        custom.load_raw(path, 'finetuning', 'train')


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('absent.npz', None, 'does not exist: expected an npz or HDF5 file, or minari:<id>'),
        ('table.csv', b'1,2', r'expected a name that ends in \.npz, \.hdf5 or \.h5'),
        ('damaged.npz', b'no zip file', 'cannot be read'),
        ('damaged.h5', b'no HDF5 file', 'cannot be read'),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f'{name}.*{message}'):
        envs.task_spec('none', str(tmp_path / name))


def test_strings_in_hdf5_are_refused(tmp_path):
    with h5py.File(tmp_path / 'mine.h5', 'w') as file:
        for name, array in make_arrays().items():
            file[name] = array if name != 'observations' else array.astype('S')
    with pytest.raises(UserError, match=r'observations are of type .*; expected real numbers'):
        envs.task_spec('none', str(tmp_path / 'mine.h5'))


def test_an_unknown_home_folder_is_named():
    with pytest.raises(UserError, match='the home folder ~no-such-user is not known'):
        envs.task_spec('none', '~no-such-user/mine.npz')


def test_minari_episodes_are_converted_as_they_come(monkeypatch):
    """As Minari gives them: float64, each read when its turn comes."""
    import gymnasium

    steps, episodes, columns = 100, 400, 16

    def iterate_episodes():
        for number in range(episodes):
            yield types.SimpleNamespace(
                observations=np.full((steps + 1, columns), float(number)),
                actions=np.full((steps, 1), 2.0),
                rewards=np.arange(steps, dtype=float),
                terminations=np.arange(steps) == steps - 1,
            )

    data = types.SimpleNamespace(
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (columns,)),
        action_space=gymnasium.spaces.Box(-2, 2, (1,)),
        iterate_episodes=iterate_episodes,
    )
    monkeypatch.setattr(custom_files, '_open_minari', lambda dataset: data)
    raw, peak = peak_of(lambda: custom.load_raw('minari:own-v0', 'finetuning', 'train'))
    assert peak < 1.5 * episodes * (steps + 1) * columns * 8, 'one and a half times what Minari gives'
    assert {array.dtype.name for name, array in raw.items() if name not in ('terminals', 'source')} == {'float32'}
    assert raw['source']['episodes'] == 360 and raw['observations'][-1, 0] == 359
    np.testing.assert_array_equal(raw['masks'][: steps + 1], np.arange(steps + 1) != steps - 1)
    np.testing.assert_array_equal(raw['actions'][: steps + 1, 0], np.arange(steps + 1) < steps)


def test_minari_missing_names_the_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, 'minari', None)
    with pytest.raises(UserError, match=r'needs Minari.*pip install "minari\[hdf5,hf\]"'):
        envs.task_spec('none', 'minari:pendulum/random-v0')


@pytest.mark.filterwarnings('ignore::UserWarning:minari.*')
def test_minari_episodes_become_rows(tmp_path, monkeypatch):
    minari = pytest.importorskip('minari')
    import gymnasium

    monkeypatch.setenv('MINARI_DATASETS_PATH', str(tmp_path))
    env = minari.DataCollector(gymnasium.make('Pendulum-v1', max_episode_steps=4))
    rng = np.random.default_rng(0)
    taken, rewards, states = [], [], []
    for episode in range(2):
        states.append(env.reset(seed=episode)[0])
        for _ in range(4):
            taken.append(rng.uniform(-2, 2, 1).astype(np.float32))
            observation, reward, *_ = env.step(taken[-1])
            states.append(observation)
            rewards.append(reward)
    env.create_dataset('pendulum/random-v0')
    env.close()

    name = 'minari:pendulum/random-v0'
    spec = envs.task_spec('Pendulum-v1', name)
    assert (spec.name, spec.observation_shape, spec.action_size) == ('custom-pendulum-random-v0', (3,), 1)
    for split, episode in (('train', 0), ('val', 1)):
        raw = custom.load_raw(name, 'finetuning', split)
        np.testing.assert_allclose(raw['observations'], states[5 * episode : 5 * episode + 5])
        np.testing.assert_allclose(raw['actions'][:4], np.array(taken[4 * episode : 4 * episode + 4]) / 2, atol=1e-6)
        np.testing.assert_allclose(raw['rewards'][:4], rewards[4 * episode : 4 * episode + 4], rtol=1e-6)
        assert raw['terminals'].tolist() == [False] * 4 + [True]
        assert (raw['masks'] == 1).all(), 'a time limit is no termination'
    with pytest.raises(UserError, match='minari:pendulum/other-v0 cannot be loaded'):
        monkeypatch.setattr(minari, 'load_dataset', lambda *_, **__: minari.no_such_function())
        envs.task_spec('none', 'minari:pendulum/other-v0')


def run(tmp_path, *command):
    command = [
        sys.executable if word == 'python' else str(ROOT / word) if word in SCRIPTS else word for word in command
    ]
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)


SCRIPTS = ('main.py', 'pretrain.py', 'finetune.py')


@pytest.mark.slow
def test_the_documented_example_runs(tmp_path):
    text = (ROOT / 'docs/custom_data.md').read_text()
    (tmp_path / 'make_data.py').write_text(re.search(r'```python\n(.*?)```', text, re.S)[1])
    for line in re.search(r'```bash\n(.*?)```', text, re.S)[1].splitlines():
        arguments = ['--eval_workers=1'] if 'main.py' in line else []
        result = run(tmp_path, *line.split(), *arguments)
        assert result.returncode == 0, result.stderr
    rows = runs.read_metrics(tmp_path / 'exp/smoke/custom-pendulum_infom_sd0/metrics.jsonl')
    evaluations = [row for row in rows if 'evaluation/episode.return' in row]
    assert [row['step'] for row in evaluations] == [40, 80]
    assert all(row['evaluation/episode.length'] == 200 for row in evaluations)

    # Without an environment: nothing is evaluated, and asking for it is refused.
    alone = ('python', 'pretrain.py', '--dataset=pendulum.npz', '--env_name=none', '--preset=smoke')
    refused = run(tmp_path, *alone, '--eval_episodes=3')
    assert refused.returncode == 2
    assert '--eval_episodes=3: --env_name=none has no environment' in refused.stderr
