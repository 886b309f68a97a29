"""The launcher with a stand-in for main.py: failures stay alone, what is finished is skipped, what was stopped resumes;
the same through submitit."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sweeps import local, slurm
from sweeps.sweep_files import expand
from tests import slurm_cluster
from tests.waiting import wait_until
from utils.errors import UserError
from utils.run_status import FINISHED, run_status

ROOT = Path(__file__).resolve().parents[1]

# A run that α decides: 1 finishes, 2 fails, 3 is killed, 4 waits for SIGTERM, saves and finishes when started again.
PROGRAM = """
import json, os, pathlib, signal, sys, time
flags = dict(argument[2:].split('=', 1) for argument in sys.argv[1:])
run = pathlib.Path(flags['save_dir']) / flags['run_group'] / flags['run_name']
alpha = int(flags['agent.alpha'])
with open(run / 'starts', 'a') as file:
    print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION'), file=file)
if hasattr(os, 'sched_getaffinity'):
    (run / 'cores').write_text(json.dumps(sorted(os.sched_getaffinity(0))))
config = {'pretraining_steps': 0, 'finetuning_steps': 10, 'agent': {'alpha': alpha}, 'seed': 0}
(run / 'config.json').write_text(json.dumps(config | {'env_name': flags['env_name']}))
(run / 'metrics.jsonl').write_text('{"step": 5}\\n')
if alpha == 2:
    print('progress 50%\\rprogress 60%', end='\\r')
    sys.exit('error: no data here')
if alpha == 3:
    os.kill(os.getpid(), signal.SIGKILL)
if alpha == 4 and not (run / 'saved').exists():
    def save(*_):
        (run / 'saved').touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    (run / 'parent').write_text(str(os.getppid()))
    (run / 'waiting').touch()
    time.sleep(60)
