"""A user's own data set, an npz or HDF5 file or one of Minari's, and a gymnasium environment to evaluate in.

One data set serves both phases: pre-training sees it without its rewards, fine-tuning with them. Its last episodes are
the validation set. What a file has to hold is in `docs/custom_data.md`; the benchmark's own data are read by `data.py`.
"""

import contextlib
import hashlib
import re
import zipfile
from pathlib import Path

import numpy as np

from envs import TaskSpec
from envs.data import ACTION_TOLERANCE, PHASES, SPLITS
from utils.errors import UNREADABLE_NPZ, UserError

MINARI = 'minari:'
SUITE = 'custom'
PREFIX = 'custom-'  # Of task names; no name of the benchmark's tasks begins with it.
VALIDATION_SHARE = 0.1  # Of the episodes, rounded, at least one.
HDF5_SUFFIXES = ('.hdf5', '.h5')
REQUIRED = ('observations', 'actions', 'terminals')
OPTIONAL = ('rewards', 'masks', 'next_observations')


def task_name(dataset: str) -> str:
    """What runs and results call the task of a data set, which need not exist any more: 'custom-' and its name."""
    stem = dataset.removeprefix(MINARI) if dataset.startswith(MINARI) else Path(dataset).stem
    return PREFIX + re.sub(r'[^\w+=@,.-]', '-', stem)


def task_spec(dataset: str, env_name: str) -> TaskSpec:
    """What `--dataset` and `--env_name` stand for; opens the data set for its shapes, and reads none of its rows.

    Data sets with observations and actions of the same sizes are one domain: a checkpoint pre-trained on one can be
    fine-tuned on another.

    Raises:
        UserError: there is no such data set, or it lacks an array or has one of the wrong shape.
    """
    if dataset.startswith(MINARI):
        observation_size, action_size = _minari_sizes(_open_minari(dataset))
    else:
        with _opened(Path(dataset).expanduser()) as arrays:
            shapes = {name: tuple(arrays[name].shape) for name in (*REQUIRED, *OPTIONAL) if name in arrays}
        _check_shapes(shapes, dataset)
        observation_size, action_size = shapes['observations'][1], shapes['actions'][1]
    return TaskSpec(
        name=task_name(dataset),
        suite=SUITE,
        domain=f'custom data of {observation_size} observations and {action_size} actions',
        visual=False,
        env_id=env_name,
        dataset_env=dataset,
        reward_at='next_observations',
        observation_shape=(observation_size,),
        action_size=action_size,
    )


def load_raw(dataset: str, phase: str, split: str, max_transitions: int | None = None) -> dict:
    """Loads one split of a data set, as `envs.data.load_raw` does for the benchmark's.

    Args:
        dataset: a path, or 'minari:<id>'.
        phase: 'pretraining' (rewards are dropped) or 'finetuning'.
        split: 'train', or 'val': the last tenth of the episodes.
        max_transitions: keep as many whole episodes, from the first on, as hold no more transitions than this.

    Raises:
        UserError: the data set cannot be used; the message names it, and what is wrong.
    """
    if phase not in PHASES or split not in SPLITS:
        raise UserError(f'phase={phase!r}, split={split!r}: expected {" or ".join(PHASES)}, and {" or ".join(SPLITS)}')
    labels = ('rewards', 'masks') if phase == 'finetuning' else ()
    raw = _read_minari(dataset) if dataset.startswith(MINARI) else _read_file(dataset, labels)
    if labels and 'rewards' not in raw:
        raise UserError(f'{dataset}: it holds no rewards, which fine-tuning needs; pretrain.py does without')
    if labels and 'masks' not in raw:
        raw['masks'] = np.ones(len(raw['terminals']), np.float32)
    raw = {name: raw[name] for name in (*REQUIRED, *labels)}
    _check_values(raw, dataset)
    rows = _split_rows(raw['terminals'], split, max_transitions, dataset)
    raw = {name: array[rows].copy() for name, array in raw.items()}  # Copies: the rest of the file is let go.
    digest = hashlib.sha256()
    for name in sorted(raw):
        digest.update(name.encode())
        digest.update(raw[name])
    raw['source'] = {
        'file': dataset if dataset.startswith(MINARI) else Path(dataset).name,
        'fingerprint': digest.hexdigest(),
        'rows': len(raw['terminals']),
        'episodes': int(raw['terminals'].sum()),
        'metadata': None,
    }
    return raw


