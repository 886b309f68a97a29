"""Loading data files: what is kept, what is checked, and the labels, against goals written here and the simulator."""

import functools
import shutil

import numpy as np
import pytest

import envs
from envs import data
from utils.errors import UserError

TASK = 'cube-single-play-singletask-task1-v0'
EPISODE_ROWS = (6, 4, 9)  # Unequal on purpose.
POSITION_COLUMNS = {'cube-single': 21, 'cube-double': 28, 'scene': 25, 'puzzle-4x4': 30}
BUTTONS = {'scene': 2, 'puzzle-4x4': 16}

# The tasks as OGBench's paper and package define them: where the cubes (metres), drawer, window and buttons should be.
CUBE_SINGLE_GOALS = {
    1: (0.425, -0.1, 0.02),
    2: (0.5, 0.0, 0.02),
    3: (0.35, 0.0, 0.02),
    4: (0.5, 0.2, 0.02),
    5: (0.5, -0.2, 0.02),
}
CUBE_DOUBLE_TASK5_GOALS = ((0.425, 0.0, 0.02), (0.425, 0.0, 0.06))
SCENE_TASK4_GOAL = {'cube': (0.33, -0.356, 0.065986), 'buttons': (1, 0), 'drawer': 0.0, 'window': 0.0}
PUZZLE_TASK2_GOAL = (1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1)
TOLERANCE = 0.04


@functools.lru_cache
def task_env(name):
    """One environment a task for the whole file: making one takes a second or more."""
    return envs.make_env(name)


@pytest.fixture(autouse=True)
def shared_environments(monkeypatch):
    monkeypatch.setattr(data, '_labelling_env', task_env)


def make_arrays(domain='cube-single', seed=0, episode_rows=EPISODE_ROWS):
    generator = np.random.default_rng(seed)
    rows = sum(episode_rows)
    terminals = np.zeros(rows, bool)
    terminals[np.cumsum(episode_rows) - 1] = True
    arrays = {
        'observations': generator.normal(size=(rows, envs.OGBENCH_OBSERVATION_SIZES[domain])).astype(np.float32),
        'actions': generator.uniform(-1, 1, (rows, 5)).astype(np.float32),
        'terminals': terminals,
        'qpos': generator.normal(size=(rows, POSITION_COLUMNS[domain])).astype(np.float32),
        'qvel': generator.normal(size=(rows, POSITION_COLUMNS[domain] - 1)).astype(np.float32),
    }
    if domain in BUTTONS:
        arrays['button_states'] = generator.integers(0, 2, (rows, BUTTONS[domain]))
    return arrays


def write(folder, arrays, phase='pretraining', split='train', domain='cube-single', save=np.savez):
    path = data.dataset_path(folder, domain, phase, split)
    save(path, **arrays)
    return path


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_rows_come_back_as_they_are(tmp_path, save):
    arrays = make_arrays()
    path = write(tmp_path, arrays, save=save)
    raw = data.load_raw(TASK, 'pretraining', 'train', tmp_path)
    for name in ('observations', 'actions', 'terminals'):
        np.testing.assert_array_equal(raw[name], arrays[name])
        assert raw[name].dtype == arrays[name].dtype
    assert raw['source']['file'] == path.name
    assert (raw['source']['rows'], raw['source']['episodes'], raw['source']['metadata']) == (19, 3, None)


def test_the_reward_free_phase_has_no_rewards(tmp_path):
    write(tmp_path, make_arrays() | {'rewards': np.ones(19, np.float32), 'masks': np.ones(19, np.float32)})
    raw = data.load_raw(TASK, 'pretraining', 'train', tmp_path)
    assert set(raw) == {'observations', 'actions', 'terminals', 'source'}


def test_published_dtypes_are_accepted(tmp_path):
    arrays = make_arrays()
    stored = arrays | {
        'observations': arrays['observations'].astype(np.float64),
        'terminals': arrays['terminals'].astype(np.float32),
    }
    write(tmp_path, stored)
    raw = data.load_raw(TASK, 'pretraining', 'train', tmp_path)
    assert raw['observations'].dtype == np.float32 and raw['terminals'].dtype == bool
    np.testing.assert_array_equal(raw['observations'], arrays['observations'])


