"""Reads a task's data files into arrays of rows, checks them, and labels them with its reward when it may be seen.

A row is a state and the action taken in it; each episode keeps its final state as a row whose action means nothing.
Clipping, normalising, and sampling come later (`utils/datasets.py`). OGBench's files are made by `collect_ogbench.py`
or `download_ogbench.py` and labelled here; ExORL's are made, and labelled, by `convert_exorl.py`.

Every set is one npz file, stored without compression: NumPy alone opens it, each array is read once, from front to
back, at the disk's speed, and checksums of all of it come for free. HDF5 would add a library, and partial reads that
nobody makes: what is used of a set is always its first episodes.
"""

import functools
import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np

from envs import TaskSpec, make_env, task_spec
from utils.errors import UNREADABLE_NPZ, UserError, expanded

DEFAULT_DATASET_DIR = '~/.ogbench/data'
PHASES = ('pretraining', 'finetuning')
SPLITS = ('train', 'val')
# What the commands call the phases.
COLLECTOR_SPLITS = {'pretraining': 'pretrain', 'finetuning': 'finetune'}

CHUNK_BYTES = 1 << 22
ALIGNMENT = 64  # Bytes.
# Actions are clipped to [-1, 1] when they are used. This much beyond is rounding; more means that they were never
# scaled.
ACTION_TOLERANCE = 1e-3
REAL_KINDS = 'biuf'  # Of NumPy's data types: bool, integers, floating point.


def require_set(phase: str, split: str) -> None:
    """Raises UserError unless they name one of the sets that there are for a task."""
    if phase not in PHASES or split not in SPLITS:
        raise UserError(f'phase={phase!r}, split={split!r}: expected {" or ".join(PHASES)}, and {" or ".join(SPLITS)}')


def dataset_path(dataset_dir: str | Path, domain: str, phase: str, split: str) -> Path:
    """The file of an OGBench domain ('cube-single'), phase and split, under the published name; ~ is expanded."""
    require_set(phase, split)
    kind = {'pretraining': 'play', 'finetuning': 'play-ft'}[phase]
    suffix = {'train': '', 'val': '-val'}[split]
    return expanded(dataset_dir) / f'{domain}-{kind}-v0{suffix}.npz'


def exorl_dataset_path(dataset_dir: str | Path, domain: str, task: str | None, phase: str, split: str) -> Path:
    """The file of an ExORL domain's reward-free set, or of the set labelled with `task` ('run'); ~ is expanded."""
    require_set(phase, split)
    name = domain if phase == 'pretraining' else f'{domain}_{task}-ft'
    suffix = {'train': '', 'val': '-val'}[split]
    return expanded(dataset_dir) / f'exorl-{name}{suffix}.npz'


def task_path(spec: TaskSpec, phase: str, split: str, dataset_dir: str | Path) -> Path:
    """The file that holds a task's data of one phase and split."""
    if spec.suite == 'exorl':
        return exorl_dataset_path(dataset_dir, spec.domain, spec.name.removeprefix(f'{spec.domain}_'), phase, split)
    return dataset_path(dataset_dir, spec.domain, phase, split)


def load_raw(
    env_name: str, phase: str, split: str, dataset_dir: str | Path, max_transitions: int | None = None
) -> dict:
    """Loads one file.

    Args:
        env_name: a task (see `envs.task_spec`).
        phase: 'pretraining' (reward-free) or 'finetuning' (labelled with the task's reward).
        split: 'train' or 'val'.
        dataset_dir: folder of the files.
        max_transitions: keep as many whole episodes, from the first on, as hold no more transitions than this; None
            keeps all.

    Returns:
        observations (rows, d) float32, or (rows, H, W, C) uint8; actions (rows, a) float32, as stored; terminals
        (rows,) bool, True exactly on each episode's last row; in the fine-tuning phase also rewards and masks (rows,)
        float32. In OGBench the reward is the number of the task's sub-goals that the row's own state satisfies minus
        their number, and the mask 0 where it satisfies all of them, else 1. In ExORL the reward is that of the next
        row's state (0 where there is none), and the mask always 1. `source` says where they come from: file,
        fingerprint (of the content), rows, episodes, metadata (how the file says it was made, or None).

    Raises:
        UserError: the file is missing, damaged, not of this task, or too short; the message names it and what to do.
    """
    spec = task_spec(env_name)
    path = task_path(spec, phase, split, dataset_dir)
    if not path.is_file():
        raise UserError(_missing_message(spec, phase, path))
    if max_transitions is not None and max_transitions < 1:
        raise UserError(f'{max_transitions} transitions of {path} were asked for; expected 1 or more')
    try:
        with zipfile.ZipFile(path) as archive:
            raw = _read_rows(archive, spec, path, max_transitions)
            raw['source'] = _describe(archive, path, raw)
            states = None
            if phase == 'finetuning' and spec.suite == 'exorl':
                raw['rewards'], raw['masks'] = _read_rewards(archive, path, len(raw['terminals']))
            elif phase == 'finetuning':
                states = _read_states(archive, spec, path, len(raw['terminals']))
            _require_named(spec, phase, path, raw['source']['metadata'])
    except UNREADABLE_NPZ as error:
        raise UserError(
            f'{path} cannot be read ({type(error).__name__}: {error}): it is damaged or not an npz file; delete it and '
            f'{_how_to_get(spec, phase, path)}'
        ) from error
    if states is not None:
        raw['rewards'], raw['masks'] = label_states(env_name, states)
    return raw


