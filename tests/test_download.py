"""Downloading published data, against a server on the loopback interface that breaks off, forgets, or is not there."""

import http.server
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from envs import collect_ogbench, download_ogbench, episode_parts, resumable_download
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
NAMES = ('cube-single-play-v0.npz', 'cube-single-play-v0-val.npz')


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (name -> bytes); what else it does is set by the test."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files = {}
        self.requests = []  # (name, Range header)
        self.break_after = None  # Bytes of a body after which the connection is cut.
        self.knows_ranges = True
        self.validators = True
        self.version = 1
        self.errors = []  # Status codes to answer with first.
        self.answers = threading.Event()  # It waits for this.
        self.answers.set()

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}/published'


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        name = self.path.rsplit('/', 1)[-1]
        wanted = self.headers.get('Range')
        server.requests.append((name, wanted))
        server.answers.wait(600)
        if server.errors:
            return self.send_error(server.errors.pop(0))
        if name not in server.files or not self.path.startswith('/published/'):
            return self.send_error(404)
        body, etag = server.files[name], f'"v{server.version}"'
        start = 0
        if wanted and server.knows_ranges and self.headers.get('If-Range') == etag:
            start = int(wanted.removeprefix('bytes=').removesuffix('-'))
            if start >= len(body):
                self.send_response(416)
                self.send_header('Content-Range', f'bytes */{len(body)}')
                self.send_header('Content-Length', '0')
                return self.end_headers()
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        else:
            self.send_response(200)
        if server.validators:
            self.send_header('ETag', etag)
        self.send_header('Content-Length', str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][: server.break_after])
        self.close_connection = True


@pytest.fixture
def server(tmp_path):
    with Server() as server:
        for number, name in enumerate(NAMES):
            path = tmp_path / 'source.npz'
            np.savez(path, observations=np.random.default_rng(number).normal(size=(400, 28)).astype(np.float32))
            server.files[name] = path.read_bytes()
            path.unlink()
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def fetch(server, folder, **options):
    return download_ogbench.download('cube-single-v0', str(folder), base_url=server.url, pause=0.0, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_both_files_arrive(server, tmp_path):
    paths = fetch(server, tmp_path / 'new' / 'folder')
    assert tuple(path.name for path in paths) == NAMES
    assert contents(tmp_path / 'new' / 'folder') == server.files


def test_a_connection_that_breaks_off_is_continued(server, tmp_path):
    server.break_after = (
        12_000  # The files have some 45,000 bytes: more breaks than FRUITLESS_ATTEMPTS, each with progress.
    )
    fetch(server, tmp_path)
    assert contents(tmp_path) == server.files
    ranges = [wanted for name, wanted in server.requests if name == NAMES[0]]
    assert ranges == [None, 'bytes=12000-', 'bytes=24000-', 'bytes=36000-']


def test_a_killed_download_continues_where_it_stopped(server, tmp_path):
    server.break_after = 12_000
    partial = tmp_path / (NAMES[0] + '.part')
    bar = resumable_download.progress_bar('a file', None, 'B', disable=True)
    with pytest.raises(resumable_download.Interrupted):
        resumable_download._transfer(f'{server.url}/{NAMES[0]}', partial, bar)
    assert partial.stat().st_size == 12_000 and not (tmp_path / NAMES[0]).exists()
    server.break_after = None
    server.requests.clear()
    fetch(server, tmp_path)
    assert server.requests == [(NAMES[0], 'bytes=12000-'), (NAMES[1], None)]
    assert contents(tmp_path) == server.files


def test_a_download_killed_before_the_renaming_is_finished(server, tmp_path):
    (tmp_path / (NAMES[0] + '.part')).write_bytes(server.files[NAMES[0]])
    (tmp_path / (NAMES[0] + '.part.json')).write_text('{"validator": "\\"v1\\""}')
    fetch(server, tmp_path)
    assert contents(tmp_path) == server.files


def test_a_file_that_changed_on_the_server_is_not_mixed(server, tmp_path):
    (tmp_path / (NAMES[0] + '.part')).write_bytes(b'x' * 5000)
    (tmp_path / (NAMES[0] + '.part.json')).write_text('{"validator": "\\"v0\\""}')
    fetch(server, tmp_path)
    assert contents(tmp_path) == server.files


@pytest.mark.parametrize('lacking', ['knows_ranges', 'validators'])
def test_a_server_without_ranges_or_validators_still_serves(server, tmp_path, lacking):
    setattr(server, lacking, False)
    (tmp_path / (NAMES[0] + '.part')).write_bytes(b'x' * 5000)
    fetch(server, tmp_path)
    assert contents(tmp_path) == server.files


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.errors = [503, 429, 500]
    fetch(server, tmp_path)
    assert contents(tmp_path) == server.files


def test_the_number_of_attempts_is_bounded(server, tmp_path):
    server.break_after = 0
    with pytest.raises(UserError, match=r'the same command continues.*envs\.collect_ogbench --split=pretrain'):
        fetch(server, tmp_path)
    assert len(server.requests) == resumable_download.FRUITLESS_ATTEMPTS
    assert not list(tmp_path.glob('*.npz'))


def test_what_the_server_lacks_is_not_asked_for_again(server, tmp_path):
    del server.files[NAMES[0]]
    with pytest.raises(UserError, match=r'404.*--base_url'):
        fetch(server, tmp_path)
    assert len(server.requests) == 1 and not contents(tmp_path)


def test_something_else_under_the_name_is_refused(server, tmp_path):
    server.files[NAMES[0]] = b'<html>please log in</html>'
    with pytest.raises(UserError, match='is no npz file'):
        fetch(server, tmp_path)
    assert not list(tmp_path.glob('*.npz'))


def test_files_that_are_there_are_kept(server, tmp_path):
    fetch(server, tmp_path)
    server.requests.clear()
    fetch(server, tmp_path)
    assert not server.requests
    (tmp_path / NAMES[0]).write_bytes(server.files[NAMES[0]][:9000])
    with pytest.raises(UserError, match='damaged; --overwrite'):
        fetch(server, tmp_path)
    np.savez(tmp_path / NAMES[0], observations=np.zeros(3), metadata=np.array('{"seed": 0}'))
    with pytest.raises(UserError, match='collected here; --overwrite'):
        fetch(server, tmp_path)
    fetch(server, tmp_path, overwrite=True)
    assert contents(tmp_path) == server.files


def test_no_room_is_seen_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(resumable_download.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 100}))
    with pytest.raises(UserError, match='free'):
        fetch(server, tmp_path)


