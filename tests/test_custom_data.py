"""A user's own data: what is read from npz, HDF5 and Minari, what is refused, and the example of the documentation."""

import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import envs
from envs import custom
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
        'masks': 1.0 - (steps == 1),
    }
    arrays |= replaced
    return {name: array for name, array in arrays.items() if array is not None}


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


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
        np.testing.assert_array_equal(train['rewards'], [0, 1, 2, 0, 1, 2, 3])
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


def nan_at(shape, row):
    array = np.zeros(shape)
    array[row] = np.nan
    return array


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
        ({'rewards': nan_at(9, 2)}, 'rewards hold a NaN or an infinity, first in row 2'),
        ({'actions': np.full((9, 1), 2.0)}, r'actions reach 2; expected \[-1, 1\]'),
        ({'masks': np.full(9, -1.0)}, r'masks reach beyond \[0, 1\]'),
        ({'actions': np.array([[{}]] * 9)}, r'cannot be read \(ValueError'),
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