(run / 'metrics.jsonl').write_text('{"step": 10}\\n')
(run / 'summary.json').write_text('{"steps": {"finetuning": 10}}')
"""


@pytest.fixture
def sweep(tmp_path):
    """sweep(*alphas) → a sweep file of runs of the program above."""

    def write(*alphas):
        (tmp_path / 'program.py').write_text(PROGRAM)
        path = tmp_path / 'tiny.yaml'
        parameters = {
            'env_name': {'value': 'walker_run'},
            'agent.alpha': {'values': list(alphas)},
            'save_dir': {'value': str(tmp_path / 'exp')},
        }
        path.write_text(
            yaml.safe_dump({'program': str(tmp_path / 'program.py'), 'method': 'grid', 'parameters': parameters})
        )
        return path

    return write


def label(alpha):
    return f'tiny/walker_run_infom_alpha={alpha}_sd0'


def starts(run):
    path = run.directory / 'starts'
    return path.read_text().splitlines() if path.exists() else []


# ------------------------------------------------------------------------------------------------------------ local


def test_failures_stay_alone_and_the_next_launch_takes_up_the_rest(sweep, tmp_path):
    runs = expand(sweep(1, 2, 3, 5))
    outcome = local.launch(runs, jobs=2)
    assert sorted(outcome.finished) == [label(1), label(5)]
    assert outcome.failed == {label(2): 'exit code 1: error: no data here', label(3): 'killed by SIGKILL'}
    (tmp_path / 'program.py').write_text(PROGRAM.replace('alpha == 2', 'False'))
    outcome = local.launch(runs, jobs=2)
    assert outcome.skipped == [label(1), label(5)]
    assert outcome.finished == [label(2)]
    assert list(outcome.failed) == [label(3)]
    assert [len(starts(run)) for run in runs] == [1, 2, 2, 1]


def test_a_run_that_was_stopped_is_no_success_and_resumes(sweep):
    (run,) = expand(sweep(4))
    process = subprocess.Popen([sys.executable, '-c', 'import sys; sys.exit(0)'])
    run.directory.mkdir(parents=True)
    assert local.failure(run, process.wait()) == (
        'stopped before its end (config.json is missing): start again to resume'
    )
    (run.directory / 'saved').touch()
    assert local.launch([run], jobs=1).finished == [label(4)]


def test_a_finished_run_with_other_settings_is_neither_skipped_nor_overwritten(sweep):
    (run,) = expand(sweep(1))
    local.launch([run], jobs=1)
    other = type(run)(run.program, run.flags | {'agent.alpha': 7})
    outcome = local.launch([other], jobs=1)
    assert 'is finished with agent.alpha=1, now it is 7' in outcome.failed[label(1)]
    assert len(starts(run)) == 1


@pytest.mark.parametrize(
    ('there', 'asked'),
    [(0.001, '1e-3'), ([256, 256], '(256, 256)'), ([256, 256], [256, 256]), (None, 'none'), (3, 3.0), ('a', 'a')],
)
def test_the_same_setting_written_otherwise_is_the_same(sweep, there, asked):
    (run,) = expand(sweep(1))
    local.launch([run], jobs=1)
    path = run.directory / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {'agent': {'alpha': there}}))
    assert local.already_done(type(run)(run.program, run.flags | {'agent.alpha': asked}))
    with pytest.raises(UserError, match='is finished with'):
        local.already_done(type(run)(run.program, run.flags | {'agent.alpha': 0.5}))


def test_a_run_in_the_way_does_not_stop_the_others(sweep):
    """For both backends: what can be run is told from what cannot, with the reason."""
    (run,) = expand(sweep(1))
    local.launch([run], jobs=1)
    other, free = (type(run)(run.program, run.flags | more) for more in ({'agent.alpha': 7}, {'run_name': 'free'}))
    done, waiting, failed = local.sort_by_status([other, run, free])
    assert (done, waiting) == ([run], [free])
    assert 'is finished with agent.alpha=1, now it is 7' in failed[label(1)]


def test_a_run_that_cannot_be_started_fails_alone(sweep):
    runs = expand(sweep(5, 1, 6))
    runs[1].directory.parent.mkdir(parents=True)
    runs[1].directory.write_text('a file in the way')
    outcome = local.launch(runs, jobs=2)
    assert sorted(outcome.finished) == [label(5), label(6)]
    assert list(outcome.failed) == [label(1)]
    assert outcome.failed[label(1)].startswith('it cannot be started: ')
    assert 'File exists' in outcome.failed[label(1)]


def test_an_unforeseen_error_stops_the_running_runs_which_save(sweep, monkeypatch):
    saves, other = expand(sweep(4, 5))

    def start(run, *arguments, real=local._start):
        if run is other:
            wait_until((saves.directory / 'waiting').exists, 'the run', seconds=60)
            raise ZeroDivisionError
        return real(run, *arguments)

    monkeypatch.setattr(local, '_start', start)
    with pytest.raises(ZeroDivisionError):
        local.launch([saves, other], jobs=2)
    assert (saves.directory / 'saved').exists()


def test_jobs_take_the_gpus_in_turn_and_share_their_memory(sweep, monkeypatch):
    monkeypatch.delenv('XLA_PYTHON_CLIENT_MEM_FRACTION', raising=False)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    runs = expand(sweep(5, 6, 7, 8))
    local.launch(runs, jobs=4, gpus=['2', '3'])
    assert sorted(line for run in runs for line in starts(run)) == ['2 0.45', '2 0.45', '3 0.45', '3 0.45']


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='processes cannot be bound to cores here')
def test_jobs_have_cores_of_their_own(sweep, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {1, 2, 4, 7, 8})
    assert [local.cores_of(job, 2) for job in range(2)] == [{1, 4, 8}, {2, 7}]
    assert local.cores_of(0, 6) is None
    monkeypatch.undo()

    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, range(os.cpu_count()))
        everything = os.sched_getaffinity(0)
        if len(everything) == 1:
            pytest.skip('one core')
        runs = expand(sweep(5, 6))
        local.launch(runs, jobs=2)
        first, second = (set(json.loads((run.directory / 'cores').read_text())) for run in runs)
        assert first | second == everything
        assert not first & second
        assert os.sched_getaffinity(0) == everything
    finally:
        os.sched_setaffinity(0, before)


def command(*arguments):
    return [sys.executable, '-m', 'sweeps.launch', *map(str, arguments)]


def test_the_command_says_last_what_failed_and_why(sweep):
    path = sweep(1, 2)
    result = subprocess.run(command(path, '--jobs=2'), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines()[-1] == (
        f'1 finished, 0 were finished before, 1 failed; {label(2)}: exit code 1: error: no data here'
    )
    result = subprocess.run(command(path, '--only=alpha=1'), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == '0 finished, 1 were finished before, 0 failed'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_stopping_the_launcher_stops_its_runs_which_save(sweep, number):
    path = sweep(4)
    (run,) = expand(path)
    # Tests that a shell runs in the background ignore SIGINT, and would pass that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    launcher = subprocess.Popen(command(path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        wait_until((run.directory / 'waiting').exists, 'the run', seconds=60)
        launcher.send_signal(number)
        output, errors = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == 130, errors
    assert (run.directory / 'saved').exists()
    assert 'the same command resumes' in output
    assert subprocess.run(command(path), cwd=ROOT, capture_output=True).returncode == 0
    assert run_status(run.directory) == FINISHED


def test_bad_input_ends_with_one_line_and_exit_code_2(sweep, tmp_path):
    path = sweep(1)
    for arguments, message in (
        ([tmp_path / 'absent.yaml'], 'cannot read'),
        ([path, '--only=nothing'], '--only=nothing matches no run'),
        ([path, '--only=['], '--only=[ is no regular expression'),
        ([path, '--set=seed=0,1'], '--seed=0,1: expected one whole number'),
        ([path, '--set=agent.alhpa=1'], '--agent.alhpa is no flag'),
        ([path, '--jobs=0'], 'jobs'),
    ):
        result = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 2, result.stderr
        assert message in result.stderr
        assert result.stderr.count('\n') == 1


# ------------------------------------------------------------------------------------------------------------ SLURM


def test_without_submitit_one_line_says_what_to_install(sweep, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'submitit', None)
    with pytest.raises(UserError, match='pip install "submitit'):
        slurm.submit(expand(sweep(1)), tmp_path, 1, {})


def test_without_slurm_or_with_an_unknown_parameter_a_line_says_so(sweep, monkeypatch, tmp_path):
    pytest.importorskip('submitit')
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(UserError, match='SLURM does not take the jobs'):
        slurm.submit(expand(sweep(1)), tmp_path, 1, {})
    with pytest.raises(UserError, match=r'SLURM does not take the jobs.*walltime'):
        slurm.submit(expand(sweep(1)), tmp_path, 1, {'walltime': 3}, cluster='local')


@pytest.fixture
def here(monkeypatch):
    """The jobs' processes find the project."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))


