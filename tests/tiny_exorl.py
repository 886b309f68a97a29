"""Ten tiny real episodes of ExORL's cheetah, and jobs without processes of their own, for the tests of its data."""

import functools

import numpy as np
import pytest

from envs import exorl_episodes, worker_pool

STEPS = 6
SIZES = (5 * STEPS, 2 * STEPS, STEPS, STEPS)  # Nine episodes.


@functools.lru_cache
def recorder(folder):
    from envs import exploration

    return exploration.EpisodeRecorder('cheetah', STEPS, folder)


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    """Ten real episodes of cheetah; not to be changed."""
    folder = tmp_path_factory.mktemp('raw')
    buffer = exorl_episodes.buffer_path(folder, 'cheetah', 'rnd')
    buffer.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(10):
        recorder(buffer).start(index, seed=index)
        for _ in range(STEPS):
            recorder(buffer).step(generator.uniform(-1, 1, 6).astype(np.float32))
        recorder(buffer).finish()
    (buffer / 'notes.txt').write_text('something else')
    return folder


@pytest.fixture
def jobs_in_this_process(monkeypatch):
    """Starting a process with a simulator takes seconds; tests of the commands do."""

    def run_jobs(make_runner, arguments, jobs, workers):
        run = make_runner(*arguments)
        for job in reversed(jobs):  # The order of completion is nobody's business.
            yield job, run(job)

    class Crew:
        def __init__(self, make_runner, arguments):
            self._runners = [make_runner(*each) for each in arguments]

        def send(self, jobs):
            self._results = [run(job) for run, job in zip(self._runners, jobs, strict=True)]

        def receive(self):
            return self._results

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(worker_pool, 'run_jobs', run_jobs)
    monkeypatch.setattr(worker_pool, 'Crew', Crew)


def episodes_of(folder, domain='cheetah', algo='rnd'):
    arrays = []
    for path in exorl_episodes.list_episodes(exorl_episodes.buffer_path(folder, domain, algo)):
        with np.load(path) as archive:
            arrays.append({name: archive[name] for name in archive.files})
    return arrays


def copy_of(raw, folder):
    buffer = exorl_episodes.buffer_path(folder, 'cheetah', 'rnd')
    buffer.mkdir(parents=True)
    for path in exorl_episodes.list_episodes(exorl_episodes.buffer_path(raw, 'cheetah', 'rnd')):
        (buffer / path.name).write_bytes(path.read_bytes())
    return buffer
