"""Rows of a user's own data set: an npz or HDF5 file, or one of Minari's, checked and split. See `custom.py`."""

import contextlib
import functools
import zipfile
from pathlib import Path

import numpy as np
from absl import logging

from envs.data import ACTION_TOLERANCE, REAL_KINDS, read_header
from utils.errors import UNREADABLE_NPZ, UserError, expanded

MINARI = 'minari:'
VALIDATION_SHARE = 0.1  # Of the episodes, rounded, at least one.
HDF5_SUFFIXES = ('.hdf5', '.h5')
REQUIRED = ('observations', 'actions', 'terminals')
LABELS = ('rewards', 'masks')
CUT_OFFS = ('timeouts', 'truncations')  # Ends of episodes that are no terminations, as D4RL and gymnasium call them.
OPTIONAL = (*LABELS, 'next_observations', *CUT_OFFS)
SAME = 1e-5  # Of a number's largest size: two of one state may differ by this much, when they are stored apart.
BLOCK = 1 << 12  # Rows that are checked at a time, so that checks need little memory of their own.


def sizes(dataset: str) -> tuple[int, int]:
    """How many numbers an observation and an action are; reads none of the rows. `dataset`: a path, or 'minari:<id>'.

    Raises:
        UserError: there is no such data set, or it lacks an array or has one of the wrong shape.
    """
    if dataset.startswith(MINARI):
        return _minari_sizes(_open_minari(dataset))
    with _opened(expanded(dataset)) as arrays:
        shapes = _check_shapes(arrays, dataset)
    return shapes['observations'][1], shapes['actions'][1]


def read(dataset: str, labels: tuple[str, ...], split: str, max_transitions: int | None) -> dict[str, np.ndarray]:
    """{observations, actions, terminals, and each of `labels`}: the rows of a split, an episode's last its final state.

    labels: of `LABELS`. split, max_transitions: as for `custom.load_raw`.

    Raises:
        UserError: the data set cannot be used.
    """
    read_rows = _read_minari if dataset.startswith(MINARI) else _read_file
    return read_rows(dataset, labels, split, max_transitions)


@functools.cache
def warn_once(message: str) -> None:
    logging.warning(message)


# ------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def _opened(path: Path):
    """The arrays of a file by name, not yet read; what reading raises becomes a `UserError`."""
    if not path.is_file():
        raise UserError(f'--dataset={path} does not exist: expected an npz or HDF5 file, or minari:<id>')
    try:
        if path.suffix == '.npz':
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix('.npy') for name in archive.namelist()]
                yield {name: _NpzArray(archive, name) for name in names if name in REQUIRED + OPTIONAL}
        elif path.suffix in HDF5_SUFFIXES:
            import h5py

            with h5py.File(path) as file:
                yield {name: file[name] for name in file if isinstance(file[name], h5py.Dataset)}
        else:
            raise UserError(f'--dataset={path}: expected a name that ends in .npz, .hdf5 or .h5')
    except UNREADABLE_NPZ as error:
        raise UserError(
            f'{path} cannot be read ({type(error).__name__}: {error}): it is damaged or of another format'
        ) from error


class _NpzArray:
    """One array of an npz file: its shape and type from the header alone, its values on request."""

    def __init__(self, archive: zipfile.ZipFile, name: str):
        self._archive, self._name = archive, f'{name}.npy'
        with archive.open(self._name) as member:
            self.shape, _, self.dtype = read_header(member)

    def __getitem__(self, rows) -> np.ndarray:
        with self._archive.open(self._name) as member:
            return np.lib.format.read_array(member, allow_pickle=False)[rows]