def make_env(spec: TaskSpec, render_mode: str | None = None):
    """The gymnasium environment of a data set's task, its actions rescaled to [-1, 1].

    Raises:
        UserError: gymnasium cannot make it, or its spaces are not those of the data.
    """
    import gymnasium

    try:
        env = gymnasium.make(spec.env_id, render_mode=render_mode, disable_env_checker=True)
    except (gymnasium.error.Error, ImportError) as error:
        raise UserError(
            f'--env_name={spec.env_id}: gymnasium cannot make it ({type(error).__name__}: {error}); with --dataset, '
            'expected a registered environment (module:id imports the module first), or none'
        ) from error
    sizes = {'observation': spec.observation_shape, 'action': (spec.action_size,)}
    spaces = {'observation': env.observation_space, 'action': env.action_space}
    for kind, shape in sizes.items():
        if not isinstance(spaces[kind], gymnasium.spaces.Box) or spaces[kind].shape != shape:
            env.close()
            raise UserError(
                f'--env_name={spec.env_id}: its {kind} space is {spaces[kind]}, but {spec.dataset_env} needs a Box of '
                f'shape {shape}; is it the environment of other data?'
            )
    if not (np.isfinite(env.action_space.low).all() and np.isfinite(env.action_space.high).all()):
        env.close()
        raise UserError(f'--env_name={spec.env_id}: its actions have no bounds, so [-1, 1] cannot be scaled to them')
    return gymnasium.wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0))


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
    """One array of an npz file: its shape from the header alone, its values on request."""

    def __init__(self, archive: zipfile.ZipFile, name: str):
        self._archive, self._name = archive, f'{name}.npy'
        with archive.open(self._name) as member:
            version = np.lib.format.read_magic(member)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            self.shape = read_header(member)[0]

    def __getitem__(self, _) -> np.ndarray:
        with self._archive.open(self._name) as member:
            return np.lib.format.read_array(member, allow_pickle=False)


def _check_shapes(shapes: dict[str, tuple[int, ...]], dataset: str) -> None:
    missing = [name for name in REQUIRED if name not in shapes]
    if missing:
        raise UserError(
            f'{dataset}: it holds no {", ".join(missing)}; expected {", ".join(REQUIRED)} and, if it has them, '
            f'{", ".join(OPTIONAL)}'
        )
    rows = shapes['terminals'][0] if shapes['terminals'] else 0
    for name, shape in shapes.items():
        columns = {'observations': 'd', 'next_observations': 'd', 'actions': 'a'}.get(name)
        if len(shape) != (2 if columns else 1) or shape[0] != rows or 0 in shape:
            expected = f'({rows}, {columns})' if columns else f'({rows},)'
            raise UserError(f'{dataset}: {name} have shape {shape}; with {rows} terminals, expected {expected}')
    if shapes.get('next_observations', shapes['observations']) != shapes['observations']:
        raise UserError(
            f'{dataset}: next_observations have shape {shapes["next_observations"]}, observations '
            f'{shapes["observations"]}; expected the same'
        )


