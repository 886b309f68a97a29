"""Environments to run episodes in, one in a process of its own or in this one, behind the same small interface.

Which episodes, with which actions, is evaluation.py's business. Neither a simulator nor jax is imported here: a worker
process imports this file and whatever its `make_env` needs, nothing else.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from utils.errors import UserError

START_TIMEOUT = 600.0  # seconds to import a simulator and to build an environment, on a machine busy with many of them


class Episode:
    """An environment with the running return and length of its episode; observations are float32, or uint8 images."""

    def __init__(self, env: Any):
        self.env = env

    def reset(self, seed: int) -> np.ndarray:
        observation, _ = self.env.reset(seed=seed)
        self._return, self._length = 0.0, 0
        return _array(observation)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, dict[str, float] | None]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._return += float(reward)
        self._length += 1
        if not (terminated or truncated):
            return _array(observation), None
        outcome = {'return': self._return, 'length': float(self._length)}
        if 'success' in info:
            outcome['success'] = float(info['success'])
        return _array(observation), outcome


def _array(observation: Any) -> np.ndarray:
    observation = np.asarray(observation)
    return observation if observation.dtype == np.uint8 else observation.astype(np.float32)


class LocalWorker:
    """The interface of `ProcessWorker` for an environment in this process; its errors are raised as they are."""

    def __init__(self, make_env: Callable[[], Any]):
        self._episode = Episode(make_env())
        self.action_size = int(np.prod(self._episode.env.action_space.shape))

    def ask(self, command: str, value: Any) -> None:
        self._question = command, value

    def answer(self) -> tuple[np.ndarray, dict[str, float] | None]:
        return _answer(self._episode, *self._question)

    def join(self) -> None:
        self._episode.env.close()

    def kill(self) -> None:
        with contextlib.suppress(Exception):  # it has just failed: closing is a courtesy
            self._episode.env.close()


class ProcessWorker:
    """A process with an environment, asked and answering over a pipe."""

    def __init__(self, make_env: Callable[[], Any], number: int, reply_timeout: float):
        context = multiprocessing.get_context('spawn')  # forking a process that runs jax's threads can deadlock it
        self._name = f'evaluation worker {number}'
        self._reply_timeout = reply_timeout
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(far_end, make_env), name=self._name, daemon=True)
        self._process.start()
        far_end.close()  # the only copy is now the worker's: its death closes the pipe, and so does ours
        self.action_size: int | None = None

    def await_start(self) -> None:
        if self.action_size is None:
            self.action_size = self._receive(START_TIMEOUT)

    def ask(self, command: str, value: Any) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed, and explained, when it owes an answer
            self._pipe.send((command, value))

    def answer(self) -> tuple[np.ndarray, dict[str, float] | None]:
        return self._receive(self._reply_timeout)

    def join(self) -> None:
        self._process.join(timeout=5)
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self, timeout: float) -> Any:
        advice = 'Try fewer --eval_workers (each holds a simulator: memory may have run out).'
        if not self._pipe.poll(timeout):
            raise UserError(f'{self._name} has not answered for {timeout:g} seconds and was stopped. {advice}')
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=30)
            status = self._process.exitcode
            raise UserError(f'{self._name} died (exit status {status}). {advice}') from error
        if kind == 'user error':
            raise UserError(value)
        if kind == 'error':
            raise RuntimeError(f'the environment of {self._name} failed:\n{value}')
        return value


def _serve(pipe, make_env: Callable[[], Any]) -> None:
    """The life of a worker process: says that it is ready, then answers until it is told to close or its owner dies."""
    # Ctrl-C and the SIGTERM of a job scheduler reach the whole process group, but it is for the owner to end things.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    env = None
    try:
        env = make_env()
        episode = Episode(env)
        pipe.send(('ready', int(np.prod(env.action_space.shape))))
        while True:
            command, value = pipe.recv()
            if command == 'close':
                break
            pipe.send(('answer', _answer(episode, command, value)))
    except UserError as error:
        _tell(pipe, 'user error', str(error))
    except (EOFError, ConnectionError):
        pass  # the owner was killed: nobody is left to tell
    except Exception:
        _tell(pipe, 'error', traceback.format_exc())
    finally:
        if env is not None:
            env.close()


def _tell(pipe, kind: str, message: str) -> None:
    with contextlib.suppress(OSError):
        pipe.send((kind, message))


def _answer(episode: Episode, command: str, value: Any) -> tuple[np.ndarray, dict[str, float] | None]:
    return (episode.reset(value), None) if command == 'reset' else episode.step(value)


@contextlib.contextmanager
def spawning() -> Iterator[None]:
    """Starts worker processes light: without the entry point's imports and without a thread pool for BLAS in each.

    `spawn` makes children import the parent's main script, hence jax, unless there is none to be found.
    """
    main = sys.modules['__main__']
    limits = {name: '1' for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS') if name not in os.environ}
    sys.modules['__main__'] = types.ModuleType('__main__')
    os.environ.update(limits)
    try:
        yield
    finally:
        sys.modules['__main__'] = main
        for name in limits:
            del os.environ[name]
