"""The table of tasks: its rows and records, and that a command that fails spoils no other cell."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import envs
from envs import check_labels, data
from utils import runs, task_table
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CUBE = 'cube-single-play-singletask-task1-v0'


def make_record(task, **replaced):
    versions = {'commit': 'abc', 'jax': '0.10.2'}
    passed = dict.fromkeys(task_table.STAGES, '✓')
    return {'task': task, **passed, 'seconds': 12.4, 'date': '2026-01-02', 'versions': versions, **replaced}


def test_a_row_for_each_task_in_order():
    records = {
        CUBE: make_record(CUBE),
        'cheetah_run': make_record('cheetah_run', labels='error: 3 | 4', date='2026-01-03'),
    }
    lines = task_table.make_table(records, 'the command').splitlines()
    assert any(line.startswith('1 of 40 tasks pass. Made with `the command`') for line in lines)
    assert [line for line in lines if line.startswith('- ')] == [
        '- 2026-01-03: commit abc, jax 0.10.2',
        '- 2026-01-02: commit abc, jax 0.10.2',
    ]
    rows = {line.split(' | ')[0].removeprefix('| '): line for line in lines if line.startswith('| ')}
    assert list(rows)[2:] == list(envs.TASKS)
    assert rows[CUBE] == f'| {CUBE} | ✓ | ✓ | ✓ | ✓ | ✓ | 12 | 2026-01-02 |'
    assert rows['cheetah_run'] == r'| cheetah_run | ✓ | error: 3 \| 4 | ✓ | ✓ | ✓ | 12 | 2026-01-03 |'
    assert rows['walker_run'] == '| walker_run | – | – | – | – | – | – | – |'


def test_the_last_record_of_a_task_counts(tmp_path):
    path = tmp_path / 'tasks.jsonl'
    lines = [make_record(CUBE, data='failed'), make_record('walker_run'), make_record(CUBE)]
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    records = task_table.read_records(path)
    assert records.keys() == {CUBE, 'walker_run'} and task_table.has_passed(records[CUBE])
    path.write_text('no JSON\n')
    with pytest.raises(UserError, match=r'tasks\.jsonl cannot be read'):
        task_table.read_records(path)


def test_a_failed_command_gives_its_last_line():
    with pytest.raises(task_table.StageFailed, match=r'^error: too bad$'):
        task_table.run_command('-c', 'import sys; print("first"); sys.exit("error: too bad")')
    with pytest.raises(task_table.StageFailed, match=r'^exit code 3$'):
        task_table.run_command('-c', 'raise SystemExit(3)')
    task_table.run_command('-c', 'pass')


def write_evaluations(directory, returns):
    directory.mkdir(parents=True)
    with runs.MetricsLog(directory / 'metrics.jsonl') as log:
        for step, value in enumerate(returns):
            log.write(step, 'finetuning', 0, {'evaluation/episode.return': value, 'evaluation/episode.length': 5.0})


@pytest.mark.parametrize(
    ('failing', 'expected'),
    [
        (None, {}),
        ('convert_exorl', {'data': 'no', 'labels': '–', 'pretrained': '–', 'finetuned': '–', 'evaluated': '–'}),
        ('check_labels', {'labels': 'no'}),
        ('pretrain.py', {'pretrained': 'no', 'finetuned': '–', 'evaluated': '–'}),
        ('finetune.py', {'finetuned': 'no', 'evaluated': '–'}),
    ],
)
def test_a_failure_spoils_only_what_needs_it(tmp_path, monkeypatch, failing, expected):
    commands = []

    def run_command(*arguments):
        commands.append(arguments)
        if failing and any(failing in argument for argument in arguments):
            raise task_table.StageFailed('no')
        if arguments[0] == 'finetune.py':
            (task,) = (word.removeprefix('--env_name=') for word in arguments if word.startswith('--env_name='))
            write_evaluations(tmp_path / 'runs' / task, [1.0, 2.0])

    monkeypatch.setattr(task_table, 'run_command', run_command)
    domains = {}
    results = task_table.run_task(envs.task_spec('cheetah_run'), tmp_path, domains)
    assert results == dict.fromkeys(task_table.STAGES, '✓') | expected
    first = len(commands)
    task_table.run_task(envs.task_spec('cheetah_walk'), tmp_path, domains)
    made_again = [words for words in commands[first:] if words[0] == 'pretrain.py' or 'envs.collect_exorl' in words]
    assert not made_again, 'data and pre-training are the domain’s'


def test_evaluations_must_be_there_and_finite(tmp_path):
    for name, returns, message in (('one', [1.0], '1 evaluations'), ('bad', [1.0, np.nan], 'return is .* at step 1')):
        write_evaluations(tmp_path / name, returns)
        with pytest.raises(task_table.StageFailed, match=message):
            task_table.check_evaluations(tmp_path / name)


def test_unknown_task():
    result = subprocess.run(
        [sys.executable, '-m', 'utils.task_table', '--only=antmaze'], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and 'no task has that in its name' in result.stderr


def write_cheetah_labels(tmp_path, wrong=0.0):
    """Six live steps of cheetah_run as a labelled validation set with its states."""
    env = envs.make_env('cheetah_run')
    observations, physics, rewards = [env.reset(seed=1)[0]], [env.physics.get_state()], []
    actions = np.random.default_rng(0).uniform(-1, 1, (7, 6)).astype(np.float32)
    for action in actions[:6]:
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        physics.append(env.physics.get_state())
        rewards.append(reward)
    env.close()
    rewards[4] += wrong
    path = data.exorl_dataset_path(tmp_path, 'cheetah', 'run', 'finetuning', 'val')
    np.savez(
        path,
        observations=np.array(observations),
        actions=actions,
        terminals=np.arange(7) == 6,
        physics=np.array(physics),
        rewards=np.array([*rewards, 0.0], np.float32),
    )


def test_labels_of_exorl_are_checked_live(tmp_path):
    write_cheetah_labels(tmp_path)
    assert check_labels.check('cheetah_run', tmp_path).startswith('6 labels are the live rewards')
    write_cheetah_labels(tmp_path, wrong=0.01)
    with pytest.raises(UserError, match=r'exorl-cheetah_run-ft-val\.npz: 1 of 6 rewards are wrong, first number 4'):
        check_labels.check('cheetah_run', tmp_path)


def test_labels_of_ogbench_are_checked(tmp_path, monkeypatch):
    rows = 6
    arrays = {
        'observations': np.zeros((rows, 28), np.float32),
        'actions': np.zeros((rows, 5), np.float32),
        'terminals': np.arange(rows) == rows - 1,
        'qpos': np.zeros((rows, 21), np.float32),
    }
    arrays['qpos'][2, 14:17] = (0.425, -0.1, 0.02)  # The goal of task 1.
    np.savez(data.dataset_path(tmp_path, 'cube-single', 'finetuning', 'val'), **arrays)
    assert '6 labels are those of the stored states' in check_labels.check(CUBE, tmp_path)
    right = data.label_states
    monkeypatch.setattr(data, 'label_states', lambda *args: (right(*args)[0] - 1, right(*args)[1]))
    with pytest.raises(UserError, match='6 of 6 rewards are wrong'):
        check_labels.check(CUBE, tmp_path)
