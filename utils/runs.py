"""The run directory `<save_dir>/<run_group>/<run_name>/`: making it, its metrics log, its JSON files and its summary.

Checkpoints are in checkpoints.py, wandb is in wandb_sink.py. What is logged, and when, is decided by the train loop.
"""

import contextlib
import csv
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from utils.errors import UserError

logger = logging.getLogger(__name__)

# Seconds to wait for another process to leave a run directory: one that was told to stop may still be saving, and a job
# that is queued again can start before its predecessor is gone.
LOCK_PATIENCE = 90.0
RESERVED_KEYS = ('step', 'phase', 'seed')
WALL_TIME_KEY = 'time/wall_seconds'  # running time of the whole run so far, resumed parts included
SCORES = ('episode.success', 'episode.return')
PACKAGES = (
    'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'ml_collections', 'absl-py', 'numpy',
    'ogbench', 'gymnasium', 'dm_control', 'mujoco', 'h5py', 'wandb', 'imageio',
)  # fmt: skip


def make_run_directory(run_directory: str | os.PathLike) -> Path:
    """Makes the directory of a run with its subdirectories, or finds it again, and returns it. Raises `UserError` if it
    is not writable."""
    run_directory = require_writable(run_directory)
    for name in ('checkpoints', 'videos', 'figures'):
        require_writable(run_directory / name)
    return run_directory


