"""A data set while it is being made: a folder of finished episodes, and the joining of them into one npz file.

The folder survives an interruption, however rough, and is gone when the file is there. The file is the published
format: one array a key, all episodes' rows in order, plus `metadata`, a JSON string that says how it was made. What the
episodes are is not known here.
"""

import contextlib
import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from envs.data import read_header
from utils.errors import UNREADABLE_NPZ, UserError

METADATA_KEY = 'metadata'


def read_metadata(path: Path) -> dict | None:
    """How the npz file says it was made; None if it does not say (a published file) or cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return json.loads(str(archive[METADATA_KEY]))
    except UNREADABLE_NPZ:
        return None


def make_folder(folder: Path) -> None:
    """Makes a folder for data, if it is not there. Raises UserError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{folder} cannot be made ({error.strerror}): choose another folder') from error


def is_readable(path: Path) -> bool:
    """Whether the npz file is there with every byte as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except UNREADABLE_NPZ:
        return False


def write_part(folder: Path, index: int, episode: dict[str, np.ndarray]) -> None:
    """Writes one finished episode, wholly or not at all."""
    with atomic_path(_part_path(folder, index)) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **episode)


def _parts_folder(target: Path) -> Path:
    return target.with_name(target.name + '.parts')


def _part_path(folder: Path, index: int) -> Path:
    return folder / f'{index:06d}.npz'


def hold(path: Path, refusal: str) -> IO:
    """Makes this process the only holder of a lock file, until the returned file is closed or the process ends.

    Raises:
        UserError: another process holds it; the message is `refusal`.
    """
    for _ in range(9):  # Once, but where a file is opened at the moment at which `held` removes it.
        file = open(path, 'w')  # noqa: SIM115 (held for as long as the caller wants)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(refusal) from None
        except OSError:
            break  # Some network file systems have no locks.
        if os.fstat(file.fileno()).st_nlink:  # At a file without a name nobody else would meet this process.
            break
    return file


@contextlib.contextmanager
def held(path: Path, refusal: str):
    """`hold` for the length of a block; the lock file is gone afterwards."""
    file = hold(path, refusal)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # While it is still held, or it might be another's.
        file.close()


class EpisodeParts:
    """The folder `<target>.parts`, held by one process at a time.

    Attributes:
        folder: where `write_part` puts episodes.
        started_over: whether parts were found that had been made with other settings, and thrown away.
    """

    def __init__(self, target: Path, settings: dict):
        """Opens the folder, or makes it.

        Args:
            target: the npz file to be made.
            settings: JSON-able; what decides the content of an episode of a given index.

        Raises:
            UserError: another process is making the same file, or the folder cannot be made.
        """
        self._target = target
        self.folder = _parts_folder(target)
        make_folder(self.folder)
        self._lock = hold(self.folder / 'lock', f'another process is making {target}; wait for it, or stop it')

        settings_path = self.folder / 'settings.json'
        written = json.dumps(settings, sort_keys=True)
        parts = list(self.folder.glob('*.npz'))
        same = settings_path.exists() and settings_path.read_text() == written
        self.started_over = bool(parts) and not same
        self.discard_unfinished()
        if not same:
            for path in parts:
                path.unlink()
            with atomic_path(settings_path) as temporary:
                temporary.write_text(written)

    def discard_unfinished(self) -> None:
        """Removes what a killed process was writing; called while none is."""
        for path in self.folder.glob('*.tmp'):
            path.unlink(missing_ok=True)

    def missing(self, episodes: int) -> list[int]:
        """Indices below `episodes` that have no readable part."""
        return [index for index in range(episodes) if not is_readable(_part_path(self.folder, index))]

    def join(self, episodes: int, metadata: dict) -> None:
        """Puts the first `episodes` parts into the target, in order, wholly or not at all, and removes the folder.

        The bytes depend on the arrays and the metadata alone: the time stamps inside are constant. Nothing is
        compressed, which play data repay with less than a tenth of their size. One part is in memory at a time.
        """
        with np.load(_part_path(self.folder, 0)) as first:
            keys = sorted(first.files)
        temporary = self.folder / 'joined.tmp'
        with zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED) as archive:
            for key in keys:
                self._join_key(archive, key, episodes)
            write_text(archive, METADATA_KEY, json.dumps(metadata, sort_keys=True))
        finish_file(temporary, self._target)
        shutil.rmtree(self.folder)
        self.close()

    def _join_key(self, archive: zipfile.ZipFile, key: str, episodes: int) -> None:
        def part(index):
            with np.load(_part_path(self.folder, index)) as arrays:
                return arrays[key]

        rows = sum(self._rows(index, key) for index in range(episodes))
        first = part(0)
        write_array(archive, key, (rows, *first.shape[1:]), first.dtype, (part(index) for index in range(episodes)))

    def _rows(self, index: int, key: str) -> int:
        with zipfile.ZipFile(_part_path(self.folder, index)) as archive, archive.open(f'{key}.npy') as member:
            shape, _, _ = read_header(member)
            return shape[0]

    def close(self) -> None:
        """Lets another process have the folder."""
        self._lock.close()


def write_array(archive: zipfile.ZipFile, key: str, shape: tuple[int, ...], dtype, blocks) -> None:
    """Writes an array into an open npz file, block of rows by block of rows; nothing but one block is in memory."""
    header = {'descr': np.lib.format.dtype_to_descr(np.dtype(dtype)), 'fortran_order': False, 'shape': shape}
    with _open_member(archive, key) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for block in blocks:
            member.write(np.ascontiguousarray(block, dtype).tobytes())


def write_text(archive: zipfile.ZipFile, key: str, text: str) -> None:
    """Writes a string into an open npz file."""
    with _open_member(archive, key) as member:
        np.lib.format.write_array(member, np.array(text), allow_pickle=False)


def discard_joined(target: Path) -> None:
    """Removes the parts of a finished file, which a kill between its naming and their removal leaves.

    Parts that the file does not hold are no leftovers, nor are those that another process is at work on: they stay.
    """
    folder = _parts_folder(target)
    metadata = read_metadata(target)
    if metadata is None or not folder.is_dir():
        return
    try:
        lock = hold(folder / 'lock', 'in use')
    except UserError:
        return
    with lock:
        try:
            settings = json.loads((folder / 'settings.json').read_text())
        except (OSError, ValueError):
            settings = {}  # The removal had begun; parts without settings are of no use to anybody.
        same = {name: metadata.get(name) for name in settings} == settings
        if same and all(int(path.stem) < metadata.get('episodes', 0) for path in folder.glob('*.npz')):
            shutil.rmtree(folder)


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Gives a temporary path beside `target` that becomes it if the block succeeds, and vanishes otherwise.

    Where the process is killed, `.<name>.<process>.tmp` stays. Errors are raised as they are, unlike those of
    `utils.runs.atomic_path`.
    """
    temporary = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
    try:
        yield temporary
        finish_file(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def finish_file(temporary: Path, target: Path) -> None:
    """Gives a finished file its name, when all of it is on the disk."""
    with open(temporary, 'rb') as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


def _open_member(archive: zipfile.ZipFile, key: str):
    info = zipfile.ZipInfo(f'{key}.npy', date_time=(1980, 1, 1, 0, 0, 0))
    info.external_attr = 0o600 << 16
    return archive.open(info, 'w', force_zip64=True)
