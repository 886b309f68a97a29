"""The evaluations of one run, one after the other: in the training thread, or in a thread of their own beside it.

When to evaluate, and what becomes of the results, is `experiment.py`'s business; how episodes run, `evaluation.py`'s.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from absl import logging

from utils import batches, devices, processes, training
from utils.errors import UserError


class Evaluation(NamedTuple):
    """`results`: the statistics of each seed, or None if the evaluation was stopped; `video`: its path, or None."""

    step: int
    results: list[dict[str, float]] | None
    video: Path | None = None


class RunEvaluations:
    """Evaluates the agents as they are at a step of training; the environments are made once and kept.

    make_evaluator() → `evaluation.Evaluator`. record_video(policy, path) writes one file, or None for none.
    in_background: evaluate in a thread, from a copy of what acting reads, while training goes on. The copy acts on the
    host's processor: an accelerator would let it wait for the chunk that is running, at every step of the episodes.
    """

    def __init__(
        self, make_evaluator, normalizer, seeds, num_episodes, *, record_video=None, video_dir=None, in_background=False
    ):
        self._make_evaluator, self._evaluator = make_evaluator, None
        self._normalizer, self._seeds, self._num_episodes = normalizer, seeds, num_episodes
        self._record_video, self._video_dir = record_video, video_dir
        # One thread for all: simulators and renderers may be bound to the thread that made them.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix='evaluation') if in_background else None
        self._running: Future | None = None
        self._closing = threading.Event()

    def begin(self, agents, step, observations, should_stop) -> None:
        """Begins the evaluation of `step`; without a thread it is over on return. The one before must be finished.

        observations: an example (1, …), of which the shape and dtype matter alone. should_stop() → bool ends it early.
        Of several processes all call this, and only the first evaluates.
        """
        if self._thread is not None or devices.mesh_of(agents) is not None:
            agents = training.acting_part(agents, observations)
        if processes.is_first() and self._thread is not None:
            self._running = self._thread.submit(self._evaluate_on_host, batches.on_host(agents), step, should_stop)
        else:
            self._running = Future()
            here = processes.is_first()  # The others have given their part of the copy, and know no results.
            self._running.set_result(self._evaluate(agents, step, should_stop) if here else Evaluation(step, None))

    def finish(self, wait=True) -> Evaluation | None:
        """The evaluation that was begun; None if there is none or, without `wait`, if it is still running.

        Raises what the evaluation raised.
        """
        if self._running is None or not (wait or self._running.done()):
            return None
        running, self._running = self._running, None
        return running.result()

    def close(self) -> None:
        """Stops an evaluation that is running, and the environments."""
        self._closing.set()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        if self._evaluator is not None:
            self._evaluator.close()

    def _evaluate_on_host(self, agents, step, should_stop) -> Evaluation:
        with devices.host_precision():
            return self._evaluate(agents, step, should_stop)

    def _evaluate(self, agents, step, should_stop) -> Evaluation:
        if self._evaluator is None:
            self._evaluator = self._make_evaluator()
        policy = training.make_policy(agents, self._normalizer, self._seeds)
        results = self._evaluator.evaluate(
            policy,
            seeds=self._seeds,
            num_episodes=self._num_episodes,
            eval_index=step,
            should_stop=lambda: should_stop() or self._closing.is_set(),
        )
        if results is None or self._record_video is None:
            return Evaluation(step, results)
        path = self._video_dir / f'step_{step}.mp4'
        try:
            self._record_video(lambda observation: policy(observation[None])[0, 0], path)
        except UserError as error:  # A full disk, say: no run is worth losing to a film.
            logging.warning('no video of step %d: %s', step, error)
            path = None
        return Evaluation(step, results, path)