def _check_shapes(arrays, dataset: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's arrays by name. Raises UserError unless they, and the types, can be those of a data
    set."""
    shapes = {name: tuple(arrays[name].shape) for name in (*REQUIRED, *OPTIONAL) if name in arrays}
    missing = [name for name in REQUIRED if name not in shapes]
    if missing:
        raise UserError(
            f'{dataset}: it holds no {", ".join(missing)}; expected {", ".join(REQUIRED)} and, if it has them, '
            f'{", ".join(OPTIONAL)}'
        )
    rows = shapes['terminals'][0] if shapes['terminals'] else 0
    for name, shape in shapes.items():
        if arrays[name].dtype.kind not in REAL_KINDS:
            raise UserError(f'{dataset}: {name} are of type {arrays[name].dtype}; expected real numbers')
        columns = {'observations': 'd', 'next_observations': 'd', 'actions': 'a'}.get(name)
        if len(shape) != (2 if columns else 1) or shape[0] != rows or 0 in shape:
            expected = f'({rows}, {columns})' if columns else f'({rows},)'
            raise UserError(f'{dataset}: {name} have shape {shape}; with {rows} terminals, expected {expected}')
    if shapes.get('next_observations', shapes['observations']) != shapes['observations']:
        raise UserError(
            f'{dataset}: next_observations have shape {shapes["next_observations"]}, observations '
            f'{shapes["observations"]}; expected the same'
        )
    return shapes


def _read_file(dataset: str, labels: tuple[str, ...], split: str, max_transitions: int | None) -> dict[str, np.ndarray]:
    """The rows of a split; the final state of each episode is its last row.

    Arrays are read one after the other: beside the rows that are kept, no more than one is ever held.
    """
    with _opened(expanded(dataset)) as arrays:
        _check_shapes(arrays, dataset)
        if labels and 'rewards' not in arrays:
            raise UserError(f'{dataset}: it holds no rewards, which fine-tuning needs; pretrain.py does without')
        terminals, masks = _read_ends(arrays, dataset)
        are_transitions = 'next_observations' in arrays
        rows = _split_rows(terminals, split, max_transitions, dataset, are_transitions)
        raw = {'terminals': terminals[rows].copy()}
        # Labels that are not asked for may still tell that final states are missing.
        for name in ('observations', 'actions', *(labels if are_transitions else LABELS)):
            if name in arrays:
                raw[name] = _copy(arrays[name][rows])
        if 'masks' in labels and 'masks' not in raw and masks is not None:
            raw['masks'] = masks[rows].copy()
        if not are_transitions:
            _refuse_transitions(raw, dataset)
            _blank_last_rows(raw)
        raw = {name: raw[name] for name in (*REQUIRED, *labels) if name in raw}
        _check_values(raw, rows.start, dataset)
        if are_transitions:
            following = arrays['next_observations'][rows]
            _require_finite(following, 'next_observations', rows.start, dataset)
            _check_consecutive(raw, following, rows.start, dataset)
            final_states = following[raw['terminals']].astype(np.float32)
            del following
            _append_final_states(raw, final_states)
    if 'masks' in labels and 'masks' not in raw:
        raw['masks'] = np.ones(len(raw['terminals']), np.float32)
    return raw


def _read_ends(arrays, dataset: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(rows,) bool, where episodes end, and (rows,) float32, the masks that this tells: none without `CUT_OFFS`.

    Raises:
        UserError: one of the arrays is not finite, or the ends contradict each other.
    """
    terminals = _read_flags(arrays, 'terminals', dataset)
    names = [name for name in CUT_OFFS if name in arrays]
    if not names:
        return terminals, None
    cut_off = np.logical_or.reduce([_read_flags(arrays, name, dataset) for name in names])
    if 'next_observations' not in arrays:
        if (cut_off & ~terminals).any():
            raise UserError(
                f'{dataset}: episodes end where {" or ".join(names)} are true and terminals are not, so its rows look '
                'like transitions, whose final states are missing: add next_observations, or, if the last row of each '
                'episode is its final state, mark it in terminals'
            )
        return terminals, None
    if (terminals == cut_off).all():  # Nothing but limits.
        return terminals, np.ones(len(terminals), np.float32)
    if 'rewards' in arrays and 'masks' not in arrays and cut_off.any() and terminals[cut_off].all():
        raise UserError(
            f'{dataset}: terminals are true wherever {" or ".join(names)} are, so they do not tell where the task '
            'terminated; expected terminals there only, or masks that are 0 there'
        )
    return terminals | cut_off, 1 - terminals.astype(np.float32)


def _read_flags(arrays, name: str, dataset: str) -> np.ndarray:
    """(rows,) bool. Raises UserError at a NaN, which would be true."""
    flags = arrays[name][()]
    _require_finite(flags, name, 0, dataset)
    return flags.astype(bool)


def _refuse_transitions(raw: dict[str, np.ndarray], dataset: str) -> None:
    """Raises UserError, or warns, where the last rows of episodes look like transitions rather than final states.

    A mask of 0 tells, unless it repeats that of the row before, or pads like an action of 0. A reward does not: final
    states may have one of their own.
    """
    last = np.flatnonzero(raw['terminals'])
    acted = np.any(np.isfinite(raw['actions'][last]) & (raw['actions'][last] != 0), axis=1)
    if 'masks' in raw:
        repeated = (last > 0) & ~raw['terminals'][last - 1] & (raw['masks'][last - 1] == 0)
        terminated = int(np.sum(acted & (raw['masks'][last] == 0) & ~repeated))
        if terminated:
            raise UserError(
                f'{dataset}: in {terminated} of {len(acted)} episodes the last row has an action and a mask of 0, so '
                'rows look like transitions, whose final states are missing: add next_observations, or, if the last '
                'row of each episode is its final state, set its mask to 1'
            )
    if 'rewards' in raw:
        rewarded = int(np.sum(acted & np.isfinite(raw['rewards'][last]) & (raw['rewards'][last] != 0)))
        if 2 * rewarded > len(acted):
            warn_once(
                f'{dataset}: the last row of most episodes has an action and a reward, which mean nothing there: it is '
                'the final state; if rows are transitions instead, add next_observations'
            )


def _blank_last_rows(raw: dict[str, np.ndarray]) -> None:
    """Whatever a final state has for an action, reward and mask means nothing: it need not even be a number."""
    for name, blank in (('actions', 0), ('rewards', 0), ('masks', 1)):
        if name in raw:
            raw[name][raw['terminals']] = blank


def _check_consecutive(raw: dict[str, np.ndarray], following: np.ndarray, first: int, dataset: str) -> None:
    """Raises UserError unless each transition inside an episode leads to the next row's state."""
    observations, terminals = raw['observations'], raw['terminals']
    tolerance = SAME * np.maximum(observations.max(axis=0), -observations.min(axis=0))
    for block in _blocks(len(observations) - 1):
        difference = np.abs(following[block] - observations[block.start + 1 : block.stop + 1])
        differs = (difference > tolerance).any(axis=1) & ~terminals[block]
        if differs.any():
            row = first + block.start + int(np.argmax(differs))
            raise UserError(
                f'{dataset}: next_observations of row {row} are not the observations of row {row + 1}, the first such '
                'place; expected the transitions of each episode in turn, its last one marked in terminals, or in '
                'timeouts where the task did not terminate'
            )


def _append_final_states(raw: dict[str, np.ndarray], final_states: np.ndarray) -> None:
    """Rows that are transitions (s, a, s′) → rows that are states, with one more at the end of each episode; in place,
    array by array."""
    ends = np.flatnonzero(raw['terminals'])
    inserted = {'observations': final_states, 'terminals': True}  # Actions and labels of a final state mean nothing.
    for name in raw:
        raw[name] = np.insert(raw[name], ends + 1, inserted.get(name, 0), axis=0)
    raw['terminals'][ends + np.arange(len(ends))] = False


def _blocks(rows: int):
    return (slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK))


