"""Checkpoints: writing them in the background, keeping the right ones, finding, checking and restoring them.

A checkpoint is a directory `<checkpoints>/<step>/`: `state/` is orbax's (the arrays, named by their path in the
pytree), `meta.json` is what the caller says about the run, `index.json` has dtype and shape of every array and size and
CRC-32 of every file of `state/`, so that damage is found out and not trained on. It appears under its final name in one
rename, with everything in it on disk. What goes in, and when to save, is the train loop's business, not this file's.
"""

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from utils.errors import UserError, expanded
from utils.runs import require_writable, write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
WRITTEN_WITH_EVERY_STATE = {'phase': str, 'step': int, 'keep': bool}  # Metadata, with their types.

_LEFTOVER = re.compile(r'\d+\.(unfinished|deleted)')


class CheckpointWriter:
    """Saves the state of a run into `directory` from a background thread, one checkpoint at a time.

    Kept are the latest checkpoint and every one saved with `keep=True`; others go once a later one is complete. What a
    killed process left half-written or half-deleted is removed on construction, so a directory has one writer at most.
    An error while writing raises `UserError` from the next call of any method, and leaves the earlier checkpoints.

    Orbax writes the arrays. Its CheckpointManager is not used: it blocks for longer, deletes in place (so that a kill
    leaves something that looks like a checkpoint), and has no `keep` of single checkpoints that outlives the process.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = require_writable(directory).absolute()  # tensorstore takes no relative paths
        for leftover in self.directory.iterdir():
            if _LEFTOVER.fullmatch(leftover.name):
                shutil.rmtree(leftover, ignore_errors=True)
        _silence_orbax()
        # Compression is off: network weights and Adam moments are noise to zstd, which would only cost time.
        self._checkpointer = _make_checkpointer(use_compression=False)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix='checkpoint')
        self._pending: Future | None = None

    def save(self, step: int, state: Any, meta: dict, keep: bool = False) -> None:
        """Takes a private host copy of `state` and returns; the writing goes on in the background.

        The caller may donate or overwrite the state's buffers as soon as this returns. Waits first for the save before.
        A run is deterministic, so a step that is already there holds this very state: then only its metadata are
        replaced (and `keep` never taken back).

        Args:
            step: global step, the checkpoint's name.
            state: pytree of jax or numpy arrays; every array must be addressable by this process.
            meta: JSON-able description with at least a `phase`; `format_version`, `step` and `keep` are added.
            keep: never delete this checkpoint.
        Raises:
            UserError: an earlier save failed, or the metadata of an existing step cannot be replaced.
            ValueError: `step` is there already, saved in another phase.
        """
        self.wait()
        meta = {**meta, 'format_version': FORMAT_VERSION, 'step': int(step), 'keep': bool(keep)}
        # A copy, since the caller may go on filling its lists; what JSON cannot hold is its mistake, raised at once.
        meta = json.loads(json.dumps(meta, allow_nan=False))
        path = self.directory / str(int(step))
        if path.exists():
            stored = load_meta(path)
            if stored.get('phase') != meta.get('phase'):
                raise ValueError(f'{path} was saved in phase {stored.get("phase")!r}, not {meta.get("phase")!r}')
            meta['keep'] = meta['keep'] or stored['keep']
            write_json(path / 'meta.json', meta)
            return
        arrays = _host_copy(state)
        self._pending = self._thread.submit(self._write, path, arrays, meta)

    def wait(self) -> None:
        """Blocks until the checkpoint in progress is complete. Raises `UserError` if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, then releases the thread. The writer is of no use afterwards."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _write(self, path: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
        unfinished = path.with_name(f'{path.name}.unfinished')
        try:
            stored = {name: array for name, array in arrays.items() if array.size}  # orbax refuses empty arrays
            if stored:
                self._checkpointer.save(unfinished / 'state', args=ocp.args.PyTreeSave(stored))
            leaves = {name: {'dtype': a.dtype.name, 'shape': a.shape} for name, a in arrays.items()}
            unfinished.mkdir(exist_ok=True)
            write_json(unfinished / 'index.json', {'leaves': leaves, 'files': _fingerprints(unfinished / 'state')})
            write_json(unfinished / 'meta.json', meta)
            os.replace(unfinished, path)
        except Exception as error:  # tensorstore reports a full disk as a ValueError, orbax wraps others: all are told
            shutil.rmtree(unfinished, ignore_errors=True)
            raise UserError(
                f'could not write checkpoint {path}: {_first_line(error)}. Make room or choose another --save_dir; '
                'the same command then resumes from the last complete checkpoint.'
            ) from error
        self._prune(newest=path)

    def _prune(self, newest: Path) -> None:
        for old in all_in(self.directory):
            if old == newest or _is_kept(old):
                continue
            # Renamed first: a kill in the middle of deleting must not leave something that looks like a checkpoint.
            grave = old.with_name(f'{old.name}.deleted')
            try:
                os.replace(old, grave)
            except OSError as error:
                logger.warning('could not delete the old checkpoint %s: %s', old, error)
                continue
            shutil.rmtree(grave, ignore_errors=True)