@pytest.mark.parametrize('in_the_way', ['a file', 'a link to a disk that is not there'])
def test_a_folder_that_cannot_be_made_is_a_user_error(server, tmp_path, in_the_way):
    folder = tmp_path / 'data'
    if in_the_way == 'a file':
        folder.write_text('')
    else:
        folder.symlink_to(tmp_path / 'absent' / 'disk')
    with pytest.raises(UserError, match=rf'^{folder} cannot be made \('):
        fetch(server, folder)


def run(*arguments):
    return subprocess.run(
        [sys.executable, '-m', 'envs.download_ogbench', *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_command(server, tmp_path):
    result = run('--env_name=cube-single-v0', f'--dataset_dir={tmp_path}', f'--base_url={server.url}/')
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path) == server.files


def test_two_processes_do_not_fetch_the_same_file(server, tmp_path):
    server.answers.clear()
    arguments = ['--env_name=cube-single-v0', f'--dataset_dir={tmp_path}', f'--base_url={server.url}']
    first = subprocess.Popen([sys.executable, '-m', 'envs.download_ogbench', *arguments], cwd=ROOT)
    try:
        while not server.requests:
            assert first.poll() is None
            time.sleep(0.02)
        with pytest.raises(UserError, match=f'another process is downloading .*{NAMES[0]}'):
            fetch(server, tmp_path)
        assert len(server.requests) == 1
        server.answers.set()
        assert first.wait(600) == 0
    finally:
        server.answers.set()
        first.kill()
        first.wait()
    assert contents(tmp_path) == server.files


def test_a_file_that_another_process_has_just_fetched_is_kept(server, tmp_path, monkeypatch):
    hold = episode_parts.hold

    def hold_late(path, refusal):  # The other one is through with it between the look and the lock.
        for name in NAMES:
            (tmp_path / name).write_bytes(server.files[name])
        return hold(path, refusal)

    monkeypatch.setattr(episode_parts, 'hold', hold_late)
    fetch(server, tmp_path)
    assert not server.requests and contents(tmp_path) == server.files


@pytest.mark.parametrize('env_name', ['puzzle-4x4-v0', 'visual-cube-double-v0'])
def test_without_a_connection_every_domain_has_a_command_that_makes_its_data(tmp_path, monkeypatch, env_name):
    def unplugged(*_):
        raise resumable_download.Interrupted('out of reach')

    monkeypatch.setattr(resumable_download, 'fetch', unplugged)
    command = rf'python -m envs\.collect_ogbench --split=pretrain --env_name={env_name} --dataset_dir='
    with pytest.raises(UserError, match=rf'the same command continues\. .*{command}'):
        download_ogbench.download(env_name, str(tmp_path))
    assert env_name in collect_ogbench.COLLECTABLE


def test_mistakes_are_one_line(tmp_path):
    with socket.socket() as unused:  # Bound but not listening: nobody answers there.
        unused.bind(('127.0.0.1', 0))
        address = f'http://127.0.0.1:{unused.getsockname()[1]}'
        with pytest.raises(UserError, match=r'out of reach.*envs\.collect_ogbench') as offline:
            download_ogbench.download('cube-single-v0', str(tmp_path), base_url=address, pause=0.0)
    assert '\n' not in str(offline.value)
    for arguments, message in (
        (['--env_name=cube-singel-v0'], 'did you mean cube-single-v0'),
        (['--base_url=not a url'], '--base_url'),
        (['--nonsense=1'], 'nonsense'),
    ):
        result = run(f'--dataset_dir={tmp_path}', *arguments)
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr
        assert 'Traceback' not in result.stderr
    assert not contents(tmp_path)


def test_the_default_server_is_the_one_that_ogbench_names(monkeypatch, tmp_path):
    from ogbench.utils import DATASET_URL

    asked = []
    monkeypatch.setattr(
        resumable_download, 'fetch', lambda url, path, pause, kind: (asked.append(url), path.write_bytes(b''))
    )
    download_ogbench.download('visual-scene-v0', str(tmp_path))
    assert asked == [f'{DATASET_URL}/visual-scene-play-v0{suffix}.npz' for suffix in ('', '-val')]
