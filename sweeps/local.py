"""Runs of a sweep as processes of this machine, N at a time: what is finished is skipped, what was interrupted goes on,
what fails is noted and does not stop the rest."""

import ast
import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from sweeps.sweep_files import Run
from utils.errors import UserError, last_line
from utils.run_config import OPERATIONAL_FLAGS, flag_fields
from utils.run_status import FINISHED, read_json, run_status

LOG_NAME = 'launch.log'
POLL_SECONDS = 0.2


@dataclasses.dataclass
class Outcome:
    """How a launch went: labels of runs by what became of them; `failed` with the reason."""

    finished: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    interrupted: bool = False

    def summary(self) -> str:
        """One line."""
        counts = f'{len(self.finished)} finished, {len(self.skipped)} were finished before, {len(self.failed)} failed'
        return '; '.join([counts, *(f'{label}: {reason}' for label, reason in self.failed.items())])


def already_done(run: Run) -> bool:
    """Whether the run's directory holds it, finished.

    Raises:
        UserError: it holds a finished run with other settings.
    """
    if run_status(run.directory) != FINISHED:
        return False
    config = read_json(run.directory / 'config.json')
    for name, value in run.flags.items():
        if name.startswith('agent.'):
            there = config['agent'].get(name.removeprefix('agent.'))
        elif name in flag_fields() and name not in OPERATIONAL_FLAGS | {'log_interval'}:
            there = config.get(name)
        else:
            continue
        if _plain(there) != _plain(value):
            raise UserError(
                f'{run.directory} is finished with {name}={there}, now it is {value}: '
                'choose another --save_dir, or move it away'
            )
    return True


def sort_by_status(runs: Sequence[Run]) -> tuple[list[Run], list[Run], dict[str, str]]:
    """(finished, to be run, {label: reason why it cannot be run})."""
    done, waiting, failed = [], [], {}
    for run in runs:
        try:
            (done if already_done(run) else waiting).append(run)
        except UserError as error:
            failed[run.label] = str(error)
    return done, waiting, failed


def _plain(value: Any) -> Any:
    """As JSON has it: tuples and lists alike, 1 and 1.0 alike, text as what the command line takes it for."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float)) else str(value).lower()


def launch(runs: Sequence[Run], jobs: int, gpus: Sequence[str] = ()) -> Outcome:
    """Runs them all, `jobs` at a time, with a progress bar. The output of each goes to `launch.log` in its directory.

    gpus: the devices that the jobs take in turn, as CUDA_VISIBLE_DEVICES names them; none: left as they are.
    Ctrl-C or SIGTERM stops the running ones, which save, and waits for them; so does whatever else ends this.
    """
    done, unfinished, failed = sort_by_status(runs)
    outcome, waiting = Outcome(skipped=[run.label for run in done], failed=failed), deque(unfinished)
    free = list(range(jobs))[::-1]  # Numbers of the jobs that may start; each keeps to its GPU.
    running: dict[int, tuple[Run, subprocess.Popen]] = {}
    with (
        tqdm(total=len(runs), initial=len(runs) - len(waiting), unit='run', dynamic_ncols=True) as bar,
        _interruptible(),
    ):
        try:
            while waiting or running:
                while waiting and free:
                    job, run = free.pop(), waiting.popleft()
                    try:
                        running[job] = run, _start(run, job, jobs, gpus)
                    except OSError as error:  # A file in the way, a full disk: the others may have a better place.
                        free.append(job)
                        _note_failure(outcome, run, f'it cannot be started: {error}')
                        bar.update()
                time.sleep(POLL_SECONDS)
                for job, (run, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        free.append(job)
                        _note_end(outcome, run, process.returncode)
                        bar.update()
                        bar.set_postfix(running=len(running), failed=len(outcome.failed))
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
            for run, process in running.values():
                _note_end(outcome, run, process.returncode)
    return outcome


def _start(run: Run, job: int, jobs: int, gpus: Sequence[str]) -> subprocess.Popen:
    environment = dict(os.environ)
    if gpus:
        environment['CUDA_VISIBLE_DEVICES'] = gpus[job % len(gpus)]
    sharing = -(-jobs // max(len(gpus), 1))
    # Or the first process on a GPU would take three quarters of its memory.
    if sharing > 1 and not environment.keys() & {'XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'}:
        environment['XLA_PYTHON_CLIENT_MEM_FRACTION'] = f'{0.9 / sharing:.2f}'
    run.directory.mkdir(parents=True, exist_ok=True)
    with open(run.directory / LOG_NAME, 'ab') as log:
        log.write(f'$ {" ".join(run.command())}\n'.encode())
        log.flush()
        with _on_cores(cores_of(job, jobs)):
            # A session of its own: Ctrl-C reaches the launcher alone, which passes it on once.
            return subprocess.Popen(
                run.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip


def cores_of(job: int, jobs: int) -> set[int] | None:
    """The share of this process's cores that is one job's own; None where there are too few, or none can be chosen."""
    if not hasattr(os, 'sched_getaffinity'):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[job::jobs]) if jobs <= len(cores) else None


@contextlib.contextmanager
def _on_cores(cores: set[int] | None) -> Iterator[None]:
    """What starts in the block runs on `cores` only. XLA takes all that it sees: two processes that train on the same
    two cores made 14 updates a second each, on a core of their own 24."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _note_end(outcome: Outcome, run: Run, code: int) -> None:
    reason = failure(run, code)
    if reason is None:
        outcome.finished.append(run.label)
    else:
        _note_failure(outcome, run, reason, f' (see {run.directory / LOG_NAME})')


def _note_failure(outcome: Outcome, run: Run, reason: str, where: str = '') -> None:
    outcome.failed[run.label] = reason
    tqdm.write(f'failed: {run.label}: {reason}{where}')


def failure(run: Run, code: int) -> str | None:
    """Why an ended process did not finish its run, or None if it did."""
    if code < 0:
        return f'killed by {signal.Signals(-code).name}'
    status = run_status(run.directory)
    if code:
        log = run.directory / LOG_NAME
        output = log.read_text(errors='replace') if log.exists() else ''
        return f'exit code {code}: {last_line(output) or "no output"}'
    return None if status == FINISHED else f'stopped before its end ({status}): start again to resume'


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM stops the block like Ctrl-C."""

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