def test_jobs_of_submitit_finish_or_fail_alone(sweep, here, tmp_path):
    pytest.importorskip('submitit')
    runs = expand(sweep(1, 2))
    good, bad = slurm.submit(runs, tmp_path / 'submitit', 2, {'timeout_min': 5}, cluster='local')
    assert good.result() == label(1)
    assert 'exit code 1: error: no data here' in str(bad.exception())


def test_a_preempted_job_saves_is_queued_again_and_resumes(sweep, here, tmp_path):
    pytest.importorskip('submitit')
    (run,) = expand(sweep(4))
    (job,) = slurm.submit([run], tmp_path / 'submitit', 1, {'timeout_min': 5}, cluster='local')
    wait_until((run.directory / 'waiting').exists, 'the run', seconds=60)
    os.kill(int((run.directory / 'parent').read_text()), signal.SIGUSR2)  # SLURM's warning to the job
    assert job.result() == label(4)
    assert (run.directory / 'saved').exists()
    assert len(starts(run)) == 2
    assert run_status(run.directory) == FINISHED
    assert os.listdir(tmp_path / 'submitit')


@pytest.mark.slow
@slurm_cluster.needed
def test_an_array_of_a_real_slurm_fails_alone_is_queued_again_and_resumes(sweep, tmp_path):
    pytest.importorskip('submitit')
    path = sweep(1, 2, 4)
    good, bad, preempted = expand(path)
    with slurm_cluster.cluster() as call:

        def states():
            return call('squeue', '--noheader', '--states=all', '--sort=i', '--format=%T').split()

        output = call(*command(path, '--backend=slurm', '--jobs=3', '--slurm=gpus_per_node=1', '--slurm=timeout_min=5'))
        jobs = re.findall(r'^(\d+_\d+)  tiny/', output, re.MULTILINE)
        assert len(jobs) == 3
        wait_until((preempted.directory / 'waiting').exists, 'the run', seconds=60)
        call('scancel', '--signal=USR2', jobs[2])  # SLURM's warning, as submitit asks for it.
        wait_until(lambda: set(states()) <= {'COMPLETED', 'FAILED'}, states, seconds=240, pause=0.5)
        assert states() == ['COMPLETED', 'FAILED', 'COMPLETED']
        assert 'nothing to submit' in call(*command(sweep(1, 4), '--backend=slurm'))
    assert [len(starts(run)) for run in (good, bad, preempted)] == [1, 1, 2]
    assert (preempted.directory / 'saved').exists()
    assert run_status(preempted.directory) == FINISHED
