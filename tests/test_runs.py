"""The run directory: made, locked, written atomically; the metrics log with its repairs; the summary, by hand."""

import errno
import json
import logging
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from utils import runs
from utils.errors import UserError
from utils.runs import MetricsLog, read_metrics, write_json, write_summary

ROOT = Path(__file__).resolve().parents[1]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'metrics.jsonl'


# --- Directory, lock and JSON files ---


def test_a_run_directory_is_made_once_and_found_again(tmp_path):
    made = runs.make_run_directory(tmp_path / 'group' / 'name')
    assert made == tmp_path / 'group' / 'name'
    assert sorted(child.name for child in made.iterdir()) == ['checkpoints', 'figures', 'videos']
    (made / 'config.json').write_text('{}')
    assert runs.make_run_directory(made) == made
    assert (made / 'config.json').read_text() == '{}'


def test_a_directory_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=f'cannot write {tmp_path}/file/group/name: Not a directory.*--save_dir'):
        runs.make_run_directory(tmp_path / 'file' / 'group' / 'name')


@pytest.mark.skipif(sys.platform != 'linux', reason='needs a directory that not even root can write to')
def test_a_directory_in_which_no_file_can_be_made_is_a_user_error():
    with pytest.raises(UserError, match='cannot write /proc/self'):  # unwritable even for root
        runs.require_writable('/proc/self')


def test_only_one_process_has_the_lock_and_a_dead_one_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, 'LOCK_PATIENCE', 0.3)
    program = (
        'import sys; from utils.runs import lock_run_directory as l; lock = l(sys.argv[1]); print(lock.name); input()'
    )
    child = subprocess.Popen(
        [sys.executable, '-c', program, tmp_path], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline()
        with pytest.raises(UserError, match=f'another process is writing to {tmp_path}.*--run_name'):
            runs.lock_run_directory(tmp_path)
    finally:
        child.kill()
        child.communicate()
    with runs.lock_run_directory(tmp_path), pytest.raises(UserError):
        runs.lock_run_directory(tmp_path)
    runs.lock_run_directory(tmp_path).close()


def test_json_holds_what_a_configuration_holds(tmp_path):
    config = ml_collections.ConfigDict(
        {'dims': (512, 512), 'alpha': 10.0, 'encoder': ml_collections.config_dict.placeholder(str)}
    )
    write_json(
        tmp_path / 'config.json',
        {
            'agent': config,
            'frozen': ml_collections.FrozenConfigDict(config),
            'path': tmp_path,
            'float32': np.float32(0.1),
            'int64': np.int64(3),
            'bool': np.bool_(True),
            'jax': jnp.arange(2),
            'bfloat16': jnp.bfloat16(1.5),
            'nan': [math.nan, np.float32('inf'), np.array([1.0, -np.inf])],
            5: None,
        },
    )
    agent = {'dims': [512, 512], 'alpha': 10.0, 'encoder': None}
    assert json.loads((tmp_path / 'config.json').read_text()) == {
        'agent': agent,
        'frozen': agent,
        'path': str(tmp_path),
        'float32': float(np.float32(0.1)),
        'int64': 3,
        'bool': True,
        'jax': [0, 1],
        'bfloat16': 1.5,
        'nan': [None, None, [1.0, None]],
        '5': None,
    }
    assert os.listdir(tmp_path) == ['config.json']


def test_float32_survives_json_exactly(tmp_path):
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    write_json(tmp_path / 'x.json', {'mean': values})
    stored = np.array(json.loads((tmp_path / 'x.json').read_text())['mean'], np.float32)
    assert stored.tobytes() == values.tobytes()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_json(tmp_path / 'x.json', {'old': 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / 'x.json', {'new': object()})
    with pytest.raises(RuntimeError), runs.atomic_path(tmp_path / 'x.json') as temporary:
        temporary.write_text('half')
        raise RuntimeError
    with pytest.raises(UserError, match=r'cannot write .*x.json: No space left'), runs.atomic_path(tmp_path / 'x.json'):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == ['x.json']
    assert json.loads((tmp_path / 'x.json').read_text()) == {'old': 1}


# --- Metrics log ---


def test_lines_are_on_disk_when_write_returns(path):
    with MetricsLog(path) as log:
        log.write(10, 'pretraining', 0, {'training/loss': jnp.float32(0.25), 'time/updates_per_second': 3})
        assert rows_of(path) == [
            {'step': 10, 'phase': 'pretraining', 'seed': 0, 'training/loss': 0.25, 'time/updates_per_second': 3}
        ]
        assert read_metrics(path) == rows_of(path) and log.lines == 1


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, np.float32('nan'), jnp.float32('inf')])
def test_what_is_not_finite_becomes_null(path, value):
    with MetricsLog(path) as log:
        log.write(1, 'finetuning', 0, {'training/loss': value})
    assert 'NaN' not in path.read_text() and 'Infinity' not in path.read_text()
    assert rows_of(path)[0]['training/loss'] is None


