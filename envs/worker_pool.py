"""Runs jobs in spawned worker processes that die with their parent, and that nobody has to clean up after.

`concurrent.futures` would leave its workers waiting for ever when the parent is killed: every worker holds both ends of
the shared queue. Here each worker has a pipe of its own, and the end of the pipe is the end of the worker. What a job
is, is not known here.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import traceback

from utils.errors import UserError

# One thread a worker: the workers already fill the cores, and tiny matrices gain nothing from a team of threads.
SINGLE_THREADED = {
    name: '1' for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'NUMEXPR_NUM_THREADS')
}
PATIENCE_SECONDS = 5.0


def available_cores() -> int:
    """Number of processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def run_jobs(make_runner, arguments: tuple, jobs, workers: int):
    """Yields (job, what `run` returned for it), in the order of completion.

    Args:
        make_runner: importable function; `make_runner(*arguments)` is called once in each worker and returns
            `run(job)`, whose results must be picklable.
        arguments: picklable.
        jobs: sequence of picklable jobs.
        workers: number of processes; no more are started than there are jobs.

    Raises:
        UserError: a job raised one, the file system refused a worker, or something outside killed one.
        RuntimeError: a job failed; the message holds the worker's traceback.
    """
    waiting = list(reversed(jobs))
    processes, running = {}, {}

    def hand_out(connection):
        running[connection] = waiting.pop()
        _send(connection, processes[connection], running[connection])

    try:
        processes |= _start(make_runner, [arguments] * min(workers, len(waiting)))
        for connection in processes:
            hand_out(connection)
        while processes:
            for connection in multiprocessing.connection.wait(list(processes)):
                yield running[connection], _receive(connection, processes[connection])
                if waiting:
                    hand_out(connection)
                else:
                    processes.pop(connection)  # It ends when its pipe does.
                    connection.close()
    finally:
        _stop(list(processes.values()))


class Crew:
    """Workers that keep what they hold from one job to the next: each is given a job of its own, all at once.

    Use as a context manager. Raises what `run_jobs` does.
    """

    def __init__(self, make_runner, arguments: list[tuple]):
        """Starts a worker for each element of `arguments`, with `run = make_runner(*element)`."""
        self._processes = _start(make_runner, arguments)

    def send(self, jobs) -> None:
        """Gives each worker its job."""
        for (connection, process), job in zip(self._processes.items(), jobs, strict=True):
            _send(connection, process, job)

    def receive(self) -> list:
        """What `run` returned for the jobs, in the workers' order, when all are done."""
        return [_receive(connection, process) for connection, process in self._processes.items()]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        _stop(list(self._processes.values()))


def _start(make_runner, arguments: list[tuple]) -> dict:
    """Starts a process for each element of `arguments`: connection → process."""
    context = multiprocessing.get_context('spawn')
    processes = {}
    try:
        with _environment(SINGLE_THREADED):
            for each in arguments:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, make_runner, each), daemon=True)
                process.start()
                theirs.close()
                processes[ours] = process
    except BaseException:
        _stop(list(processes.values()))
        raise
    return processes


def _work(connection, make_runner, arguments) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides.
    try:
        run = make_runner(*arguments)
        while True:
            job = connection.recv()
            connection.send(('done', run(job)))
    except EOFError:  # The parent has no more jobs, or is gone.
        return
    except BrokenPipeError:
        return
    except UserError as error:
        answer = ('refused', str(error))
    except OSError as error:
        answer = ('refused', f'{error.strerror or error}: {error.filename or "while writing"}')
    except Exception:
        answer = ('failed', traceback.format_exc())
    with contextlib.suppress(OSError):
        connection.send(answer)


def _send(connection, process, job) -> None:
    try:
        connection.send(job)
    except OSError:
        raise _death(process) from None


def _death(process) -> UserError:
    process.join(PATIENCE_SECONDS)
    return UserError(
        f'a worker process ended with code {process.exitcode} (-9 is usually a lack of memory); '
        'the same command continues, perhaps with fewer --workers'
    )


def _receive(connection, process):
    try:
        kind, content = connection.recv()
    except (EOFError, ConnectionError):
        raise _death(process) from None
    if kind == 'refused':
        raise UserError(content)
    if kind == 'failed':
        raise RuntimeError(f'a worker failed:\n{content}')
    return content


def _stop(processes) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(PATIENCE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


@contextlib.contextmanager
def _environment(variables: dict[str, str]):
    """Sets environment variables while processes are started, which inherit them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