def lock_run_directory(run_directory: str | os.PathLike) -> IO | None:
    """Makes this process the only one that writes to the run, until the returned file is closed or the process ends.

    Two runs in one directory would interleave their metrics and delete each other's checkpoints.

    Returns:
        the open lock file, to be held on to; None where the file system has no locks.
    Raises:
        UserError: another process still holds the lock after `LOCK_PATIENCE` seconds.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        return None
    with _as_user_error(run_directory):
        file = open(Path(run_directory) / '.lock', 'w')  # noqa: SIM115 (held for as long as the run)
    deadline = time.monotonic() + LOCK_PATIENCE
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                file.close()
                raise UserError(
                    f'another process is writing to {run_directory}: '
                    'wait for it, stop it, or choose another --run_name.'
                ) from error
        except OSError:  # some network file systems
            file.close()
            return None
        if not told:
            logging.warning('another process is writing to %s: waiting %g s for it', run_directory, LOCK_PATIENCE)
            told = True
        time.sleep(0.2)


def require_writable(directory: str | os.PathLike) -> Path:
    """Makes the directory if need be and returns it. Raises `UserError` if that, or a file in it, is not possible."""
    directory = Path(directory)
    with _as_user_error(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):  # access bits do not tell: root, read-only mounts, quotas
            pass
    return directory


def write_csv(path: str | os.PathLike, header: Sequence[str], rows: Iterable[Sequence]) -> int:
    """Writes a table, wholly or not at all; returns its number of rows. They are written as they come."""
    number = 0
    with atomic_path(path) as temporary, open(temporary, 'w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(header)
        for row in rows:
            writer.writerow(row)
            number += 1
    return number


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path in the same directory that becomes `path` if the block succeeds, and vanishes otherwise.

    Raises:
        UserError: for any OSError in the block, naming `path`.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}.tmp{path.suffix}')
    try:
        with _as_user_error(path):
            yield temporary
            with open(temporary, 'rb') as file:
                os.fsync(file.fileno())  # or the rename may reach the disk before the content does
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # a missing file after success, anything after a failure
            temporary.unlink()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON atomically. Arrays become lists, paths strings, configs dicts; NaN and infinities become null.

    Raises:
        UserError: not writable. TypeError: something else that JSON cannot hold.
    """
    text = json.dumps(_plain(content), indent=2, allow_nan=False) + '\n'
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def digest(content: Any) -> str:
    """Eight hexadecimal digits that tell JSON-able content apart, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


class MetricsLog:
    """The append-only `metrics.jsonl` of a run: one JSON object a line with `step`, `phase`, `seed` and the metrics.

    Every line is handed to the operating system before `write` returns, so a kill loses none. If one was cut off in
    the middle all the same (a full disk, a crash of the machine), it is dropped when the log is opened again.

    Raises:
        UserError: not writable, from every method.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with _as_user_error(self.path):
            content = self.path.read_bytes() if self.path.exists() else b''
            self._open()
            self._file.truncate(content.rfind(b'\n') + 1)
        self.lines = content.count(b'\n')

    def write(self, step: int, phase: str, seed: int, metrics: Mapping[str, Any]) -> None:
        """Appends a line. Metrics are scalars (Python, numpy or jax) or strings; NaN and infinities become null."""
        taken = [key for key in RESERVED_KEYS if key in metrics]
        if taken:
            raise ValueError(f'a metric cannot be called {taken[0]!r}')
        row = {'step': int(step), 'phase': phase, 'seed': int(seed), **_plain(metrics)}
        line = json.dumps(row, allow_nan=False).encode() + b'\n'
        with _as_user_error(self.path):
            start = self._file.seek(0, os.SEEK_END)
            try:
                while line:  # one pass, except on a disk that is about to be full
                    line = line[self._file.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(start)
                raise
        self.lines += 1

    def truncate(self, lines: int) -> None:
        """Keeps the first `lines` lines, atomically. With fewer there, all stay and a warning is logged."""
        if lines >= self.lines:
            if lines > self.lines:
                logger.warning('%s has %d lines where %d were expected', self.path, self.lines, lines)
            return
        with _as_user_error(self.path, 'read'):
            kept = self.path.read_bytes().split(b'\n')[:lines]
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(b''.join(line + b'\n' for line in kept))
        self._file.close()
        with _as_user_error(self.path):
            self._open()
        self.lines = lines

    def _open(self) -> None:
        # Unbuffered: nothing is left to fail, or to be lost, on closing.
        self._file = open(self.path, 'ab', buffering=0)  # noqa: SIM115

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The rows of a metrics log, without a last line that was cut off. Leaves the file alone, so the run may go on.

    Raises:
        UserError: no such file, or a line that is not a JSON object: names the line.
    """
    with _as_user_error(path, 'read'):
        content = Path(path).read_bytes()
    rows = []
    for number, line in enumerate(content.split(b'\n')[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f'{path} is damaged: line {number} is not a JSON object. Delete that line.')
        rows.append(row)
    return rows


def write_summary(run_directory: str | os.PathLike) -> dict:
    """Condenses `metrics.jsonl` into `summary.json`, and returns what it wrote.

    `per_seed` holds for each seed, for `episode.success` and `episode.return` over the fine-tuning evaluations: the
    number of `evaluations`, the `first` (the pre-trained policy's, if step 0 was evaluated), the `final`, `final_three`
    (mean of the last three: the reported score), `best`, and `stability` = final_three / best (null unless best > 0:
    the ratio of two negative returns says nothing); and under `last` every metric's last value. `mean` and `std` are
    over seeds (std with n − 1; null for one seed). `steps` is the last step of each phase. Unknown values are null.

    Raises:
        UserError: metrics missing or damaged, or summary not writable.
    """
    run_directory = Path(run_directory)
    rows = read_metrics(run_directory / 'metrics.jsonl')
    seeds = sorted({row['seed'] for row in rows})
    per_seed = {seed: _seed_summary([row for row in rows if row['seed'] == seed]) for seed in seeds}
    scores = {
        score: {key: [per_seed[seed][score][key] for seed in seeds] for key in score_summary([])} for score in SCORES
    }
    steps: dict[str, int] = {}
    for row in rows:
        steps[row['phase']] = max(steps.get(row['phase'], 0), row['step'])
    summary = {
        'seeds': seeds,
        'steps': steps,
        'wall_seconds': max((row[WALL_TIME_KEY] for row in rows if row.get(WALL_TIME_KEY) is not None), default=None),
        'mean': {score: {key: _mean(values) for key, values in keys.items()} for score, keys in scores.items()},
        'std': {score: {key: _std(values) for key, values in keys.items()} for score, keys in scores.items()},
        'per_seed': {str(seed): per_seed[seed] for seed in seeds},
    }
    write_json(run_directory / 'summary.json', summary)
    return summary


def environment_info() -> dict:
    """Versions of Python and of the packages at work, the git commit (None outside a checkout), platform, devices."""
    import jax  # here, because the rest of this file also serves tools that read results without it

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = _git('rev-parse', 'HEAD')
    changed = _git('status', '--porcelain', '--untracked-files=no') if commit else None
    return {
        'python': platform.python_version(),
        'packages': versions,
        'git_commit': commit,
        'git_changed': None if changed is None else bool(changed),
        'platform': platform.platform(),
        'cpu_count': os.cpu_count(),
        'backend': jax.default_backend(),
        'device_kind': jax.devices()[0].device_kind,
        'device_count': jax.device_count(),
        'command': sys.argv,
    }


# --- Pieces ---


@contextlib.contextmanager
def _as_user_error(path: str | os.PathLike, verb: str = 'write') -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).strip().split('\n')[0]
        advice = 'Check the path.' if verb == 'read' else 'Make room, or choose a writable --save_dir.'
        raise UserError(f'cannot {verb} {path}: {reason}. {advice}') from error


def _plain(value: Any) -> Any:
    """`value` in the types that JSON knows."""
    if hasattr(value, 'to_dict'):  # ml_collections.ConfigDict
        value = value.to_dict()
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, '__array__'):
        return _plain(_widened(np.asarray(value)).tolist())
    raise TypeError(f'{type(value).__name__} cannot be written as JSON')


def _widened(array: np.ndarray) -> np.ndarray:
    """bfloat16 and its like, whose `tolist` gives no Python floats, as float32, which holds them exactly."""
    return array.astype(np.float32) if array.dtype.kind == 'V' else array


def _seed_summary(rows: list[dict]) -> dict:
    last: dict[str, Any] = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if key not in RESERVED_KEYS}
    finetuning = [row for row in rows if row['phase'] == 'finetuning']
    scores = {}
    for score in SCORES:
        curve = [row[f'evaluation/{score}'] for row in finetuning if row.get(f'evaluation/{score}') is not None]
        scores[score] = score_summary(curve)
    return {**scores, 'last': last}


def score_summary(curve: Sequence[float]) -> dict:
    """The scores of one seed from its evaluations in order; `write_summary` says what each is."""
    final_three = _mean(curve[-3:])
    best = max(curve, default=None)
    return {
        'evaluations': len(curve),
        'first': curve[0] if curve else None,
        'final': curve[-1] if curve else None,
        'final_three': final_three,
        'best': best,
        'stability': final_three / best if curve and best > 0 else None,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _std(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / '.git').exists():  # or git would answer for some repository further up
        return None
    try:
        result = subprocess.run(
            ['git', '-C', str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
