"""Runs of a sweep as an array of SLURM jobs, through the library submitit (an optional dependency).

A job that is preempted, or whose time ends, saves, is queued again and resumes: main.py resumes by being started
again.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.local import LOG_NAME, POLL_SECONDS, failure
from sweeps.sweep_files import Run
from utils.errors import UserError
from utils.run_status import FINISHED, run_status

SAVING_SECONDS = 80  # SLURM gives a job 90 seconds from the warning to the end, as submitit asks for it.
MOST_TIMEOUTS = 100


class Job:
    """What runs on the node: the run's process. submitit pickles it, so it holds no process before it is called."""

    def __init__(self, run: Run, python: str = sys.executable):
        self.run, self.python = run, python
        self.process = None

    def __call__(self) -> str:
        """Starts the run and waits for it. Raises `RuntimeError` where it failed: the job counts as failed."""
        self.run.directory.mkdir(parents=True, exist_ok=True)
        with open(self.run.directory / LOG_NAME, 'ab') as log:
            # SLURM's warning goes to every process of the job; it is the job's to act on, and would end the run.
            self.process = subprocess.Popen(
                self.run.command(self.python), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                preexec_fn=_ignore_warnings,
            )  # fmt: skip
            while (code := self.process.poll()) is None:
                time.sleep(POLL_SECONDS)
        if code == 0 and run_status(self.run.directory) != FINISHED:
            # Told to stop before this process was (SLURM may signal all of a job at once): `checkpoint` is about to be
            # called, and does not come back.
            time.sleep(SAVING_SECONDS)
        reason = failure(self.run, code)
        if reason is not None:
            raise RuntimeError(f'{self.run.label}: {reason}')
        return self.run.label

    def checkpoint(self):
        """What submitit calls at SLURM's warning: stops the run, which saves, and asks for the same job again."""
        import submitit

        if self.process is not None:
            self.process.terminate()
            if not _ended(self.process.pid, SAVING_SECONDS):  # It loses the updates since its last checkpoint.
                self.process.kill()
        return submitit.helpers.DelayedSubmission(Job(self.run, self.python))


def _ended(pid: int, seconds: float) -> bool:
    """Whether a child ends within this time. Not `Popen.wait`: the signal may have come while that held its lock."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
        except ChildProcessError:  # Reaped already.
            return True
        time.sleep(POLL_SECONDS)
    return False


def _ignore_warnings() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def submit(runs: Sequence[Run], folder: Path, jobs: int, parameters: Mapping[str, Any], cluster: str = 'slurm') -> list:
    """Submits the runs as one array, `jobs` of them at a time, and returns submitit's jobs.

    folder: for submitit's own files. parameters: for `submitit.AutoExecutor.update_parameters`, as in
    {'timeout_min': 1440, 'gpus_per_node': 1, 'slurm_partition': 'gpu'}.

    Raises:
        UserError: submitit or SLURM is missing, or does not take the parameters.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError('--backend=slurm needs submitit: pip install "submitit>=1.5,<2"') from error
    try:
        # A run may be longer than a job: each time its time ends, it is queued again.
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=MOST_TIMEOUTS)
        executor.update_parameters(
            name='infom', timeout_min=60 * 24, cpus_per_task=4, stderr_to_stdout=True, slurm_array_parallelism=jobs
        )
        executor.update_parameters(**parameters)
        with executor.batch():  # One array.
            return [executor.submit(Job(run)) for run in runs]
    except (RuntimeError, NameError, TypeError, ValueError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f'SLURM does not take the jobs: {error}') from error
