"""Several real processes, over loopback: they train to what one trains to, and do not outlive one another."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.waiting import has_lines, wait_until
from utils import checkpoints, processes, runs
from utils.errors import ProcessLost

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LONG = '--pretraining_steps=4000', '--log_interval=40', '--eval_interval=40', '--save_interval=200', '--chunk_size=40'


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    """Processes share one compilation cache, which is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        yield


def start(save_dir, *arguments):
    command = [sys.executable, '-m', 'tests.one_of_several', str(save_dir), '--agent=iql', *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_two(save_dirs, *arguments):
    """Both run on one machine and see one device each."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    flags = '--distributed', f'--coordinator_address=127.0.0.1:{port}', '--num_processes=2'
    return [start(path, *flags, f'--process_id={i}', *arguments) for i, path in enumerate(save_dirs)]


@pytest.fixture
def running():
    """A list of processes, of which none is left in the end."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def finish(process, timeout=300):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def wait_for_lines(run_dir, lines, alive):
    wait_until(lambda: has_lines(run_dir, lines) or any(process.poll() is not None for process in alive), 'lines')
    for process in alive:
        assert process.poll() is None, process.communicate()[0]


def params(run_dir):
    return {k: v for k, v in checkpoints.read_arrays(run_dir).items() if k.startswith('params')}


@pytest.mark.parametrize('arguments', [('--num_seeds=2',), ('--mesh_batch=2', '--eval_async')])
def test_two_processes_train_to_the_same_parameters_as_one(running, tmp_path, arguments):
    """Two seeds, one on each; and one seed, half of each batch on each. The second process writes nothing."""
    running += start_two([tmp_path / 'two', tmp_path / 'nothing'], *arguments)
    for process in running:
        code, output = finish(process)
        assert code == 0, output
    alone = start(tmp_path / 'one', *(flag for flag in arguments if 'mesh' not in flag))
    assert finish(alone)[0] == 0
    assert not (tmp_path / 'nothing').exists()
    one, two = params(tmp_path / 'one/g/r'), params(tmp_path / 'two/g/r')
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-4, rtol=1e-3, err_msg=name)
    rows = [runs.read_metrics(tmp_path / name / 'g/r/metrics.jsonl') for name in ('one', 'two')]
    assert [(row['step'], row['seed'], *row) for row in rows[0]] == [
        (row['step'], row['seed'], *row) for row in rows[1]
    ]


@pytest.mark.parametrize('lost', [0, 1])
def test_a_lost_process_ends_the_other_and_fewer_go_on(running, tmp_path, lost):
    """Whether it is the first, which coordinates, or another."""
    arguments = '--num_seeds=2', '--finetuning_steps=0', *LONG
    running += start_two([tmp_path, tmp_path], *arguments)
    wait_for_lines(tmp_path / 'g/r', 2 * 12, running)
    running[lost].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code, output = finish(running[1 - lost], timeout=60)
    assert time.monotonic() - killed < 60 and code not in (0, None)
    assert 'lost touch with the others' in output or 'another task died' in output, output
    saved = checkpoints.latest_step(tmp_path / 'g/r/checkpoints')
    assert 200 <= saved < 4000
    resumed = start(tmp_path, *arguments)
    running.append(resumed)
    code, output = finish(resumed)
    assert code == 0, output
    assert f'own checkpoint ({tmp_path}/g/r/checkpoints/{saved})' in output
    rows = runs.read_metrics(tmp_path / 'g/r/metrics.jsonl')
    logged = [row['step'] for row in rows if row['seed'] == 1 and row['phase'] == 'pretraining']
    assert logged == list(range(40, 4001, 40))


def test_a_signal_to_one_stops_both_at_the_same_step(running, tmp_path):
    running += start_two([tmp_path, tmp_path], '--num_seeds=2', '--finetuning_steps=0', *LONG)
    wait_for_lines(tmp_path / 'g/r', 2, running)
    running[1].send_signal(signal.SIGTERM)
    (code, output), (other_code, _) = [finish(process) for process in running]
    assert (code, other_code) == (0, 0), output
    saved = checkpoints.latest_step(tmp_path / 'g/r/checkpoints')
    assert f'SIGTERM: stopped at step {saved} ' in output
    assert saved < 4000 and saved % 40 == 0


def test_only_what_the_loss_of_a_process_looks_like_is_called_that(monkeypatch):
    import jax

    lost = jax.errors.JaxRuntimeError('UNKNOWN: Gloo all-gather failed: Connection closed by peer')
    processes.explain(lost, None)  # Alone, there is nobody to lose.
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    for error in (None, ValueError('no'), jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')):
        processes.explain(error, None)
    with pytest.raises(ProcessLost, match=r'last checkpoint is exp/3, .*Connection closed by peer'):
        processes.explain(lost, 'exp/3')
