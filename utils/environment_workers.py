"""Environments to run episodes in, some in a process of their own or in this one, behind the same small interface.

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
from collections.abc import Callable, Iterator, Sequence
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


class Episodes:
    """Environments that one worker steps one after the other; all but the first are made when they are first reset."""

    def __init__(self, make_env: Callable[[], Any]):
        self._make_env = make_env
        self._episodes = {0: Episode(make_env())}

    @property
    def action_size(self) -> int:
        return int(np.prod(self._episodes[0].env.action_space.shape))

    def answer(self, requests: Sequence[tuple[int, str, Any]]) -> list[tuple[int, np.ndarray, dict | None]]:
        """(number, 'reset', seed) or (number, 'step', action) of each environment → (number, observation, outcome)."""
        answers = []
        for number, command, value in requests:
            if number not in self._episodes:
                self._episodes[number] = Episode(self._make_env())
            episode = self._episodes[number]
            observation, outcome = (episode.reset(value), None) if command == 'reset' else episode.step(value)
            answers.append((number, observation, outcome))
        return answers

    def close(self) -> None:
        for episode in self._episodes.values():
            episode.env.close()


class LocalWorker:
    """The interface of `ProcessWorker` for environments in this process; their errors are raised as they are."""

    def __init__(self, make_env: Callable[[], Any]):
        self._episodes = Episodes(make_env)
        self.action_size = self._episodes.action_size

    def ask(self, requests: Sequence[tuple[int, str, Any]]) -> None:
        self._requests = requests

    def answer(self) -> list[tuple[int, np.ndarray, dict | None]]:
        return self._episodes.answer(self._requests)

    def close(self) -> None:
        self._episodes.close()

    def join(self) -> None:
        pass

    def kill(self) -> None:
        with contextlib.suppress(Exception):  # one has just failed: closing is a courtesy
            self.close()


class ProcessWorker:
    """A process with environments (`Episodes`), asked and answering over a pipe."""

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

    def ask(self, requests: Sequence[tuple[int, str, Any]]) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed, and explained, when it owes an answer
            self._pipe.send(requests)

    def answer(self) -> list[tuple[int, np.ndarray, dict | None]]:
        return self._receive(self._reply_timeout)

    def close(self) -> None:
        self.ask([])

    def join(self) -> None:
        self._process.join(timeout=5)
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self, timeout: float) -> Any:
        advice = 'Try fewer --eval_workers (each holds simulators: memory may have run out).'
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
    """The life of a worker process: says that it is ready, then answers until nothing is asked or its owner dies."""
    # Ctrl-C and the SIGTERM of a job scheduler reach the whole process group, but it is for the owner to end things.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    episodes = None
    try:
        episodes = Episodes(make_env)
        pipe.send(('ready', episodes.action_size))
        while requests := pipe.recv():
            pipe.send(('answer', episodes.answer(requests)))
    except UserError as error:
        _tell(pipe, 'user error', str(error))
    except (EOFError, ConnectionError):
        pass  # the owner was killed: nobody is left to tell
    except Exception:
        _tell(pipe, 'error', traceback.format_exc())
    finally:
        if episodes is not None:
            episodes.close()


def _tell(pipe, kind: str, message: str) -> None:
    with contextlib.suppress(OSError):
        pipe.send((kind, message))


@contextlib.contextmanager
def spawning() -> Iterator[None]:
    """Starts worker processes light: without the entry point's imports, without a thread pool for BLAS in each, and,
    should an environment be written in JAX, without a share of the accelerator's memory.

    `spawn` makes children import the parent's main script, hence jax, unless there is none to be found.
    """
    main = sys.modules['__main__']
    limits = {name: '1' for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS') if name not in os.environ}
    limits['JAX_PLATFORMS'] = 'cpu'
    before = {name: os.environ.get(name) for name in limits}
    sys.modules['__main__'] = types.ModuleType('__main__')
    os.environ.update(limits)
    try:
        yield
    finally:
        sys.modules['__main__'] = main
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
