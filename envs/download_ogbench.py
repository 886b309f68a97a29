"""Downloads OGBench's published play data: reward-free files to pre-train on, for the state and the image environments.

    python -m envs.download_ogbench --env_name=cube-single-v0

An interrupted download continues where it stopped when the command is given again. Fine-tuning data are on no server:
`collect_ogbench.py` makes them, and can make these too.
"""

import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from absl import flags
from tqdm import tqdm

from envs import OGBENCH_DOMAINS, OGBENCH_STATE_DOMAINS, data, episode_parts, suggest
from utils import cli
from utils.errors import UserError

DOWNLOADABLE = tuple(f'{domain}-v0' for domain in OGBENCH_DOMAINS)
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0
# Attempts in a row that bring nothing new; one that does starts the count again.
FRUITLESS_ATTEMPTS = 4
LONGEST_PAUSE_SECONDS = 16.0

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; called only when this file is the command."""
    flags.DEFINE_string('env_name', 'cube-single-v0', f'Environment: {", ".join(DOWNLOADABLE)}.')
    flags.DEFINE_string('dataset_dir', data.DEFAULT_DATASET_DIR, 'Folder of the files.')
    flags.DEFINE_string(
        'base_url', None, "Where the files are, without their names; by default where OGBench's own loader looks."
    )
    flags.DEFINE_bool('overwrite', False, 'Replace files that were collected here, or are damaged.')


class _Interrupted(Exception):
    """A transfer broke off; trying again may help."""


def download(
    env_name: str, dataset_dir: str, base_url: str | None = None, overwrite: bool = False, pause: float = 1.0
) -> list[Path]:
    """Downloads the train and val file of one environment, unless they are there.

    Args:
        env_name: one of `DOWNLOADABLE`.
        dataset_dir: folder, made if need be; ~ is expanded.
        base_url: URL of the folder on the server; None means the one that the `ogbench` package names.
        overwrite: whether to replace files that were collected here, or are damaged.
        pause: seconds before the first retry; each further one waits twice as long.

    Returns:
        The two paths.

    Raises:
        UserError: unknown environment, server out of reach, no such file there, something else in the way, or no room
            on the disk.
        OSError: the file system refuses.
    """
    if env_name not in DOWNLOADABLE:
        hint = suggest(env_name, DOWNLOADABLE) or f'; expected one of {", ".join(DOWNLOADABLE)}'
        raise UserError(f'--env_name={env_name}: no published data{hint}')
    if base_url is None:
        from ogbench.utils import DATASET_URL as base_url
    if not re.fullmatch(r'https?://[^\s/]+(/\S*)?', base_url):
        raise UserError(f'--base_url={base_url}: expected http://… or https://…')
    domain = env_name.removesuffix('-v0')
    paths = [data.dataset_path(dataset_dir, domain, 'pretraining', split) for split in data.SPLITS]
    for path in paths:
        if not _is_there(path, overwrite):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _fetch(f'{base_url.rstrip("/")}/{path.name}', path, pause)
            except _Interrupted as error:
                raise UserError(f'{error}; the same command continues. {_alternative(domain, path)}') from None
            print(f'wrote {path} ({path.stat().st_size / 1e6:.1f} MB)', flush=True)
    return paths


def _alternative(domain: str, path: Path) -> str:
    if domain not in OGBENCH_STATE_DOMAINS:
        return 'Without a connection, copy the file there from elsewhere.'
    return (
        'Without a connection, make the same kind of data here: '
        f'python -m envs.collect_ogbench --split=pretrain --env_name={domain}-v0 --dataset_dir={path.parent}'
    )


def _is_there(path: Path, overwrite: bool) -> bool:
    """Whether the file was downloaded before. Raises UserError if something else has its name."""
    if not path.exists() or overwrite:
        return False
    if not zipfile.is_zipfile(path):
        raise UserError(f'{path} is there but damaged; --overwrite downloads it anew')
    if episode_parts.read_metadata(path) is not None:
        raise UserError(f'{path} was collected here; --overwrite replaces it, another --dataset_dir keeps both')
    print(f'{path} is already there', flush=True)
    return True


def _fetch(url: str, path: Path, pause: float) -> None:
    """Downloads one file, resuming and retrying; the name appears when every byte is there."""
    partial = path.with_name(path.name + '.part')
    fruitless = 0
    with tqdm(desc=path.name, unit='B', unit_scale=True, mininterval=0.5 if sys.stderr.isatty() else 20.0) as bar:
        while True:
            before = _size(partial)
            try:
                _transfer(url, partial, bar)
                break
            except _Interrupted:
                fruitless = 0 if _size(partial) > before else fruitless + 1
                if fruitless >= FRUITLESS_ATTEMPTS:
                    raise
                time.sleep(min(pause * 2**fruitless, LONGEST_PAUSE_SECONDS))
    if not zipfile.is_zipfile(partial):
        partial.unlink()
        raise UserError(f'{url} is not an npz file (a proxy may have answered in its place); check --base_url')
    os.replace(partial, path)
    _validator_path(partial).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _validator_path(partial: Path) -> Path:
    return partial.with_name(partial.name + '.json')


def _transfer(url: str, partial: Path, bar) -> None:
    """One request: appends what the server sends to `partial`. Returns when the file is complete.

    Raises:
        _Interrupted: the transfer broke off, or the server is out of reach.
        UserError: the server says that there is no such file, or the disk has no room for it.
    """
    offset = _size(partial)
    validator = _read_validator(partial) if offset else None
    request = urllib.request.Request(url)
    if validator:
        # If the file has changed on the server since, If-Range makes it send the whole new one.
        request.add_header('Range', f'bytes={offset}-')
        request.add_header('If-Range', validator)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            resumed = response.status == http.client.PARTIAL_CONTENT and _range_start(response) == offset
            if response.status == http.client.PARTIAL_CONTENT and not resumed:
                partial.unlink(missing_ok=True)
                raise _Interrupted(f'{url} answered with another part than the one asked for')
            offset = offset if resumed else 0
            length = response.headers.get('Content-Length')
            total = None if length is None else offset + int(length)
            _check_room(partial, total, offset)
            _write_validator(partial, response)
            bar.total, bar.n = total, offset
            with open(partial, 'ab' if resumed else 'wb') as file:
                while chunk := response.read(CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            if error.headers.get('Content-Range', '').endswith(f'/{offset}'):
                return  # Nothing is left to send: the last attempt ended just before the renaming.
            partial.unlink(missing_ok=True)
        elif 400 <= error.code < 500 and error.code not in (http.client.REQUEST_TIMEOUT, http.client.TOO_MANY_REQUESTS):
            raise UserError(f'{url}: the server answers {error.code} {error.reason}; check --base_url') from None
        raise _Interrupted(f'{url}: the server answers {error.code} {error.reason}') from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        reason = getattr(error, 'reason', None) or error
        raise _Interrupted(f'{url} is out of reach or broke off ({type(reason).__name__}: {reason})') from None
    if total is not None and _size(partial) != total:
        raise _Interrupted(f'{url} broke off after {_size(partial)} of {total} bytes')


def _range_start(response) -> int | None:
    content_range = response.headers.get('Content-Range', '')  # 'bytes 100-999/1000'
    start = content_range.removeprefix('bytes ').split('-')[0]
    return int(start) if start.isdigit() else None


def _check_room(partial: Path, total: int | None, offset: int) -> None:
    free = shutil.disk_usage(partial.parent).free
    if total is not None and total - offset > free:
        raise UserError(
            f'{partial.parent} has {free / 1e9:.2f} GB free; the file needs {(total - offset) / 1e9:.2f} GB more'
        )


def _read_validator(partial: Path) -> str | None:
    try:
        return json.loads(_validator_path(partial).read_text())['validator']
    except (OSError, ValueError, KeyError):
        return None


def _write_validator(partial: Path, response) -> None:
    """Notes what identifies the file's version; without it a later request cannot be sure to continue the same file."""
    etag = response.headers.get('ETag')
    strong = etag if etag and not etag.startswith('W/') else None
    validator = strong or response.headers.get('Last-Modified')
    _validator_path(partial).write_text(json.dumps({'validator': validator}))


def main(argv):
    del argv
    download(FLAGS.env_name, FLAGS.dataset_dir, FLAGS.base_url, FLAGS.overwrite)


if __name__ == '__main__':
    define_flags()
    cli.run(main)
