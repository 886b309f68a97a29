"""Evaluation: episodes in worker processes under one batched policy call a step, the random policy, and videos.

Which environment to make, what the policy is and when to evaluate are the caller's business. How an environment lives
in a process of its own is in environment_workers.py. No simulator is imported here.
"""

import atexit
import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from utils.environment_workers import Episode, LocalWorker, ProcessWorker, spawning
from utils.errors import UserError
from utils.runs import atomic_path

logger = logging.getLogger(__name__)

ENVIRONMENTS_PER_WORKER = 4
FRAMES_PER_SECOND = 30  # of videos
REPLY_TIMEOUT = 300.0  # seconds for a few resets or steps; simulators take milliseconds, so this is a hung one

# Second word of the seeds below, so that no environment's stream coincides with another use of the run's seed.
_RESET_STREAM, _RANDOM_ACTION_STREAM = 977, 978


class Evaluator:
    """Runs evaluation episodes, many at a time, and keeps its environments for the next evaluation.

    Each worker process holds a few environments, so that a call of the policy serves many steps; with
    `num_workers <= 1` they are in this process.
    Workers start at the first evaluation and stop at `close` (or at exit, or when this process is killed).
    Why not `gymnasium.vector`: there, an environment that has no episode left is stepped all the same, all wait while
    one resets, the training process builds an environment too, and every worker imports the main script, hence jax.

    Args:
        make_env: picklable and importable, e.g. `functools.partial(envs.make_env, name)`. Returns a `gymnasium.Env`
            with box observations, box actions in [-1, 1], and optionally `success` (0 or 1) in the last step's info.
        num_workers: number of processes that step environments in parallel.
        environments_per_worker: environments that each of them steps in turn. One takes memory, and an image task's
            frames take so long that nothing is to be gained.
        reply_timeout: seconds after which a worker that does not answer is given up.
    """

    def __init__(
        self,
        make_env: Callable[[], Any],
        num_workers: int,
        environments_per_worker: int = ENVIRONMENTS_PER_WORKER,
        reply_timeout: float = REPLY_TIMEOUT,
    ):
        self._make_env = make_env
        self._environments_per_worker = environments_per_worker
        self._num_workers = max(1, int(num_workers))
        self._reply_timeout = reply_timeout
        self._workers: list[ProcessWorker] | list[LocalWorker] = []

    def evaluate(
        self,
        policy: Callable[[np.ndarray], np.ndarray],
        seeds: Sequence[int],
        num_episodes: int,
        eval_index: int = 0,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[dict[str, float]] | None:
        """Evaluates one policy per seed on `num_episodes` episodes each.

        Episode e of seed s starts from the environment seed drawn from (seeds[s], e): the same episodes at every
        evaluation, whatever the number of workers and whatever training has done to its own random numbers. The policy
        acts on as many observations at once as there are environments: with another number of workers its actions
        may be rounded otherwise, and a simulator carries that on.

        Args:
            policy: observations (W, ...) of W environments, float32 (uint8 for images) -> actions (S, W, a) of all S
                seeds' policies. Rows of environments between two episodes hold an old observation.
            seeds: the S seeds of the run, non-negative.
            num_episodes: episodes per seed, at least one.
            eval_index: number of this evaluation in the run, for the progress bar only.
            should_stop: asked before every step; True ends the evaluation early (a signal came in, say).
        Returns:
            per seed the means `episode.return`, `episode.length`, `episode.success` (of the last step, as OGBench
            counts it; absent if the environment does not report success) and the standard deviations over episodes
            `episode.return_std`, `episode.success_std`; None if stopped early.
        Raises:
            UserError: a worker died or hangs. RuntimeError: an environment raised; holds its traceback.
        """
        if num_episodes < 1:
            raise ValueError(f'{num_episodes} episodes were asked for')

        def act(observations: np.ndarray, jobs: Sequence[int | None]) -> np.ndarray:
            columns = np.arange(len(jobs))
            rows = np.array([0 if job is None else job // num_episodes for job in jobs])
            return np.asarray(policy(observations))[rows, columns]

        reset_seeds = [_reset_seed(seed, episode) for seed in seeds for episode in range(num_episodes)]
        outcomes = self._run(act, reset_seeds, f'evaluation {eval_index}', should_stop)
        if outcomes is None:
            return None
        return [_statistics(outcomes[s * num_episodes : (s + 1) * num_episodes]) for s in range(len(seeds))]

    def evaluate_random(self, seed: int, num_episodes: int) -> dict[str, float]:
        """The same statistics for actions uniform in [-1, 1], on the episodes that `evaluate` uses for that seed."""
        streams = [np.random.default_rng([seed, _RANDOM_ACTION_STREAM, episode]) for episode in range(num_episodes)]

        def act(_, jobs: Sequence[int | None]) -> np.ndarray:
            size = self._workers[0].action_size
            return np.stack([np.zeros(size) if job is None else streams[job].uniform(-1, 1, size) for job in jobs])

        reset_seeds = [_reset_seed(seed, episode) for episode in range(num_episodes)]
        return _statistics(self._run(act, reset_seeds, 'random policy'))

    def close(self) -> None:
        """Stops the workers. The next evaluation would start new ones."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.close()
        for worker in workers:
            worker.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _run(
        self,
        act: Callable[[np.ndarray, Sequence[int | None]], np.ndarray],
        reset_seeds: Sequence[int],
        title: str,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[dict[str, float]] | None:
        """One episode per reset seed; `act` gets the observations and, per environment, the number of its episode."""
        from tqdm import tqdm

        try:
            self._start(min(self._num_workers, len(reset_seeds)))
            with tqdm(total=len(reset_seeds), desc=title, unit='episode', leave=False, disable=None) as progress:
                return self._episodes(act, reset_seeds, progress, should_stop)
        except BaseException:
            for worker in self._workers:  # some are in the middle of steps: their answers would come too late
                worker.kill()
            self._workers = []
            raise

    def _start(self, count: int) -> None:
        if len(self._workers) >= count:
            return
        if self._num_workers == 1:
            self._workers = [LocalWorker(self._make_env)]
            return
        atexit.unregister(self.close)
        atexit.register(self.close)  # runs before multiprocessing's own exit handler, which would wait for ever
        with spawning():
            while len(self._workers) < count:
                self._workers.append(ProcessWorker(self._make_env, len(self._workers), self._reply_timeout))
        for worker in self._workers:
            worker.await_start()

    def _episodes(self, act, reset_seeds, progress, should_stop) -> list[dict[str, float]] | None:
        workers = self._workers[: len(reset_seeds)]
        places = min(len(workers) * self._environments_per_worker, len(reset_seeds))
        jobs: list[int | None] = list(range(places))  # the episode in each place; place p is at worker p mod W
        outcomes: list[dict[str, float] | None] = [None] * len(reset_seeds)
        next_job = places
        observations, warned = None, False
        requests = {place: ('reset', reset_seeds[job]) for place, job in enumerate(jobs)}
        while requests:
            answers, requests, acting = self._ask(workers, requests), {}, []
            for place, observation, outcome in answers:
                if observations is None:
                    observations = np.zeros((places, *observation.shape), observation.dtype)
                observations[place] = observation
                if outcome is None:
                    acting.append(place)
                    continue
                outcomes[jobs[place]] = outcome
                progress.update()
                jobs[place], next_job = (next_job, next_job + 1) if next_job < len(reset_seeds) else (None, next_job)
                if jobs[place] is not None:  # starts while the others take their next step
                    requests[place] = 'reset', reset_seeds[jobs[place]]
            if should_stop is not None and should_stop():
                return None
            if not acting:
                continue
            current = [job if place in acting else None for place, job in enumerate(jobs)]
            actions = np.asarray(act(observations, current), np.float32)
            if not warned and not np.isfinite(actions).all():
                logger.warning('a policy gives actions that are NaN or infinite; zero is used in their place')
                warned = True
            actions = _finite(actions)
            requests |= {place: ('step', actions[place]) for place in acting}
        return outcomes

    @staticmethod
    def _ask(workers, requests):
        """Asks all workers at once; returns (place, observation, outcome) of each environment."""
        shares = [[] for _ in workers]
        for place, request in requests.items():
            number, worker = divmod(place, len(workers))
            shares[worker].append((number, *request))
        busy = [w for w, share in enumerate(shares) if share]
        for w in busy:
            workers[w].ask(shares[w])
        return [(number * len(workers) + w, *rest) for w in busy for number, *rest in workers[w].answer()]


def record_video(
    make_env: Callable[[], Any],
    policy_one: Callable[[np.ndarray], np.ndarray],
    path: str | os.PathLike,
    num_episodes: int = 1,
    seed: int = 0,
    every: int = 1,
) -> None:
    """Writes episodes of a policy to an mp4 file, atomically, frame by frame.

    Args:
        make_env: makes an environment with `render_mode='rgb_array'`.
        policy_one: observation (...) -> action (a,).
        path: of the mp4 file, in an existing directory.
        num_episodes: shown one after the other: those that `Evaluator` starts with for the same seed.
        seed: non-negative.
        every: steps from one frame to the next (the last step is always shown); software rendering takes 0.1 s a frame.
    Raises:
        UserError: rendering is not possible here, or the file is not writable.
    """
    import imageio.v2 as imageio
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        with _explaining_rendering():
            env = make_env()
        stack.callback(env.close)
        episode = Episode(env)
        observation = episode.reset(_reset_seed(seed, 0))
        with _explaining_rendering():
            frame = _frame(env)
        temporary = stack.enter_context(atomic_path(path))
        stack.enter_context(warnings.catch_warnings())  # jax's, of forks: this one only goes on to execute ffmpeg
        warnings.filterwarnings('ignore', message=r'os\.fork\(\) was called', category=RuntimeWarning)
        # Block size 2: H.264 needs even sides, and the default of 16 would rescale the picture.
        writer = imageio.get_writer(
            temporary, format='FFMPEG', mode='I', fps=FRAMES_PER_SECOND, codec='libx264', macro_block_size=2
        )
        progress = stack.enter_context(tqdm(desc='video', unit='frame', leave=False, disable=None))
        count = 0
        with contextlib.closing(writer):  # its own `with` leaves ffmpeg running after an exception
            for number in range(num_episodes):
                if number > 0:
                    observation, frame = episode.reset(_reset_seed(seed, number)), _frame(env)
                outcome, step = None, 0
                while True:
                    if step % every == 0 or outcome is not None:
                        writer.append_data(frame if step == 0 else _frame(env))
                        progress.update()
                        count += 1
                    if outcome is not None:
                        break
                    observation, outcome = episode.step(_finite(np.asarray(policy_one(observation), np.float32)))
                    step += 1
        _check_film(temporary, count)


def environments_per_worker(visual: bool) -> int:
    """Environments that a worker of a run steps: one where each has a renderer."""
    return 1 if visual else ENVIRONMENTS_PER_WORKER


def check_rendering(make_env: Callable[[], Any]) -> None:
    """Raises UserError where an environment cannot be made, or gives no picture after its first reset."""
    with _explaining_rendering(), contextlib.closing(make_env()) as env:
        env.reset(seed=0)
        _frame(env)


# --- Seeds and statistics ---


def _reset_seed(seed: int, episode: int) -> int:
    return int(np.random.SeedSequence([seed, _RESET_STREAM, episode]).generate_state(1)[0])


def _statistics(outcomes: Sequence[dict[str, float]]) -> dict[str, float]:
    names = [name for name in ('return', 'success', 'length') if all(name in outcome for outcome in outcomes)]
    values = {name: np.array([outcome[name] for outcome in outcomes]) for name in names}
    statistics = {f'episode.{name}': float(values[name].mean()) for name in names}
    return statistics | {f'episode.{name}_std': float(values[name].std()) for name in names if name != 'length'}


def _finite(actions: np.ndarray) -> np.ndarray:
    # One of several seeds may have diverged, with training told to go on; simulators crash on NaN.
    return np.nan_to_num(actions, nan=0.0, posinf=0.0, neginf=0.0)


# --- Rendering ---


def _frame(env: Any) -> np.ndarray:
    frame = np.asarray(env.render())
    if frame.ndim != 3 or frame.dtype != np.uint8:
        raise ValueError("the environment renders no frames: it must be made with render_mode='rgb_array'")
    return frame


def _check_film(path: Path, frames: int) -> None:
    # ffmpeg, on a disk that is full at the end, says nothing that reaches us.
    import imageio_ffmpeg

    try:
        readable, _ = imageio_ffmpeg.count_frames_and_secs(path)
    except RuntimeError:
        readable = 0
    if readable != frames:
        raise OSError(f'ffmpeg wrote {readable} of {frames} frames')


@contextlib.contextmanager
def _explaining_rendering() -> Iterator[None]:
    """Turns what simulators raise without a working OpenGL (any type of exception at all) into advice."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        backend = os.environ.get('MUJOCO_GL', 'not set')
        raise UserError(
            f'cannot render a video: {type(error).__name__}: {str(error).strip()[:200]} (MUJOCO_GL is {backend}). '
            'Without a display, MUJOCO_GL=egl needs the library libEGL (Debian and Ubuntu: apt install libegl1 '
            'libgles2), MUJOCO_GL=osmesa needs libOSMesa (apt install libosmesa6). Or go on with --video_episodes=0.'
        ) from error