def all_in(directory: Path) -> list[Path]:
    """The complete checkpoints of a `checkpoints` directory, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _is_checkpoint(path)), key=lambda path: int(path.name))


def latest_step(directory: str | os.PathLike) -> int | None:
    """The step of the newest complete checkpoint in a `checkpoints` directory, None if there is none."""
    checkpoints = all_in(Path(directory))
    return int(checkpoints[-1].name) if checkpoints else None


def resolve(path: str | os.PathLike, phase: str | None = None) -> Path:
    """The checkpoint that `path` stands for: a run directory, its `checkpoints` directory, or one checkpoint.

    Args:
        path: what the user gave.
        phase: if given, the newest checkpoint of that phase is taken instead of the newest of all ('pretraining' finds
            the end-of-pre-training checkpoint of a finished run). One checkpoint named outright is taken as it is.
    Raises:
        UserError: nothing there, or no checkpoint of that phase.
    """
    path = expanded(path)
    if _is_checkpoint(path):
        return path
    if not path.is_dir():
        raise UserError(f'{path} does not exist: expected a run directory or a checkpoint inside one.')
    directory = path / 'checkpoints' if (path / 'checkpoints').is_dir() else path
    checkpoints = all_in(directory)
    if not checkpoints:
        raise UserError(f'no complete checkpoint in {directory}: expected a run directory or a checkpoint inside one.')
    if phase is None:
        return checkpoints[-1]
    phases = {checkpoint: load_meta(checkpoint).get('phase') for checkpoint in reversed(checkpoints)}
    for checkpoint, its_phase in phases.items():
        if its_phase == phase:
            return checkpoint
    found = ', '.join(f'{its_phase} at step {checkpoint.name}' for checkpoint, its_phase in phases.items())
    raise UserError(f'no {phase} checkpoint in {directory} (found: {found}). Name a run that has one.')


def load_meta(path: str | os.PathLike) -> dict:
    """The metadata of one checkpoint (anything that `resolve` accepts).

    Raises:
        UserError: missing, unreadable, or written by a newer version of this code.
    """
    path = resolve(path)
    meta = _read_json(path / 'meta.json')
    version = meta.get('format_version')
    if not isinstance(version, int):
        raise damaged(path, 'its metadata name no format_version')
    if version > FORMAT_VERSION:
        raise UserError(
            f'checkpoint {path} has format version {version}, this code reads up to {FORMAT_VERSION}: it was written '
            'by a newer version. Update the code, or use a checkpoint that this version wrote.'
        )
    require_types(path, meta, WRITTEN_WITH_EVERY_STATE)
    return meta


def require_types(path: Path, meta: dict, types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raises `UserError`, that the checkpoint `path` is damaged, where its metadata lack a name or have another
    type."""
    for name, expected in types.items():
        if name not in meta:
            raise damaged(path, f'its metadata name no {name}')
        if not isinstance(meta[name], expected):
            raise damaged(path, f'its metadata have {name}={meta[name]!r}')