def _copy(array: np.ndarray) -> np.ndarray:
    """A copy in float32, row after row; what is too large for it becomes infinite, for `_require_finite` to tell of."""
    with np.errstate(over='ignore'):
        return np.array(array, np.float32, order='C')


def _require_finite(array: np.ndarray, name: str, first: int, dataset: str) -> None:
    """Raises UserError at the first row that is not finite in float32. first: which row of the data set row 0 is."""
    for block in _blocks(len(array)):
        finite = np.isfinite(_copy(array[block])).reshape(block.stop - block.start, -1).all(1)
        if not finite.all():
            row = first + block.start + int(np.argmin(finite))
            raise UserError(f'{dataset}: {name} hold a NaN or an infinity, first in row {row} (as float32)')


def _check_values(raw: dict[str, np.ndarray], first: int, dataset: str) -> None:
    """first: which row of the data set the first one is."""
    for name, array in raw.items():
        _require_finite(array, name, first, dataset)
    largest = max(raw['actions'].max(), -raw['actions'].min())
    if largest > 1.0 + ACTION_TOLERANCE:
        raise UserError(
            f'{dataset}: actions reach {largest:.3g}; expected [-1, 1]: rescale them from the action space’s bounds'
        )
    if 'masks' in raw and not ((raw['masks'] >= 0) & (raw['masks'] <= 1)).all():
        raise UserError(
            f'{dataset}: masks reach beyond [0, 1]; expected 0 where the episode terminates and 1 elsewhere'
        )


