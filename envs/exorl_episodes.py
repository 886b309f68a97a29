"""ExORL's episode files: `<folder>/<domain>/<algo>/buffer/episode_<index:06d>_<T>.npz`, listed, read, checked, written.

A file has T + 1 rows of observation, action, reward, discount and physics; row k of action, reward and discount belongs
to the step that led to row k, and row 0 of them is a dummy. How the episodes came about is noted beside the buffer, in
`metadata.json`. No simulator is needed here.
"""

import json
import os
import re
from pathlib import Path

import numpy as np

from envs import EXORL_PHYSICS_SIZES, EXORL_SIZES, EXORL_TASKS, episode_parts, suggest
from envs.data import ACTION_TOLERANCE
from utils.errors import UNREADABLE_NPZ, UserError, expanded

DEFAULT_EXORL_DIR = '~/.exorl/data'
EPISODE_NAME = re.compile(r'episode_(\d{6,})_(\d+)\.npz')
METADATA_NAME = 'metadata.json'
EXPLORER_NAME, HISTORY_NAME = 'explorer.msgpack', 'history.json'  # Of rnd's learner, beside the buffer as well.
COLLECTED_BY, DOWNLOADED_BY = 'python -m envs.collect_exorl', 'python -m envs.download_exorl'  # Its 'made_by'.
MIN_STEPS = 2  # One step has no next action to learn from.


def require_domain(domain: str) -> None:
    """Raises UserError if ExORL has no such domain."""
    if domain not in EXORL_TASKS:
        hint = suggest(domain, EXORL_TASKS) or f'; expected one of {", ".join(EXORL_TASKS)}'
        raise UserError(f'--domain={domain}: no ExORL domain{hint}')


def buffer_path(exorl_dir: str | Path, domain: str, algo: str) -> Path:
    """The folder of a domain's and algorithm's episode files; ~ is expanded."""
    if not re.fullmatch(r'[A-Za-z0-9][\w.-]*', algo):
        raise UserError(f'--algo={algo!r}: expected the name of a folder (letters, digits, _.-)')
    return expanded(exorl_dir) / domain / algo / 'buffer'


def episode_name(index: int, steps: int) -> str:
    """The name of the file of episode `index`."""
    return f'episode_{index:06d}_{steps}.npz'


def list_episodes(buffer: Path) -> list[Path]:
    """The episode files of a folder, in the order of their indices; other files are passed over."""
    if not buffer.is_dir():
        return []
    found = [(EPISODE_NAME.fullmatch(entry.name), entry.path) for entry in os.scandir(buffer)]
    return [Path(path) for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def named_steps(path: Path) -> int:
    """The number of steps that an episode file's name gives."""
    return int(EPISODE_NAME.fullmatch(path.name)[2])


def named_index(path: Path) -> int:
    """The index that an episode file's name gives."""
    return int(EPISODE_NAME.fullmatch(path.name)[1])


def common_steps(paths: list[Path]) -> int:
    """The number of steps of every one of these episodes, by their names.

    Raises:
        UserError: one of them is of another length than the first, or too short to learn from.
    """
    steps = named_steps(paths[0])
    for path in paths:
        if named_steps(path) < MIN_STEPS:
            raise UserError(
                f'{path}: an episode of {named_steps(path)} steps; {MIN_STEPS} or more are needed to learn from'
            )
        if named_steps(path) != steps:
            raise UserError(
                f'{path}: an episode of {named_steps(path)} steps, where {paths[0].name} has {steps}; all episodes of '
                'a domain last as long. Remove it, or fetch it again'
            )
    return steps


def read_episode(path: Path, domain: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Some arrays of one episode, checked.

    Args:
        path: the file.
        domain: whose episode it should be.
        names: of 'observation' (T + 1, d), 'action' (T + 1, a) and 'physics' (T + 1, n); read and checked are only
            these. T is the one of the file's name.

    Returns:
        observation and action as float32, physics as stored.

    Raises:
        UserError: the file is damaged, lacks an array, or holds those of another domain, NaN or unscaled actions.
    """
    observation_size, action_size = EXORL_SIZES[domain]
    widths = {'observation': observation_size, 'action': action_size, 'physics': EXORL_PHYSICS_SIZES[domain]}
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise UserError(f'{path}: it holds no {missing[0]}, only {", ".join(archive.files)}')
            episode = {name: archive[name] for name in names}
    except UNREADABLE_NPZ as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f'{path} cannot be read ({type(error).__name__}: {reason}): it is damaged or not an npz file; '
            + _remedy(path)
        ) from error
    for name, array in episode.items():
        expected = (named_steps(path) + 1, widths[name])
        if array.shape != expected:
            raise UserError(
                f'{path}: {name} has shape {array.shape}, but {domain} with {named_steps(path)} steps needs '
                f'{expected}; is it an episode of another domain, or cut off?'
            )
        if not np.issubdtype(array.dtype, np.floating):
            raise UserError(f'{path}: {name} holds {array.dtype}; floating-point numbers are expected')
        if name != 'physics':  # States keep their precision: rewards are computed from them.
            with np.errstate(over='ignore'):
                episode[name] = array.astype(np.float32, copy=False)
        finite = np.isfinite(episode[name]).all(axis=1)
        if not finite.all():
            raise UserError(f'{path}: {name} holds a NaN or an infinity, first in row {int(np.argmin(finite))}')
    if 'action' in episode and np.abs(episode['action']).max() > 1.0 + ACTION_TOLERANCE:
        raise UserError(f'{path}: actions reach {np.abs(episode["action"]).max():.3g}; they are expected in [-1, 1]')
    return episode


def _remedy(path: Path) -> str:
    """What can be done about a damaged episode, which depends on where it came from."""
    origin = read_metadata(path.parent) or {}
    if origin.get('made_by') == DOWNLOADED_BY:
        folder, domain, algo = path.parents[3], path.parents[2].name, path.parents[1].name
        return f'{DOWNLOADED_BY} --domain={domain} --algo={algo} --exorl_dir={folder} --overwrite fetches all anew'
    if origin.get('policy') != 'rnd':
        return 'delete it, and fetch or collect it again'
    return (
        'put a copy back, or delete it. rnd learns as it goes and cannot make this very one again: convert fewer '
        'transitions (--pretraining_size), or let the command that collected it make another in its place'
    )


def write_episode(buffer: Path, index: int, episode: dict[str, np.ndarray]) -> Path:
    """Writes an episode (arrays of T + 1 rows, ExORL's names), wholly or not at all, and onto the disk: one of rnd that
    a power cut empties could not be made again."""
    path = buffer / episode_name(index, len(episode['observation']) - 1)
    with episode_parts.atomic_path(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **episode)
    return path


def lock(buffer: Path) -> tuple[Path, str]:
    """The lock file of whoever writes episodes into the folder, and what one says whom another keeps waiting."""
    refusal = f'another process is collecting or downloading into {buffer}; wait for it, or stop it'
    return buffer.parent / '.lock', refusal


def read_metadata(buffer: Path) -> dict | None:
    """How the episodes came about; None if nothing, or nothing readable, says so."""
    try:
        content = json.loads((buffer.parent / METADATA_NAME).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_metadata(buffer: Path, metadata: dict) -> None:
    """Notes how the episodes of the folder come about, atomically."""
    with episode_parts.atomic_path(buffer.parent / METADATA_NAME) as temporary:
        temporary.write_text(json.dumps(metadata, indent=2, sort_keys=True) + '\n')