def _how_to_get(spec: TaskSpec, phase: str, path: Path) -> str:
    if spec.suite == 'exorl':
        return (
            f'make it with: python -m envs.convert_exorl --domain={spec.domain} '
            f'--task={spec.name.removeprefix(f"{spec.domain}_")} --dataset_dir={path.parent} (from episodes that '
            f'python -m envs.download_exorl --domain={spec.domain} or python -m envs.collect_exorl '
            f'--domain={spec.domain} gets)'
        )
    where = f'--env_name={spec.dataset_env} --dataset_dir={path.parent}'
    collect = f'python -m envs.collect_ogbench --split={COLLECTOR_SPLITS[phase]} {where}'
    if phase == 'finetuning':
        return f'make it with: {collect}'
    return f'make it with: {collect} (or download the published file with: python -m envs.download_ogbench {where})'


def _missing_message(spec: TaskSpec, phase: str, path: Path) -> str:
    return f'no data for {spec.name}: {path} does not exist; {_how_to_get(spec, phase, path)}'


def _read_rows(archive: zipfile.ZipFile, spec: TaskSpec, path: Path, max_transitions: int | None) -> dict:
    shapes = {name: _member_shape(archive, name, path) for name in ('observations', 'actions', 'terminals')}
    if len(shapes['terminals']) != 1:
        raise UserError(f'{path}: terminals have shape {shapes["terminals"]}; expected one number a row')
    terminals = _read_member(archive, 'terminals', shapes['terminals'][0])
    for name, row_shape in {'observations': spec.observation_shape, 'actions': (spec.action_size,)}.items():
        if shapes[name] != (len(terminals), *row_shape):
            raise UserError(
                f'{path}: {name} have shape {shapes[name]}, but {spec.domain} with {len(terminals)} terminals needs '
                f'{(len(terminals), *row_shape)}; is it the file of another environment?'
            )

    _require_finite(terminals, 'terminals', path)
    terminals = terminals != 0
    rows = _whole_episode_rows(terminals, path, max_transitions)
    raw = {
        'observations': _read_member(archive, 'observations', rows),
        'actions': _read_member(archive, 'actions', rows),
        'terminals': terminals[:rows],
    }
    if spec.visual and raw['observations'].dtype != np.uint8:
        raise UserError(f'{path}: observations are {raw["observations"].dtype}; images are expected as uint8')
    for name in ('observations', 'actions'):
        if not (spec.visual and name == 'observations'):
            raw[name] = _as_float32(raw[name], name, path)
    largest = max(raw['actions'].max(), -raw['actions'].min())
    if largest > 1.0 + ACTION_TOLERANCE:
        raise UserError(f'{path}: actions reach {largest:.3g}; they are expected in [-1, 1]')
    return raw


def _whole_episode_rows(terminals: np.ndarray, path: Path, max_transitions: int | None) -> int:
    """Number of rows up to the end of the last episode to keep."""
    ends = np.flatnonzero(terminals)
    if not ends.size:
        raise UserError(f'{path}: no row of its {len(terminals)} is terminal; the last row of each episode must be')
    transitions = ends - np.arange(len(ends))  # Up to and including each episode: rows so far minus episodes so far.
    if max_transitions is not None:
        ends = ends[transitions <= max_transitions]
        if not ends.size:
            raise UserError(
                f'{path}: its first episode has {transitions[0]} transitions, and only {max_transitions} were wanted; '
                'data are cut between episodes, so ask for at least that many'
            )
    if transitions[len(ends) - 1] < 1:
        raise UserError(f'{path}: every episode is a single row; an episode needs two rows to hold a transition')
    return int(ends[-1]) + 1


def read_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether it is in column order, dtype) of the array in an open member of an npz file; leaves it at the
    first byte of the data."""
    version = np.lib.format.read_magic(member)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return readers[version](member)


def _member_header(member) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) by `read_header`. Raises ValueError for what `_read_member` cannot read row by row."""
    shape, fortran_order, dtype = read_header(member)
    if dtype.hasobject or (fortran_order and len(shape) > 1):
        raise ValueError(f'an array of {dtype} in {"column" if fortran_order else "row"} order')
    return shape, dtype


def _member_shape(archive: zipfile.ZipFile, name: str, path: Path) -> tuple[int, ...]:
    """The shape of an array. Raises UserError if there is none of that name, or it is not of real numbers."""
    if f'{name}.npy' not in archive.namelist():
        raise UserError(
            f'{path}: it holds no {name}, only {", ".join(entry.removesuffix(".npy") for entry in archive.namelist())}'
        )
    with archive.open(f'{name}.npy') as member:
        shape, dtype = _member_header(member)
    if dtype.kind not in REAL_KINDS:
        raise UserError(f'{path}: {name} are of type {dtype}; real numbers are expected')
    return shape