def _split_rows(
    terminals: np.ndarray, split: str, max_transitions: int | None, dataset: str, are_transitions: bool
) -> slice:
    """The rows of a split: whole episodes, the last tenth of them for validation."""
    if not terminals.any():
        raise UserError(f'{dataset}: no row of its {len(terminals)} is terminal; the last row of each episode must be')
    if not terminals[-1]:
        beyond = len(terminals) - 1 - int(np.flatnonzero(terminals)[-1])
        raise UserError(
            f'{dataset}: its last {beyond} rows belong to an episode without an end; mark the last row as terminal (or '
            'in timeouts, if it has them), or leave them out'
        )
    ends = np.flatnonzero(terminals)
    validation = max(1, round(VALIDATION_SHARE * len(ends)))
    if len(ends) < 2:
        raise UserError(f'{dataset}: it holds a single episode; expected two or more, the last tenth is for validation')
    first = 0 if split == 'train' else int(ends[-validation - 1]) + 1
    ends = ends[:-validation] if split == 'train' else ends[-validation:]
    final_states = 0 if are_transitions else np.arange(1, len(ends) + 1)
    transitions = ends + 1 - first - final_states  # Up to and including each episode.
    if transitions[-1] < 1:
        raise UserError(
            f'{dataset}: every episode of the {split} split is a single row; an episode needs two rows to hold a '
            'transition (or the file next_observations)'
        )
    if max_transitions is not None:
        if transitions[0] > max_transitions:
            raise UserError(
                f'{dataset}: its first episode has {transitions[0]} transitions, and only {max_transitions} were '
                'wanted; data are cut between episodes, so ask for at least that many'
            )
        ends = ends[transitions <= max_transitions]
    return slice(first, int(ends[-1]) + 1)


# ------------------------------------------------------------------------------------------------------------ Minari


def _open_minari(dataset: str):
    try:
        import minari
    except ImportError as error:
        raise UserError(
            f'--dataset={dataset} needs Minari, which cannot be imported ({error}): pip install "minari[hdf5,hf]"'
        ) from error
    try:
        return minari.load_dataset(dataset.removeprefix(MINARI), download=True)
    except Exception as error:  # Whatever the storage or the network raises.
        raise UserError(
            f'--dataset={dataset} cannot be loaded ({type(error).__name__}: {error}); '
            'minari list local, or remote, shows the ids'
        ) from error


def _minari_sizes(data) -> tuple[int, int]:
    import gymnasium

    for kind, space in (('observation', data.observation_space), ('action', data.action_space)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise UserError(f'{MINARI}{data.spec.dataset_id}: its {kind} space is {space}; expected a Box of vectors')
    return data.observation_space.shape[0], data.action_space.shape[0]


def _read_minari(
    dataset: str, labels: tuple[str, ...], split: str, max_transitions: int | None
) -> dict[str, np.ndarray]:
    """The rows of a split; actions are rescaled from the bounds of the action space, where it has them."""
    data = _open_minari(dataset)
    _minari_sizes(data)
    low, high = data.action_space.low, data.action_space.high
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        low, high = -1.0, 1.0
    columns = {name: [] for name in (*REQUIRED, *labels)}
    for episode in data.iterate_episodes():
        steps = len(episode.actions)
        actions = 2 * (episode.actions - low) / (high - low) - 1
        rows = {
            'observations': episode.observations,
            'actions': np.concatenate([actions, np.zeros((1, actions.shape[1]))]),
            'terminals': np.arange(steps + 1) == steps,
            'rewards': np.append(episode.rewards, 0.0),
            'masks': np.append(1.0 - episode.terminations, 1.0),
        }
        for name, parts in columns.items():
            parts.append(rows[name] if name == 'terminals' else _copy(rows[name]))  # Which lets the rest go.
    raw = {name: np.concatenate(columns.pop(name)) for name in list(columns)}
    _check_values(raw, 0, dataset)
    rows = _split_rows(raw['terminals'], split, max_transitions, dataset, are_transitions=False)
    return {name: raw.pop(name)[rows].copy() for name in list(raw)}
