"""Downloading one large file over HTTP so that no byte is fetched twice, whatever interrupts it.

Which files, and what is done with them, is the business of `download_ogbench.py` and `download_exorl.py`. All that they
fetch are zip archives, which npz files are, too.
"""

import http.client
import json
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from envs import episode_parts
from utils.errors import UserError
from utils.progress import progress_bar

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0
# Attempts in a row that bring nothing new; one that does starts the count again.
FRUITLESS_ATTEMPTS = 4
LONGEST_PAUSE_SECONDS = 16.0


class Interrupted(Exception):
    """A transfer broke off; trying again may help."""


def check_base_url(base_url: str) -> None:
    """Raises UserError if the flag --base_url holds no URL."""
    if not re.fullmatch(r'https?://[^\s/]+(/\S*)?', base_url):
        raise UserError(f'--base_url={base_url}: expected http://… or https://…')


def check_room(folder: Path, needed: int) -> None:
    """Raises UserError if the disk has no room for so many bytes in a folder."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f'{folder} has {free / 1e9:.2f} GB free; {needed / 1e9:.2f} GB more are needed')


def fetch_or_advise(url: str, path: Path, pause: float, kind: str, command: str) -> None:
    """`fetch`, but a server that stays out of reach is a UserError, too, with the command that makes such data here."""
    try:
        fetch(url, path, pause, kind)
    except Interrupted as error:
        raise UserError(
            f'{error}; the same command continues. Without a connection, make the same kind of data here: {command}'
        ) from None


def fetch(url: str, path: Path, pause: float, kind: str) -> None:
    """Downloads one file, resuming and retrying; its name appears when every byte is there.

    The caller sees to it that no other process fetches the same file.

    Args:
        url: of the file.
        path: where it goes; beside it, `<name>.part` and `.part.json` hold an unfinished download.
        pause: seconds before the first retry; each further one waits twice as long.
        kind: what the file is, for the message if it is no zip archive ('npz file').

    Raises:
        Interrupted: the server stays out of reach; the same call continues.
        UserError: no such file there, something else under its name, or no room on the disk.
    """
    partial = path.with_name(path.name + '.part')
    fruitless = 0
    with progress_bar(path.name, None, 'B') as bar:
        while True:
            before = _size(partial)
            try:
                _transfer(url, partial, bar)
                break
            except Interrupted:
                fruitless = 0 if _size(partial) > before else fruitless + 1
                if fruitless >= FRUITLESS_ATTEMPTS:
                    raise
                time.sleep(min(pause * 2**fruitless, LONGEST_PAUSE_SECONDS))
    if not zipfile.is_zipfile(partial):
        partial.unlink()
        raise UserError(f'{url} is no {kind} (a proxy may have answered in its place); check --base_url')
    episode_parts.finish_file(partial, path)
    _validator_path(partial).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _validator_path(partial: Path) -> Path:
    return partial.with_name(partial.name + '.json')


def _transfer(url: str, partial: Path, bar) -> None:
    """One request: appends what the server sends to `partial`. Returns when the file is complete.

    Raises:
        Interrupted: the transfer broke off, or the server is out of reach.
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
                raise Interrupted(f'{url} answered with another part than the one asked for')
            offset = offset if resumed else 0
            length = response.headers.get('Content-Length')
            total = None if length is None else offset + int(length)
            if total is not None:
                check_room(partial.parent, total - offset)
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
        raise Interrupted(f'{url}: the server answers {error.code} {error.reason}') from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        reason = getattr(error, 'reason', None) or error
        raise Interrupted(f'{url} is out of reach or broke off ({type(reason).__name__}: {reason})') from None
    if total is not None and _size(partial) != total:
        raise Interrupted(f'{url} broke off after {_size(partial)} of {total} bytes')


def _range_start(response) -> int | None:
    content_range = response.headers.get('Content-Range', '')  # 'bytes 100-999/1000'
    start = content_range.removeprefix('bytes ').split('-')[0]
    return int(start) if start.isdigit() else None


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