@pytest.mark.parametrize(('limit', 'rows'), [(5, 6), (7, 6), (8, 10), (15, 10), (16, 19), (10**9, 19), (None, 19)])
def test_data_are_cut_between_episodes(tmp_path, limit, rows):
    # The episodes hold 5, 3 and 8 transitions.
    arrays = make_arrays()
    write(tmp_path, arrays)
    raw = data.load_raw(TASK, 'pretraining', 'train', tmp_path, max_transitions=limit)
    assert len(raw['terminals']) == len(raw['observations']) == len(raw['actions']) == rows
    assert raw['terminals'][-1]
    np.testing.assert_array_equal(raw['observations'], arrays['observations'][:rows])


def test_an_unfinished_last_episode_is_left_out(tmp_path):
    arrays = make_arrays()
    arrays['terminals'][-1] = False
    write(tmp_path, arrays)
    assert len(data.load_raw(TASK, 'pretraining', 'train', tmp_path)['terminals']) == 10


@pytest.mark.parametrize('limit', [4, 1, 0, -3])
def test_too_few_transitions_are_refused(tmp_path, limit):
    write(tmp_path, make_arrays())
    with pytest.raises(UserError, match=r'asked for|wanted'):
        data.load_raw(TASK, 'pretraining', 'train', tmp_path, max_transitions=limit)


def test_a_missing_file_names_the_commands_that_make_it(tmp_path):
    with pytest.raises(UserError) as pretraining:
        data.load_raw(TASK, 'pretraining', 'val', tmp_path)
    assert 'cube-single-play-v0-val.npz' in str(pretraining.value)
    assert f'envs.collect_ogbench --split=pretrain --env_name=cube-single-v0 --dataset_dir={tmp_path}' in str(
        pretraining.value
    )
    assert 'envs.download_ogbench' in str(pretraining.value)
    with pytest.raises(UserError) as finetuning:
        data.load_raw(TASK, 'finetuning', 'train', tmp_path)
    assert 'cube-single-play-ft-v0.npz' in str(finetuning.value) and '--split=finetune' in str(finetuning.value)
    assert 'download' not in str(finetuning.value)


def test_an_unknown_home_folder_is_named():
    for task in (TASK, 'cheetah_run'):
        with pytest.raises(UserError, match='the home folder ~no-such-user is not known'):
            data.load_raw(task, 'pretraining', 'train', '~no-such-user/data')


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:400])