def _read_file(dataset: str, labels: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of a file, of the labels those that are there; the final state of each episode is its last row."""
    with _opened(Path(dataset).expanduser()) as arrays:
        _check_shapes({name: tuple(arrays[name].shape) for name in (*REQUIRED, *OPTIONAL) if name in arrays}, dataset)
        wanted = [name for name in (*REQUIRED, 'next_observations', *labels) if name in arrays]
        raw = {name: arrays[name][()] for name in wanted}
        raw = {name: array.astype(bool if name == 'terminals' else np.float32) for name, array in raw.items()}
    if 'next_observations' in raw:
        raw = _append_final_states(raw)
    return raw


def _append_final_states(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows that are transitions (s, a, s′) → rows that are states, with one more at the end of each episode."""
    ends = np.flatnonzero(raw['terminals'])
    final_states = raw['next_observations'][ends]
    inserted = {'observations': final_states, 'terminals': True}  # Actions and labels of a final state mean nothing.
    extended = {
        name: np.insert(array, ends + 1, inserted.get(name, 0), axis=0)
        for name, array in raw.items()
        if name != 'next_observations'
    }
    extended['terminals'][ends + np.arange(len(ends))] = False
    return extended


def _check_values(raw: dict[str, np.ndarray], dataset: str) -> None:
    for name, array in raw.items():
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            raise UserError(f'{dataset}: {name} hold a NaN or an infinity, first in row {int(np.argmin(finite))}')
    largest = np.abs(raw['actions']).max()
    if largest > 1.0 + ACTION_TOLERANCE:
        raise UserError(
            f'{dataset}: actions reach {largest:.3g}; expected [-1, 1]: rescale them from the action space’s bounds'
        )
    if 'masks' in raw and not ((raw['masks'] >= 0) & (raw['masks'] <= 1)).all():
        raise UserError(
            f'{dataset}: masks reach beyond [0, 1]; expected 0 where the episode terminates and 1 elsewhere'
        )
    terminals = raw['terminals']
    if not terminals.any():
        raise UserError(f'{dataset}: no row of its {len(terminals)} is terminal; the last row of each episode must be')
    if not terminals[-1]:
        beyond = len(terminals) - 1 - int(np.flatnonzero(terminals)[-1])
        raise UserError(
            f'{dataset}: its last {beyond} rows belong to an episode without an end; mark the last row as terminal, or '
            'leave them out'
        )


def _split_rows(terminals: np.ndarray, split: str, max_transitions: int | None, dataset: str) -> slice:
    """The rows of a split: whole episodes, the last tenth of them for validation."""
    ends = np.flatnonzero(terminals)
    validation = max(1, round(VALIDATION_SHARE * len(ends)))
    if len(ends) < 2:
        raise UserError(f'{dataset}: it holds a single episode; expected two or more, the last tenth is for validation')
    first = 0 if split == 'train' else int(ends[-validation - 1]) + 1
    ends = ends[:-validation] if split == 'train' else ends[-validation:]
    transitions = ends + 1 - first - np.arange(1, len(ends) + 1)  # Up to and including each episode.
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


def _read_minari(dataset: str) -> dict[str, np.ndarray]:
    """Rows of all episodes; actions are rescaled from the bounds of the action space, where it has them."""
    data = _open_minari(dataset)
    _minari_sizes(data)
    low, high = data.action_space.low, data.action_space.high
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        low, high = -1.0, 1.0
    columns = {name: [] for name in ('observations', 'actions', 'terminals', 'rewards', 'masks')}
    for episode in data.iterate_episodes():
        steps = len(episode.actions)
        actions = 2 * (episode.actions - low) / (high - low) - 1
        columns['observations'].append(episode.observations)
        columns['actions'].append(np.concatenate([actions, np.zeros((1, actions.shape[1]))]))
        columns['terminals'].append(np.arange(steps + 1) == steps)
        columns['rewards'].append(np.append(episode.rewards, 0.0))
        columns['masks'].append(np.append(1.0 - episode.terminations, 1.0))
    raw = {name: np.concatenate(parts) for name, parts in columns.items()}
    return {name: array if name == 'terminals' else array.astype(np.float32) for name, array in raw.items()}
