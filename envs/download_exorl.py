"""Downloads ExORL's published episodes of a domain and an exploration algorithm, and unpacks them.

    python -m envs.download_exorl --domain=cheetah --algo=rnd

writes `<exorl_dir>/<domain>/<algo>/buffer/episode_<index>_<T>.npz`. An interrupted command continues where it stopped
when it is given again. `convert_exorl.py` makes data sets of the episodes; `collect_exorl.py` makes the same kind of
episodes here.
"""

import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from absl import flags

from envs import EXORL_TASKS, commands, episode_parts, exorl_episodes, resumable_download
from utils import cli
from utils.errors import UserError
from utils.progress import progress_bar

BASE_URL = 'https://dl.fbaipublicfiles.com/exorl'
# What a damaged archive raises: unlike UNREADABLE_NPZ no OSError, which here may be a full disk, but the RuntimeError
# of an encrypted member.
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; called only when this file is the command."""
    flags.DEFINE_string('domain', 'cheetah', f'Domain: {", ".join(EXORL_TASKS)}.')
    flags.DEFINE_string('algo', 'rnd', 'The algorithm that explored.')
    flags.DEFINE_string('exorl_dir', exorl_episodes.DEFAULT_EXORL_DIR, 'Folder of the episode files.')
    flags.DEFINE_string('base_url', BASE_URL, 'Where the archives are: <base_url>/<domain>/<algo>.zip.')
    flags.DEFINE_bool('keep_zip', False, 'Keep the archive when it is unpacked.')
    flags.DEFINE_bool('overwrite', False, 'Throw away episodes that were collected here under the same name.')


def download(
    domain: str,
    algo: str,
    exorl_dir: str,
    base_url: str = BASE_URL,
    keep_zip: bool = False,
    overwrite: bool = False,
    pause: float = 1.0,
) -> Path:
    """Downloads and unpacks one archive, unless its episodes are there.

    Args:
        domain: a key of `envs.EXORL_TASKS`.
        algo: name of the algorithm, as on the server.
        exorl_dir: folder of the domains' folders, made if need be; ~ is expanded.
        base_url: URL of the folder on the server.
        keep_zip: whether to keep the archive.
        overwrite: whether to throw away episodes that were collected here under the same name.
        pause: seconds before the first retry; each further one waits twice as long.

    Returns:
        The folder of the episodes, which appears when all of them are there.

    Raises:
        UserError: unknown domain, server out of reach, no such file there, an archive that is damaged, unsafe or holds
            no episodes, something else in the way, another process writing there, or no room on the disk.
        OSError: the file system refuses.
    """
    exorl_episodes.require_domain(domain)
    buffer = exorl_episodes.buffer_path(exorl_dir, domain, algo)
    resumable_download.check_base_url(base_url)
    if _is_there(buffer, overwrite):
        return buffer
    episode_parts.make_folder(buffer.parent)
    with episode_parts.held(*exorl_episodes.lock(buffer)):
        if not _is_there(buffer, overwrite):  # Another process may have been at the end of it.
            _fetch_and_unpack(domain, algo, buffer, base_url, keep_zip, overwrite, pause)
    return buffer


def _fetch_and_unpack(
    domain: str, algo: str, buffer: Path, base_url: str, keep_zip: bool, overwrite: bool, pause: float
) -> None:
    folder = buffer.parent
    url = f'{base_url.rstrip("/")}/{domain}/{algo}.zip'
    archive_path = folder.with_name(f'{algo}.zip')
    if not archive_path.exists():
        command = f'python -m envs.collect_exorl --domain={domain} --policy=rnd --exorl_dir={folder.parent.parent}'
        resumable_download.fetch_or_advise(url, archive_path, pause, 'zip archive', command)
        commands.say(f'wrote {archive_path} ({archive_path.stat().st_size / 1e6:.1f} MB)')
    unpacking = folder.with_name(f'.{algo}.unpacking')
    try:
        count = _unpack(archive_path, unpacking / 'buffer')
    except UNREADABLE as error:
        archive_path.unlink()
        raise UserError(
            f'{archive_path} is damaged ({type(error).__name__}: {error}) and was deleted; '
            'the same command downloads it again'
        ) from error
    if not _is_there(buffer, overwrite):  # Not every file system has locks, and hours may have passed.
        _clear(buffer)
        made = {'source': url, 'made_by': exorl_episodes.DOWNLOADED_BY, 'domain': domain, 'algo': algo}
        exorl_episodes.write_metadata(buffer, made)
        os.rename(unpacking / 'buffer', buffer)
        commands.say(f'unpacked {count} episodes into {buffer}')
    shutil.rmtree(unpacking)
    if not keep_zip:
        archive_path.unlink(missing_ok=True)


def _clear(buffer: Path) -> None:
    """Removes the episodes and what belongs to them, but not the lock file that this process holds."""
    lock_path, _ = exorl_episodes.lock(buffer)
    # First what says where they come from: with a part of them gone, nothing should.
    (buffer.parent / exorl_episodes.METADATA_NAME).unlink(missing_ok=True)
    for path in set(buffer.parent.iterdir()) - {lock_path}:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_there(buffer: Path, overwrite: bool) -> bool:
    """Whether the episodes were downloaded before. Raises UserError if others are in their place."""
    count = len(exorl_episodes.list_episodes(buffer))
    if not count or overwrite:
        return False
    if (exorl_episodes.read_metadata(buffer) or {}).get('made_by') != exorl_episodes.DOWNLOADED_BY:
        raise UserError(
            f'{buffer} holds {count} episodes that this command did not download; --overwrite throws them away, '
            'another --exorl_dir keeps both'
        )
    commands.say(f'{buffer} is already there, with {count} episodes')
    return True


def _unpack(archive_path: Path, buffer: Path) -> int:
    """Unpacks the archive's episodes into a folder, passing over those that are there; returns their number.

    A name in the archive decides nothing but the last part of a path, and that only if it is an episode's.
    """
    buffer.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive_path) as archive:
        members = _episode_members(archive, archive_path)
        missing = [name for name, entry in members.items() if not _is_unpacked(buffer / name, entry)]
        resumable_download.check_room(buffer, sum(members[name].file_size for name in missing))
        bar = progress_bar(
            f'unpacking {archive_path.name}', len(members), 'episodes', initial=len(members) - len(missing)
        )
        with bar:
            for name in missing:
                with (
                    episode_parts.atomic_path(buffer / name) as temporary,
                    archive.open(members[name]) as packed,
                    open(temporary, 'wb') as file,
                ):
                    shutil.copyfileobj(packed, file)
                bar.update()
    for stranger in {path.name for path in buffer.iterdir()} - set(members):  # Of another version of the archive.
        (buffer / stranger).unlink()
    return len(members)


def _is_unpacked(path: Path, entry: zipfile.ZipInfo) -> bool:
    return path.is_file() and path.stat().st_size == entry.file_size


def _episode_members(archive: zipfile.ZipFile, archive_path: Path) -> dict[str, zipfile.ZipInfo]:
    """The archive's episodes by file name. Raises UserError if anything in the archive is out of order."""
    members: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = PurePosixPath(entry.filename.replace('\\', '/'))
        if name.is_absolute() or '..' in name.parts or ':' in entry.filename or stat.S_ISLNK(entry.external_attr >> 16):
            raise UserError(
                f'{archive_path}: its entry {entry.filename!r} points out of the folder; it is not unpacked: delete it'
            )
        # Beside the episodes there are videos.
        if not exorl_episodes.EPISODE_NAME.fullmatch(name.name) or (len(name.parts) > 1 and name.parts[-2] != 'buffer'):
            continue
        if name.name in members:
            raise UserError(f'{archive_path}: it holds {name.name} twice; it is not unpacked: delete it')
        members[name.name] = entry
    if not members:
        raise UserError(f'{archive_path}: it holds no episodes (buffer/episode_<index>_<T>.npz); delete it')
    return members


def main(argv):
    del argv
    return commands.run_interruptibly(
        lambda: download(FLAGS.domain, FLAGS.algo, FLAGS.exorl_dir, FLAGS.base_url, FLAGS.keep_zip, FLAGS.overwrite),
        'the same command continues',
    )


if __name__ == '__main__':
    define_flags()
    cli.run(main)