def damage_bits(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


def damage_empty(path):
    path.write_bytes(b'')


def damage_text(path):
    path.write_text('<html>not found</html>')


def test_a_damaged_file_is_named(tmp_path):
    for damage in (damage_cut, damage_bits, damage_empty, damage_text):
        path = write(tmp_path, make_arrays())
        damage(path)
        with pytest.raises(UserError, match=r'cube-single-play-v0\.npz cannot be read.*damaged.*collect_ogbench'):
            data.load_raw(TASK, 'pretraining', 'train', tmp_path)


def changed(**changes):
    arrays = make_arrays()
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    return arrays


def with_value(value, row):
    def change(array):
        array = array.copy()
        array[row, 1] = value
        return array

    return change


@pytest.mark.parametrize(
    ('arrays', 'message'),
    [
        (changed(observations=with_value(np.nan, 7)), 'observations hold a NaN or an infinity, first in row 7'),
        (changed(actions=with_value(np.inf, 18)), 'actions hold a NaN or an infinity, first in row 18'),
        (
            changed(observations=lambda o: with_value(1e300, 4)(o.astype(np.float64))),
            r'observations hold a NaN or an infinity, first in row 4 \(as float32\)',
        ),
        (changed(observations=lambda o: o.astype(str)), 'observations are of type <U32; real numbers are expected'),
        (changed(actions=lambda a: a.astype(complex)), 'actions are of type complex128; real numbers are expected'),
        (changed(terminals=lambda t: t.astype(str)), 'terminals are of type <U5; real numbers are expected'),
        (changed(actions=with_value(3.5, 2)), 'actions reach 3.5'),
        (changed(actions=with_value(-2.5, 2)), 'actions reach 2.5'),
        (changed(observations=lambda o: o[:, :17]), r'observations have shape \(19, 17\).*\(19, 28\)'),
        (changed(observations=lambda o: o[:-1]), r'observations have shape \(18, 28\)'),
        (changed(actions=lambda a: a[:, :4]), r'actions have shape \(19, 4\)'),
        (changed(actions=lambda a: a[:, 0]), r'actions have shape \(19,\)'),
        (changed(terminals=lambda t: np.zeros_like(t)), 'no row of its 19 is terminal'),
        (changed(terminals=lambda t: np.ones_like(t)), 'single row'),
        (changed(terminals=lambda t: t[:, None]), 'terminals have shape'),
        ({name: array for name, array in make_arrays().items() if name != 'terminals'}, 'holds no terminals'),
        ({name: array for name, array in make_arrays().items() if name != 'observations'}, 'holds no observations'),
    ],
)
def test_wrong_content_is_refused(tmp_path, arrays, message):
    write(tmp_path, arrays)
    with pytest.raises(UserError, match=message) as caught:
        data.load_raw(TASK, 'pretraining', 'train', tmp_path)
    assert 'cube-single-play-v0.npz' in str(caught.value) and '\n' not in str(caught.value)


def test_stored_objects_are_never_loaded(tmp_path):
    stored = make_arrays()['observations']
    write(tmp_path, make_arrays() | {'observations': stored.astype(object)})
    with pytest.raises(UserError, match='cannot be read'):
        data.load_raw(TASK, 'pretraining', 'train', tmp_path)


def test_finetuning_needs_the_simulators_state(tmp_path):
    arrays = make_arrays()
    write(tmp_path, {name: array for name, array in arrays.items() if name != 'qpos'}, 'finetuning')
    with pytest.raises(UserError, match='holds no qpos'):
        data.load_raw(TASK, 'finetuning', 'train', tmp_path)
    write(tmp_path, arrays | {'qpos': arrays['qpos'][:-4]}, 'finetuning')
    with pytest.raises(UserError, match='qpos have shape'):
        data.load_raw(TASK, 'finetuning', 'train', tmp_path)


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    def fingerprint():
        return data.load_raw(TASK, 'pretraining', 'train', tmp_path)['source']['fingerprint']

    path = write(tmp_path, make_arrays())
    first = fingerprint()
    shutil.copy(path, tmp_path / 'copy')
    write(tmp_path, make_arrays(seed=1))
    assert fingerprint() != first
    shutil.copy(tmp_path / 'copy', path)
    assert fingerprint() == first


def near(goal, generator, rows):
    """Positions scattered about a goal, so that about half of them are within the tolerance."""
    return np.asarray(goal) + generator.normal(size=(rows, 3)) * 0.025


def check_labels(tmp_path, name, arrays, satisfied):
    """satisfied (rows, sub-goals) bool: what the file's labels should say."""
    domain = envs.task_spec(name).domain
    write(tmp_path, arrays, 'finetuning', domain=domain)
    raw = data.load_raw(name, 'finetuning', 'train', tmp_path, max_transitions=len(arrays['terminals']))
    rows = len(raw['terminals'])
    np.testing.assert_array_equal(raw['rewards'], satisfied.sum(1)[:rows] - satisfied.shape[1])
    np.testing.assert_array_equal(raw['masks'], 1.0 - satisfied.all(1)[:rows])
    assert raw['rewards'].dtype == raw['masks'].dtype == np.float32
    assert 0 < raw['masks'].mean() < 1, 'the test must see both'
    # Other tasks' files differ in nothing but the labels, and a cut file keeps the labels of what it keeps.
    cut = data.load_raw(name, 'finetuning', 'train', tmp_path, max_transitions=10)
    np.testing.assert_array_equal(cut['rewards'], raw['rewards'][: len(cut['rewards'])])


@pytest.mark.parametrize('task', CUBE_SINGLE_GOALS)
def test_labels_of_cube_single(tmp_path, task):
    arrays = make_arrays(episode_rows=(11, 50, 139))
    arrays['qpos'][:, 14:17] = near(CUBE_SINGLE_GOALS[task], np.random.default_rng(task), 200)
    distances = np.linalg.norm(arrays['qpos'][:, 14:17].astype(np.float64) - CUBE_SINGLE_GOALS[task], axis=1)
    check_labels(tmp_path, f'cube-single-play-singletask-task{task}-v0', arrays, (distances <= TOLERANCE)[:, None])


def test_labels_of_cube_double(tmp_path):
    arrays = make_arrays('cube-double', episode_rows=(11, 50, 139))
    generator = np.random.default_rng(0)
    satisfied = []
    for cube, goal in enumerate(CUBE_DOUBLE_TASK5_GOALS):
        columns = slice(14 + 7 * cube, 17 + 7 * cube)
        arrays['qpos'][:, columns] = near(goal, generator, 200)
        satisfied.append(np.linalg.norm(arrays['qpos'][:, columns].astype(np.float64) - goal, axis=1) <= TOLERANCE)
    check_labels(tmp_path, 'cube-double-play-singletask-task5-v0', arrays, np.stack(satisfied, 1))


def test_labels_of_scene(tmp_path):
    arrays = make_arrays('scene', episode_rows=(11, 50, 139))
    generator = np.random.default_rng(0)
    goal = SCENE_TASK4_GOAL
    arrays['qpos'][:, 14:17] = near(goal['cube'], generator, 200)
    arrays['qpos'][:, 23] = goal['drawer'] + generator.uniform(-0.06, 0.0, 200)
    arrays['qpos'][:, 24] = goal['window'] + generator.uniform(0.0, 0.06, 200)
    satisfied = np.column_stack(
        [
            np.linalg.norm(arrays['qpos'][:, 14:17].astype(np.float64) - goal['cube'], axis=1) <= TOLERANCE,
            arrays['button_states'] == goal['buttons'],
            np.abs(arrays['qpos'][:, 23] - goal['drawer']) <= TOLERANCE,
            np.abs(arrays['qpos'][:, 24] - goal['window']) <= TOLERANCE,
        ]
    )
    assert satisfied.shape == (200, 5)
    check_labels(tmp_path, 'scene-play-singletask-task4-v0', arrays, satisfied)


def test_labels_of_puzzle(tmp_path):
    arrays = make_arrays('puzzle-4x4', episode_rows=(11, 50, 139))
    flips = np.random.default_rng(0).random((200, 16)) < 0.05
    arrays['button_states'] = np.where(flips, 1 - np.array(PUZZLE_TASK2_GOAL), PUZZLE_TASK2_GOAL)
    check_labels(tmp_path, 'puzzle-4x4-play-singletask-task2-v0', arrays, arrays['button_states'] == PUZZLE_TASK2_GOAL)


@pytest.mark.parametrize(
    'name',
    [
        'cube-single-play-singletask-task1-v0',
        'cube-double-play-singletask-task5-v0',
        'scene-play-singletask-task4-v0',
        'puzzle-4x4-play-singletask-task2-v0',
    ],
)
def test_labels_agree_with_the_live_simulator(name):
    """A live step returns the label of a state: with ogbench 1.2.2's single tasks, the state that it starts from."""
    domain = envs.task_spec(name).domain
    env = task_env(name)
    env.reset(seed=0)
    simulator = env.unwrapped
    generator = np.random.default_rng(1)

    def state():
        measured = simulator.compute_ob_info()
        return {key: measured[key].copy() for key in ('qpos', 'qvel', 'button_states') if key in measured}

    # The goal itself: the start, but for what the task wants moved.
    goal = state()
    info = simulator.cur_task_info
    if domain.startswith('cube'):
        for cube, position in enumerate(info['goal_xyzs']):
            goal['qpos'][14 + 7 * cube : 17 + 7 * cube] = position
    elif domain == 'scene':
        goal['qpos'][14:17] = info['goal']['block_xyzs'][0]
        goal['qpos'][23:25] = info['goal']['drawer_pos'], info['goal']['window_pos']
        goal['button_states'] = info['goal']['button_states'].copy()
    else:
        goal['button_states'] = info['goal_button_states'].copy()

    states, rewards, ends = [], [], []
    for step in range(16):
        if step == 8:
            simulator.set_state(*goal.values())
        states.append(state())
        _, reward, terminated, _, stepped = env.step(generator.uniform(-0.2, 0.2, 5))
        assert terminated == bool(stepped['success'])
        rewards.append(reward)
        ends.append(terminated)
    columns = {key: np.array([each[key] for each in states]) for key in ('qpos', 'button_states') if key in states[0]}
    labels, masks = data.label_states(name, columns)
    np.testing.assert_array_equal(rewards, labels)
    assert min(rewards[:8]) < 0 and rewards[8] == 0
    # The step on which the simulator was put at the goal did not see it coming; all others end the episode at mask 0.
    np.testing.assert_array_equal(np.delete(ends, 8), np.delete(masks == 0, 8))