def _empty_aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array that begins where JAX on a CPU wants it: such data it takes over, others it copies."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _read_member(archive: zipfile.ZipFile, name: str, rows: int) -> np.ndarray:
    """The first `rows` rows of an array, without ever holding the others.

    The others are read past, though: a zip file's checksum is that of the whole member, and comes at its end.
    """
    with archive.open(f'{name}.npy') as member:
        shape, dtype = _member_header(member)
        array = _empty_aligned((rows, *shape[1:]), dtype)
        target = memoryview(array.reshape(-1).view(np.uint8))
        filled = 0
        while filled < len(target):
            chunk = member.read(min(CHUNK_BYTES, len(target) - filled))
            if not chunk:
                raise EOFError(f'{name} end after {filled} of {len(target)} bytes')
            target[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        while member.read(CHUNK_BYTES):
            pass
    return array


def _as_float32(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    """The array in float32, itself if it is that already. Raises UserError unless all of it is finite then."""
    with np.errstate(over='ignore'):  # What is too large becomes infinite, and is told of as such.
        array = array.astype(np.float32, copy=False)
    _require_finite(array, name, path)
    return array


def _require_finite(array: np.ndarray, name: str, path: Path) -> None:
    """Raises UserError at the first NaN or infinity; looks at a few megabytes at a time."""
    if not np.issubdtype(array.dtype, np.floating):
        return
    step = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        finite = np.isfinite(array[start : start + step])
        if not finite.all():
            row = start + int(np.argwhere(~finite)[0][0])
            raise UserError(
                f'{path}: {name} hold a NaN or an infinity, first in row {row} (as {array.dtype}); delete the file and '
                'make it anew'
            )


def _read_rewards(archive: zipfile.ZipFile, path: Path, rows: int) -> tuple[np.ndarray, np.ndarray]:
    shape = _member_shape(archive, 'rewards', path)
    if len(shape) != 1 or shape[0] < rows:
        raise UserError(f'{path}: rewards have shape {shape}; one number for each of {rows} rows is expected')
    rewards = _as_float32(_read_member(archive, 'rewards', rows), 'rewards', path)
    return rewards, np.ones(rows, np.float32)


def _require_named(spec: TaskSpec, phase: str, path: Path, metadata: dict | None) -> None:
    """Raises UserError if the file says that it belongs to another domain or is labelled with another task."""
    if spec.suite != 'exorl' or metadata is None:
        return
    expected = {'domain': spec.domain} | ({'task': spec.name} if phase == 'finetuning' else {})
    for key, value in expected.items():
        if metadata.get(key, value) != value:
            raise UserError(f'{path}: it says that its {key} is {metadata[key]}, not {value}; has it been renamed?')


def _read_states(archive: zipfile.ZipFile, spec: TaskSpec, path: Path, rows: int) -> dict[str, np.ndarray]:
    """The simulator's state at each row, as `label_states` wants it."""
    needed = ['qpos'] if spec.domain.removeprefix('visual-').startswith('cube') else ['qpos', 'button_states']
    states = {}
    for name in needed:
        shape = _member_shape(archive, name, path)
        if len(shape) != 2 or shape[0] < rows:
            raise UserError(
                f'{path}: {name} have shape {shape}; labels need a table with a row for each of {rows} states'
            )
        states[name] = _read_member(archive, name, rows)
        _require_finite(states[name], name, path)
    return states


@functools.lru_cache(maxsize=2)
def _labelling_env(env_name: str):
    """The environment that knows the task's goal; kept, for making one takes seconds and files come in pairs.

    An image task's is the same task with state observations: labels need no renderer.
    """
    return make_env(env_name.removeprefix('visual-'))


def label_states(env_name: str, states: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Labels simulator states with an OGBench task's reward R(s), by the rule of the simulator's package.

    Args:
        env_name: the task.
        states: qpos (rows, nq) and, for scene and puzzle, button_states (rows, buttons).

    Returns:
        rewards (rows,) float32, satisfied sub-goals minus all sub-goals; masks (rows,) float32, 0 where all are
        satisfied, else 1.
    """
    from ogbench.relabel_utils import relabel_dataset

    labelled = dict(states)
    relabel_dataset(task_spec(env_name).env_id, _labelling_env(env_name), labelled)
    return labelled['rewards'], labelled['masks']


def _describe(archive: zipfile.ZipFile, path: Path, raw: dict) -> dict:
    # The checksums that the file keeps of its members identify the content, and cost nothing to read.
    content = sorted(
        (entry.filename, entry.file_size, entry.CRC)
        for entry in archive.infolist()
        if entry.filename != 'created.npy'  # When a file was made is not what it holds.
    )
    metadata = None
    if 'metadata.npy' in archive.namelist():
        with archive.open('metadata.npy') as member:
            metadata = json.loads(str(np.lib.format.read_array(member, allow_pickle=False)))
    return {
        'file': path.name,
        'fingerprint': hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        'rows': len(raw['terminals']),
        'episodes': int(raw['terminals'].sum()),
        'metadata': metadata,
    }