def restore(path: str | os.PathLike, template: Any, optional: Collection[str] = ()) -> Any:
    """The state saved in a checkpoint, bit for bit, in the structure of `template`.

    Args:
        path: anything that `resolve` accepts.
        template: a pytree with the structure, shapes and dtypes to expect. Leaves may be jax arrays or
            `jax.ShapeDtypeStruct`s (the result is a jax array, on the leaf's sharding if it has one) or numpy arrays
            (the result is a numpy array). Its values are not looked at, but for those of `optional`.
        optional: parts of dotted names. A leaf with one of them may be in the template alone, whose value is then the
            result, or in the checkpoint alone.
    Raises:
        UserError: damaged or newer checkpoint, or one that does not fit the template: names the leaf that differs.
    """
    path, index = _open_checkpoint(path)
    leaves, structure = _named_leaves(template)
    extra = {name for name in leaves.keys() ^ index['leaves'].keys() if not set(name.split('.')).isdisjoint(optional)}
    stored = {name: entry for name, entry in index['leaves'].items() if name not in extra}
    _check_fit(path, stored, {name: leaf for name, leaf in leaves.items() if name not in extra})
    _check_files(path, index['files'])
    arrays = _read_arrays(path, index['leaves'])
    values = [_placed_like(leaf, arrays[name]) if name in stored else leaf for name, leaf in leaves.items()]
    return jax.tree.unflatten(structure, values)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its dotted name, for a look from outside. Raises `UserError` as `restore` does."""
    path, index = _open_checkpoint(path)
    _check_files(path, index['files'])
    return _read_arrays(path, index['leaves'])


# --- The pytree and its arrays ---


def _open_checkpoint(path: str | os.PathLike) -> tuple[Path, dict]:
    path = resolve(path).absolute()
    load_meta(path)  # refuses a newer format before its arrays are interpreted
    index = _read_json(path / 'index.json')
    if not all(isinstance(index.get(part), dict) for part in ('leaves', 'files')):
        raise damaged(path, 'index.json is incomplete')
    return path, index


def _named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in paths}
    if len(leaves) != len(paths):
        raise ValueError('two leaves of the state have the same dotted name')
    return leaves, structure


def _host_copy(state: Any) -> dict[str, np.ndarray]:
    leaves, _ = _named_leaves(state)
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise TypeError(f'{name} is a typed key: save jax.random.key_data of it')
            leaf.copy_to_host_async()  # all transfers from an accelerator are under way before the first is waited for
    # np.array, not np.asarray: on CPU the latter is a view of the buffer that the next donated update writes into, or,
    # where jax notices the view, keeps it from donating.
    return {name: np.array(leaf, order='C') for name, leaf in leaves.items()}


def _check_fit(path: Path, stored: dict[str, dict], leaves: dict[str, Any]) -> None:
    advice = 'Use the --agent.* flags and the --num_seeds of the run that wrote it (see its config.json).'
    for name in leaves:
        if name not in stored:
            raise UserError(f'checkpoint {path} does not fit this configuration: it has no {name}. {advice}')
    for name, entry in stored.items():
        if name not in leaves:
            raise UserError(f'checkpoint {path} does not fit this configuration: {name} is not in use. {advice}')
        shape, dtype = tuple(np.shape(leaves[name])), _dtype(leaves[name]).name
        if (tuple(entry['shape']), entry['dtype']) != (shape, dtype):
            raise UserError(
                f'checkpoint {path} does not fit this configuration: {name} is {entry["dtype"]}{entry["shape"]} in '
                f'the checkpoint, {dtype}{list(shape)} is expected. {advice}'
            )


def _read_arrays(path: Path, stored: dict[str, dict]) -> dict[str, np.ndarray]:
    _silence_orbax()
    arrays = {name: np.zeros(entry['shape'], entry['dtype']) for name, entry in stored.items() if 0 in entry['shape']}
    wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored if name not in arrays}
    if wanted:
        try:
            with _make_checkpointer() as checkpointer:
                arrays |= checkpointer.restore(path / 'state', args=ocp.args.PyTreeRestore(restore_args=wanted))
        except Exception as error:  # tensorstore and orbax raise many types, of one meaning here
            raise damaged(path, _first_line(error)) from error
    return arrays


def _make_checkpointer(**options: Any) -> ocp.Checkpointer:
    """Orbax's reader and writer, which waits for no other process: files hold whole arrays."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'process_{me}'
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, **options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _placed_like(leaf: Any, array: np.ndarray) -> Any:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # Each process puts its own part in place.
        return jax.make_array_from_callback(array.shape, leaf.sharding, lambda index: array[index])
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return jax.device_put(array, leaf.sharding)
    return array if isinstance(leaf, np.ndarray) else array[()]


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype) if hasattr(leaf, 'dtype') else np.asarray(leaf).dtype


# --- Files ---


def _is_checkpoint(path: Path) -> bool:
    # Any of the items will do: one that has lost another is damaged, and is to be told of, not passed over.
    return path.name.isdecimal() and any((path / item).exists() for item in ('meta.json', 'index.json', 'state'))


def _is_kept(path: Path) -> bool:
    try:
        return bool(load_meta(path)['keep'])
    except (UserError, KeyError):  # damaged, or of another version: not ours to delete
        return True


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise damaged(file.parent, f'{file.name} is missing') from error
    except (OSError, ValueError) as error:
        raise damaged(file.parent, f'{file.name} is unreadable, {_first_line(error)}') from error
    if not isinstance(content, dict):
        raise damaged(file.parent, f'{file.name} holds no JSON object')
    return content


def _fingerprints(directory: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of all files below a directory."""
    files = sorted(path for path in directory.rglob('*') if path.is_file())
    return {str(path.relative_to(directory)): [path.stat().st_size, _crc32(path)] for path in files}


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, 'rb') as file:
        while piece := file.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return crc


def _check_files(path: Path, fingerprints: dict[str, list[int]]) -> None:
    # Before orbax looks at them: what it raises on damaged files says little, and tensorstore may go on reading others
    # in the background, which ends in tracebacks on stderr.
    for name, (size, crc) in fingerprints.items():
        file = path / 'state' / name
        try:
            if file.stat().st_size != size:
                raise damaged(path, f'state/{name} has {file.stat().st_size} bytes where {size} were written')
            if _crc32(file) != crc:
                raise damaged(path, f'the content of state/{name} has changed')
        except OSError as error:
            raise damaged(path, f'state/{name}: {error.strerror}') from error


def damaged(path: Path, problem: str) -> UserError:
    """The error to raise for a checkpoint that is not as it was written."""
    return UserError(
        f'checkpoint {path} is damaged: {problem}. Delete that directory to go on from an earlier checkpoint of the '
        'run, or from the start if there is none.'
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


class _NotFromOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f'{os.sep}orbax{os.sep}' not in record.pathname


def _silence_orbax() -> None:
    """Drops orbax's own log lines: dozens for each save, and tracebacks of errors that are raised here anyway."""
    logger = logging.getLogger('absl')
    if not any(isinstance(existing, _NotFromOrbax) for existing in logger.filters):
        logger.addFilter(_NotFromOrbax())
