"""An optional copy of the metrics and videos to Weights & Biases, which can never stop a run.

The run directory stays the record; this file only forwards. wandb is imported when a sink is made, not before.
"""

import contextlib
import json
import logging
import math
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.runs import write_json

logger = logging.getLogger(__name__)

DEFAULT_PROJECT = 'infom'
START_TIMEOUT = 60  # seconds to reach the server before the run goes on without
FINISH_TIMEOUT = 120  # seconds to hand over what is still queued


class WandbSink:
    """One wandb run for a training run. After the first failure of any kind: one warning, and silence.

    Args:
        run_directory: wandb's files go into its `wandb/`; the run's id is kept in `wandb.json`, so that a resumed run
            goes on in the same wandb run.
        mode: 'online', 'offline' (files only: `wandb sync` sends them later) or 'disabled' (nothing is imported).
        group, name, config: as in `wandb.init`.
    """

    def __init__(
        self,
        run_directory: str | os.PathLike,
        mode: str,
        group: str | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._directory = Path(run_directory)
        self._run = None
        if mode == 'disabled':
            return
        with self._never_stopping('start'):
            # Or a terminal without a key would be asked for one, and the run wait for the answer; wandb reads it when
            # it is imported.
            os.environ.setdefault('WANDB_LOGIN_TIMEOUT', str(START_TIMEOUT))
            import wandb

            # finish_timeout: also for what wandb does by itself when the process ends.
            settings = wandb.Settings(
                init_timeout=START_TIMEOUT, finish_timeout=FINISH_TIMEOUT, console='off', silent=True
            )
            run_id = self._run_id()
            run = wandb.init(
                project=os.environ.get('WANDB_PROJECT') or DEFAULT_PROJECT,  # Given here, it outranks wandb's variable.
                group=group,
                name=name,
                config=dict(config or {}),
                dir=str(self._directory),
                mode=mode,
                id=run_id,
                resume='allow' if mode == 'online' else None,
                settings=settings,
            )
            if run.id != run_id:  # In a sweep, wandb chooses it.
                write_json(self._directory / 'wandb.json', {'id': run.id})
            # Our own step as the axis, instead of wandb's counter, which must never go back: a resumed run repeats the
            # steps after its last checkpoint.
            run.define_metric('step')
            run.define_metric('*', step_metric='step')
            self._run, self._wandb = run, wandb
            logger.info('wandb: %s', run.url or run.dir)

    @property
    def active(self) -> bool:
        """Whether anything is still forwarded."""
        return self._run is not None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Forwards metrics at a global step; values that are None or not finite are left out."""
        if self._run is not None:
            with self._never_stopping('log'):
                self._run.log({'step': int(step), **{key: value for key, value in metrics.items() if _known(value)}})

    def log_seeds(self, step: int, per_seed: Mapping[int, Mapping[str, Any]]) -> None:
        """Forwards the metrics of all seeds at a global step, combined by `combine_seeds`."""
        self.log(step, combine_seeds(per_seed))

    def log_video(self, step: int, path: str | os.PathLike) -> None:
        """Forwards an mp4 file."""
        if self._run is not None:
            with self._never_stopping('send a video'):
                self._run.log({'step': int(step), 'video': self._wandb.Video(os.fspath(path), format='mp4')})

    def finish(self) -> None:
        """Ends the wandb run and waits, not for ever, until what is queued has been sent."""
        run, self._run = self._run, None
        if run is None:
            return
        with self._never_stopping('finish'):
            _within(1.2 * FINISH_TIMEOUT, run.finish)  # wandb gives up by itself before.

    def _run_id(self) -> str:
        path = self._directory / 'wandb.json'
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(path.read_text())['id'])
        run_id = uuid.uuid4().hex[:12]
        write_json(path, {'id': run_id})
        return run_id

    @contextlib.contextmanager
    def _never_stopping(self, action: str):
        try:
            yield
        except Exception as error:  # whatever it is: no run is worth losing to its logger
            self._run = None
            logger.warning(
                'wandb could not %s (%s: %s): the run goes on without it. Everything is in %s; `wandb sync` sends '
                'what was recorded offline.',
                action, type(error).__name__, str(error).strip().split('\n')[0][:200], self._directory,
            )  # fmt: skip


def combine_seeds(per_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """Means over seeds under the metric's name and, with several seeds, each value under `seed_<s>/<name>`.

    None and values that are not finite are left out, of the means too.
    """
    collected: dict[str, list[float]] = {}
    combined: dict[str, float] = {}
    for seed, metrics in per_seed.items():
        for key, value in metrics.items():
            if not _known(value):
                continue
            collected.setdefault(key, []).append(float(value))
            if len(per_seed) > 1:
                combined[f'seed_{seed}/{key}'] = float(value)
    return {key: sum(values) / len(values) for key, values in collected.items()} | combined


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(float(value))


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Runs the action in a thread that the process does not wait for when it is stuck. Raises what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f'no answer in {seconds:g} seconds')
    if errors:
        raise errors[0]
