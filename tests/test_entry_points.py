"""The three commands as real processes, on data collected from the real simulator: smoke runs, kills, and what bad
input gets."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.waiting import has_lines, wait_until
from utils import checkpoints, demo, runs

ROOT = Path(__file__).resolve().parents[1]
TASK = 'cube-single-play-singletask-task1-v0'
EPISODE_LENGTH = 60


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    """Processes share one compilation cache, which is not the user's."""
    return {
        **{name: value for name, value in os.environ.items() if name != 'WANDB_MODE'},
        'XDG_CACHE_HOME': str(tmp_path_factory.mktemp('cache')),
        'JAX_PLATFORMS': 'cpu',
    }


@pytest.fixture(scope='module')
def data(tmp_path_factory, environment):
    """A few short episodes of cube-single play for both phases."""
    directory = tmp_path_factory.mktemp('data')
    for split in ('pretrain', 'finetune'):
        subprocess.run(
            [
                sys.executable, '-m', 'envs.collect_ogbench', '--env_name=cube-single-v0',
                f'--split={split}', '--num_episodes=3',
                '--val_episodes=1', '--workers=1', f'--episode_length={EPISODE_LENGTH}', f'--dataset_dir={directory}',
            ],
            cwd=ROOT, env=environment, check=True, capture_output=True,
        )  # fmt: skip
    return directory


def command(script, data, save_dir, *arguments):
    return [
        sys.executable, script, f'--env_name={TASK}', '--preset=smoke', f'--dataset_dir={data}',
        f'--save_dir={save_dir}',
        '--run_group=g', '--run_name=r', '--eval_workers=1', *arguments,
    ]  # fmt: skip


