"""The job that docs/scaling.md has for SLURM, on a real one.

Skipped where SLURM is not installed: `tests/slurm_cluster.py` says which packages it takes.
"""

import itertools
import os
import re
import signal
import sys
import time

import numpy as np
import pytest

from tests import slurm_cluster, tiny
from tests.waiting import has_lines, wait_until
from utils import runs

pytestmark = [pytest.mark.slow, slurm_cluster.needed]

FLAGS = (
    '--env_name=none --agent=agents/iql.py --preset=smoke --run_group=paper --chunk_size=20 --log_interval=20 '
    '--save_interval=200 --pretraining_steps=400 --finetuning_steps=600 --dataset={shared}/walks.npz'
)
STEPS = range(20, 1020, 20)


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    with slurm_cluster.cluster(XDG_CACHE_HOME=str(tmp_path_factory.mktemp('cache'))) as call:
        yield call


class Job:
    """The documented job with a small run in place of the paper's, all of whose files are in `shared`."""

    def __init__(self, call, shared):
        self.call = call
        self.run_directory = shared / 'exp' / 'paper' / 'cube-single'
        self.output = shared / 'output.log'
        script = re.search(
            r'#!/bin/bash\n.*?(?=```)', (slurm_cluster.ROOT / 'docs' / 'scaling.md').read_text(), re.DOTALL
        ).group()
        replacements = {
            'python main.py': f'{sys.executable} main.py',
            '--env_name=cube-single-play-singletask-task1-v0': FLAGS.format(shared=shared),
        }
        for documented, ours in replacements.items():
            assert documented in script
            script = script.replace(documented, ours)
        self.script = shared / 'job.sh'
        self.script.write_text(script.replace('/shared/', f'{shared}/'))

    def submit(self, num_tasks):
        """One node in place of two, with `num_tasks` processes."""
        options = '--parsable', '--nodes=1', f'--ntasks-per-node={num_tasks}', f'--output={self.output}'
        self.id = self.call('sbatch', *options, str(self.script)).strip()

    def shows(self, name):
        return re.search(rf'\b{name}=(\S+)', self.call('scontrol', 'show', 'job', self.id)).group(1)

    def progress(self):
        return f'{self.shows("JobState")}\n{self.output.read_text() if self.output.exists() else ""}'

    def wait_for_lines(self, lines):
        wait_until(lambda: has_lines(self.run_directory, lines), self.progress, seconds=240)

    def wait_for_end(self):
        """Returns the last state: COMPLETED, FAILED, …"""
        going = 'PENDING', 'CONFIGURING', 'RUNNING', 'COMPLETING'
        wait_until(lambda: self.shows('JobState') not in going, self.progress, seconds=240, pause=0.1)
        return self.shows('JobState')

    def logged_once(self):
        """Whether every seed has its line at every step, and none has two."""
        rows = runs.read_metrics(self.run_directory / 'metrics.jsonl')
        logged = [(row['step'], row['seed']) for row in rows if 'training/loss' in row]
        return sorted(logged) == list(itertools.product(STEPS, range(8)))


@pytest.fixture
def job(cluster, tmp_path):
    np.savez(tmp_path / 'walks.npz', **tiny.random_walks(labelled=True))
    job = Job(cluster, tmp_path)
    yield job
    job.call('scancel', job.id)


def test_the_documented_job_saves_at_the_warning_is_queued_again_and_ends(job):
    job.submit(num_tasks=2)
    job.wait_for_lines(8)
    job.call('scancel', '--signal=TERM', job.id)  # As --signal=TERM@600 does: to the processes, not to the script.
    assert job.wait_for_end() == 'COMPLETED'
    assert job.shows('Restarts') == '1'
    assert (job.run_directory / 'summary.json').exists()
    output = job.output.read_text()
    assert 'SIGTERM: stopped at step' in output
    assert 'start: this run’s own checkpoint' in output
    assert 'devices: 2 (seed) × 1 (batch)' in output
    assert job.logged_once()


def test_a_lost_process_fails_the_job_which_goes_on_with_fewer(job):
    job.submit(num_tasks=2)
    job.wait_for_lines(8 * 12)
    processes = job.call('pgrep', '-f', f'^{sys.executable} main.py .*--save_dir={job.run_directory.parents[1]}')
    os.kill(int(processes.split()[-1]), signal.SIGKILL)
    lost = time.monotonic()
    assert job.wait_for_end() == 'FAILED'
    assert time.monotonic() - lost < 60
    job.submit(num_tasks=1)
    assert job.wait_for_end() == 'COMPLETED'
    assert (job.run_directory / 'summary.json').exists()
    output = job.output.read_text()
    assert re.search(r'srun: error: .*: task \d: Killed', output)
    assert 'start: this run’s own checkpoint' in output
    assert job.logged_once()