def test_metrics_cannot_pass_for_the_step(path):
    with MetricsLog(path) as log, pytest.raises(ValueError, match='step'):
        log.write(1, 'finetuning', 0, {'step': 3.0})


def test_truncating_keeps_the_first_lines_and_writing_goes_on(path):
    with MetricsLog(path) as log:
        for step in range(5):
            log.write(step, 'pretraining', 0, {})
        log.truncate(3)
        assert log.lines == 3
        log.write(7, 'pretraining', 0, {})
        assert [row['step'] for row in read_metrics(path)] == [0, 1, 2, 7]
        log.truncate(0)
        assert log.lines == 0 and path.read_text() == ''
    assert os.listdir(path.parent) == [path.name]


def test_truncating_to_more_than_there_is_warns_and_keeps_all(path, caplog):
    with MetricsLog(path) as log, caplog.at_level(logging.WARNING):
        log.write(1, 'pretraining', 0, {})
        log.truncate(1)
        assert not caplog.records
        log.truncate(4)
        assert 'has 1 lines where 4 were expected' in caplog.text
        assert log.lines == 1 and len(read_metrics(path)) == 1


@pytest.mark.parametrize('half', [b'{"step": 2, "pha', b'{"step": 2}', b'\0\0\0\0'])
def test_a_half_written_last_line_is_dropped(path, half):
    with MetricsLog(path) as log:
        log.write(1, 'pretraining', 0, {})
    with open(path, 'ab') as file:
        file.write(half)
    assert [row['step'] for row in read_metrics(path)] == [1]
    assert path.read_bytes().endswith(half)  # reading repairs nothing: the writer may be at work
    with MetricsLog(path) as log:
        assert log.lines == 1
        log.write(2, 'pretraining', 0, {})
    assert [row['step'] for row in rows_of(path)] == [1, 2]


@pytest.mark.parametrize('line', ['garbage', '[1]', ''])
def test_a_damaged_line_is_named(path, line):
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=f'{path} is damaged: line 2'):
        read_metrics(path)


def test_a_missing_log_is_a_user_error(path):
    with pytest.raises(UserError, match=f'cannot read {path}: No such file'):
        read_metrics(path)


def test_a_log_that_cannot_be_opened_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match='cannot write'):
        MetricsLog(tmp_path / 'missing' / 'metrics.jsonl')