def start(environment, *arguments):
    return subprocess.run(command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def arrays_of(run_directory):
    """The bytes of every array of a run's last checkpoint, by name."""
    return {name: array.tobytes() for name, array in checkpoints.read_arrays(run_directory).items()}


def without_times(run_directory):
    rows = runs.read_metrics(run_directory / 'metrics.jsonl')
    return [{k: v for k, v in row.items() if not k.startswith('time/')} for row in rows]


LENGTHS = (
    '--pretraining_steps=48', '--finetuning_steps=48', '--log_interval=8', '--save_interval=8', '--eval_interval=24',
)  # fmt: skip


@pytest.fixture(scope='module')
def uninterrupted(environment, data, tmp_path_factory):
    """The directory of a run of main.py from its beginning to its end, with everything on that it may write."""
    directory = tmp_path_factory.mktemp('uninterrupted')
    extras = '--video_episodes=1', '--wandb_mode=offline', '--eval_workers=2'
    result = start(environment, 'main.py', data, directory, *LENGTHS, *extras)
    assert result.returncode == 0, result.stderr
    return directory / 'g' / 'r'


def test_smoke_run_with_video_and_offline_wandb(uninterrupted):
    rows = runs.read_metrics(uninterrupted / 'metrics.jsonl')
    assert {row['phase'] for row in rows} == {'pretraining', 'finetuning'}
    evaluations = [row for row in rows if 'evaluation/episode.success' in row]
    assert [row['step'] for row in evaluations] == [48, 72, 96]
    assert all(0 < row['evaluation/episode.length'] <= 200 for row in evaluations)
    assert json.loads((uninterrupted / 'summary.json').read_text())['steps'] == {'pretraining': 48, 'finetuning': 96}
    assert (uninterrupted / 'videos' / 'step_96.mp4').stat().st_size > 1000
    assert list((uninterrupted / 'wandb').glob('offline-run-*')), 'the copy for wandb sync'


@pytest.mark.slow
def test_killed_twice_and_resumed_equals_uninterrupted(environment, data, tmp_path, uninterrupted):
    """kill −9 in each phase, then the same command: the same bits in the last checkpoint, the same metrics, each step
    once; neither videos, nor wandb, nor more workers play a part in either."""
    for lines in (3, 11):
        process = subprocess.Popen(
            command('main.py', data, tmp_path, *LENGTHS),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: has_lines(tmp_path / 'g' / 'r', lines) or process.poll() is not None, 'lines')
        assert process.poll() is None, 'ended before it could be killed'
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    resumed = start(environment, 'main.py', data, tmp_path, *LENGTHS)
    assert resumed.returncode == 0, resumed.stderr
    assert 'own checkpoint' in resumed.stderr
    assert arrays_of(tmp_path / 'g' / 'r') == arrays_of(uninterrupted)
    assert without_times(tmp_path / 'g' / 'r') == without_times(uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_one_checkpoint_serves_two_tasks(environment, data, tmp_path):
    """pretrain.py stopped by SIGTERM says how to resume; its checkpoint is then fine-tuned on two tasks of the
    domain."""
    long = command(
        'pretrain.py', data, tmp_path, '--pretraining_steps=4000', '--log_interval=20', '--save_interval=4000'
    )
    process = subprocess.Popen(
        long, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    wait_until(lambda: has_lines(tmp_path / 'g' / 'r', 2), 'lines')
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert 'same command again to resume' in out
    saved = checkpoints.latest_step(tmp_path / 'g' / 'r' / 'checkpoints')
    assert 40 <= saved < 4000
    for task in (2, 5):
        result = start(
            environment, 'finetune.py', data, tmp_path, f'--run_name=task{task}',
            f'--env_name=cube-single-play-singletask-task{task}-v0',
            f'--restore_path={tmp_path / "g" / "r"}', '--agent.alpha=3',
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        rows = runs.read_metrics(tmp_path / 'g' / f'task{task}' / 'metrics.jsonl')
        assert [row['step'] for row in rows if 'training/critic_loss' in row] == [saved + 20, saved + 40]
        assert {row['phase'] for row in rows} == {'finetuning'}


WITHOUT_AFFINITY = """
import os, runpy, sys
os.__dict__.pop('sched_getaffinity', None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_systems_that_cannot_say_which_cores_a_process_has(environment, tmp_path, monkeypatch):
    """main.py goes as far as its data, which are missing."""
    python, *line = command('main.py', tmp_path / 'absent', tmp_path, '--eval_workers=0')
    result = subprocess.run(
        [python, '-c', WITHOUT_AFFINITY, *line], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr

    monkeypatch.delattr(os, 'sched_getaffinity', raising=False)
    monkeypatch.setattr(demo, 'Evaluator', lambda make_env, num_workers: contextlib.nullcontext(num_workers))
    assert demo.random_policy([], 1) == []


def truncated(data, path):
    shutil.copytree(data, path)
    file = path / 'cube-single-play-v0.npz'
    file.write_bytes(file.read_bytes()[:4000])
    return path


def with_nan(data, path):
    shutil.copytree(data, path)
    file = path / 'cube-single-play-v0.npz'
    with np.load(file) as archive:
        arrays = dict(archive)
    arrays['observations'][7, 3] = np.nan
    np.savez(file, **arrays)
    return path


@pytest.mark.parametrize(
    ('flag', 'expected'),
    [
        ('--env_name=cube-singel-play-singletask-task1-v0', 'did you mean cube-single'),
        ('--dataset_dir={tmp}/none', 'python -m envs.collect_ogbench'),
        ('--dataset_dir={truncated}', 'cube-single-play-v0.npz'),
        ('--dataset_dir={nan}', 'cube-single-play-v0.npz'),
        ('--restore_path={tmp}/none', 'does not exist'),
        ('--save_dir=/proc/none', 'cannot write'),
        ('--agent.q_agg=max', 'expected one of min, mean'),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(environment, data, tmp_path, flag, expected):
    flag = flag.format(
        tmp=tmp_path,
        truncated=truncated(data, tmp_path / 'cut') if '{truncated}' in flag else '',
        nan=with_nan(data, tmp_path / 'nan') if '{nan}' in flag else '',
    )
    result = start(environment, 'main.py', data, tmp_path / 'runs', flag)
    assert result.returncode == 2, result.stderr
    assert 'Traceback' not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith('error:')]
    assert len(errors) == 1 and expected in errors[0]
    assert not list(tmp_path.rglob('summary.json')) and not list(tmp_path.rglob('config.json'))