def test_a_full_disk_is_a_user_error_and_leaves_whole_lines(path):
    """A limit on the size of files stands in for a full disk: the line that does not fit is begun, then taken back."""
    with MetricsLog(path) as log:
        log.write(1, 'pretraining', 0, {'training/loss': 1.0})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
        try:
            with pytest.raises(UserError, match=f'cannot write {path}: .*Make room'):
                log.write(2, 'pretraining', 0, {'training/loss': 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert log.lines == 1 and len(rows_of(path)) == 1
        log.write(3, 'pretraining', 0, {})
    assert [row['step'] for row in rows_of(path)] == [1, 3]


# --- Summary ---


def write_rows(directory, rows):
    with MetricsLog(directory / 'metrics.jsonl') as log:
        for step, phase, seed, metrics in rows:
            log.write(step, phase, seed, metrics)


def evaluations(seed, curve, phase='finetuning', returns=None):
    return [
        (100 + 50 * i, phase, seed, {'evaluation/episode.success': s, 'evaluation/episode.return': r})
        for i, (s, r) in enumerate(zip(curve, returns or [-200 * (1 - s) for s in curve], strict=True))
    ]


def test_summary_of_two_seeds_by_hand(tmp_path):
    rows = [(100, 'pretraining', seed, {'training/loss': 5.0, runs.WALL_TIME_KEY: 8.5}) for seed in (3, 4)]
    rows += evaluations(3, [0.0, 0.5, 1.0, 0.6, 0.8]) + evaluations(4, [0.0, 0.2, 0.4, 0.4, 0.1])
    rows += [(300, 'finetuning', seed, {'training/loss': math.nan, runs.WALL_TIME_KEY: 20.0}) for seed in (3, 4)]
    write_rows(tmp_path, rows)
    summary = write_summary(tmp_path)
    assert json.loads((tmp_path / 'summary.json').read_text()) == summary
    assert summary['seeds'] == [3, 4]
    assert summary['steps'] == {'pretraining': 100, 'finetuning': 300}
    assert summary['wall_seconds'] == 20.0

    success = summary['per_seed']['3']['episode.success']
    assert success == pytest.approx(
        {'evaluations': 5, 'first': 0.0, 'final': 0.8, 'final_three': 0.8, 'best': 1.0, 'stability': 0.8}
    )
    other = summary['per_seed']['4']['episode.success']
    assert other['final_three'] == pytest.approx(0.3) and other['stability'] == pytest.approx(0.75)
    assert summary['mean']['episode.success']['final_three'] == pytest.approx(0.55)
    assert summary['std']['episode.success']['final_three'] == pytest.approx(0.5 / math.sqrt(2))
    assert summary['mean']['episode.success']['stability'] == pytest.approx(0.775)

    returns = summary['per_seed']['3']['episode.return']
    assert returns['best'] == 0.0 and returns['final_three'] == pytest.approx(-40.0)
    assert returns['stability'] is None  # the best is not positive
    assert summary['per_seed']['3']['last']['training/loss'] is None
    assert summary['per_seed']['3']['last']['evaluation/episode.success'] == 0.8


def test_summary_of_one_seed_has_no_spread_and_takes_what_evaluations_there_are(tmp_path):
    write_rows(tmp_path, evaluations(0, [0.25, 0.75]))
    summary = write_summary(tmp_path)
    assert summary['mean']['episode.success']['final_three'] == 0.5
    assert summary['std']['episode.success']['final_three'] is None


def test_summary_of_pretraining_alone_has_no_scores(tmp_path):
    write_rows(tmp_path, [(10, 'pretraining', 0, {'training/loss': 1.0})])
    summary = write_summary(tmp_path)
    assert summary['mean']['episode.success']['final_three'] is None
    assert summary['per_seed']['0']['episode.return']['evaluations'] == 0
    assert summary['wall_seconds'] is None


def test_summary_of_an_empty_log(tmp_path):
    write_rows(tmp_path, [])
    assert write_summary(tmp_path)['seeds'] == []


def test_summary_without_success(tmp_path):
    write_rows(tmp_path, [(10, 'finetuning', 0, {'evaluation/episode.return': 80.0})])
    summary = write_summary(tmp_path)
    assert summary['per_seed']['0']['episode.success']['best'] is None
    assert summary['per_seed']['0']['episode.return']['stability'] == 1.0


# --- Environment ---


def test_environment_info_is_json_and_names_the_packages(tmp_path):
    info = runs.environment_info()
    write_json(tmp_path / 'x.json', info)
    assert {'jax', 'flax', 'numpy', 'orbax-checkpoint'} <= set(info['packages'])
    assert info['backend'] and info['device_count'] >= 1


def test_git_commit_is_read_from_this_checkout_only(tmp_path, monkeypatch):
    def git(*arguments):
        command = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', tmp_path, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / 'project' / 'utils').mkdir(parents=True)
    monkeypatch.setattr(runs, '__file__', str(tmp_path / 'project' / 'utils' / 'runs.py'))
    git('init')
    git('commit', '--allow-empty', '-m', 'first')
    assert runs.environment_info()['git_commit'] is None  # a repository further up is none of ours
    monkeypatch.setattr(runs, '__file__', str(tmp_path / 'utils' / 'runs.py'))
    info = runs.environment_info()
    assert info['git_commit'] == git('rev-parse', 'HEAD') and info['git_changed'] is False
