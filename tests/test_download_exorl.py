"""ExORL's published archives: fetching over connections that break, unpacking safely, and on to training."""
# ruff: noqa: F811 (imported fixtures are arguments of the same name)

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from envs import collect_exorl, convert_exorl, download_exorl, episode_parts, exorl_episodes
from tests.test_download import server  # noqa: F401 (a fixture)
from tests.tiny_exorl import SIZES, STEPS, copy_of, jobs_in_this_process, raw  # noqa: F401 (fixtures)
from utils.errors import UserError

ROOT = Path(__file__).parent.parent


def archive_of(raw, layout='buffer/{}', extra=(), count=10):
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('video/0.mp4', b'a film')
        for path in exorl_episodes.list_episodes(exorl_episodes.buffer_path(raw, 'cheetah', 'rnd'))[:count]:
            archive.write(path, layout.format(path.name))
        for name, text in extra:
            archive.writestr(name, text)
    return content.getvalue()


def fetch(server, folder, **options):
    return download_exorl.download('cheetah', 'rnd', str(folder), base_url=server.url, pause=0.0, **options)


def contents(buffer):
    return {path.name: path.read_bytes() for path in exorl_episodes.list_episodes(buffer)}


@pytest.mark.parametrize('layout', ['buffer/{}', 'rnd/buffer/{}', '{}'])
def test_episodes_arrive_over_a_connection_that_breaks_off(server, raw, tmp_path, layout):
    server.files['rnd.zip'] = archive_of(raw, layout)
    server.break_after = len(server.files['rnd.zip']) // 6
    buffer = fetch(server, tmp_path)
    assert contents(buffer) == contents(exorl_episodes.buffer_path(raw, 'cheetah', 'rnd'))
    assert len(server.requests) >= 6 and server.requests[1][1] == f'bytes={server.break_after}-'
    assert sorted(path.name for path in (tmp_path / 'cheetah').iterdir()) == ['rnd']  # Neither archive nor leftovers.
    assert exorl_episodes.read_metadata(buffer)['source'] == f'{server.url}/cheetah/rnd.zip'
    server.requests.clear()
    fetch(server, tmp_path)
    assert not server.requests


def test_an_interrupted_unpacking_is_continued(server, raw, tmp_path, monkeypatch):
    server.files['rnd.zip'] = archive_of(raw)
    copy, copied = download_exorl.shutil.copyfileobj, []

    def interrupted(*files):
        if len(copied) == 4:
            raise KeyboardInterrupt
        copied.append(copy(*files))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download_exorl.shutil, 'copyfileobj', interrupted)
        fetch(server, tmp_path)
    assert not list((tmp_path / 'cheetah' / 'rnd').iterdir()) and len(server.requests) == 1
    monkeypatch.setattr(download_exorl.shutil, 'copyfileobj', lambda *files: copied.append(copy(*files)))
    buffer = fetch(server, tmp_path)
    assert len(copied) == 10 and len(server.requests) == 1
    assert contents(buffer) == contents(exorl_episodes.buffer_path(raw, 'cheetah', 'rnd'))


@pytest.mark.parametrize(
    ('extra', 'message'),
    [
        ([(f'../buffer/episode_000011_{STEPS}.npz', b'x')], 'points out of the folder'),
        ([(f'/buffer/episode_000011_{STEPS}.npz', b'x')], 'points out of the folder'),
        ([(f'..\\buffer\\episode_000011_{STEPS}.npz', b'x')], 'points out of the folder'),
        ([(f'C:\\buffer\\episode_000011_{STEPS}.npz', b'x')], 'points out of the folder'),
        ([(f'more/buffer/episode_000003_{STEPS}.npz', b'x')], f'episode_000003_{STEPS}.npz twice'),
    ],
)
def test_an_archive_that_is_out_of_order_is_not_unpacked(server, raw, tmp_path, extra, message):
    server.files['rnd.zip'] = archive_of(raw, extra=extra)
    with pytest.raises(UserError, match=rf'rnd\.zip.*{message}'):
        fetch(server, tmp_path / 'a' / 'b')
    names = {path.name for path in tmp_path.rglob('*') if path.is_file()}
    assert names == {'rnd.zip'}


def test_a_link_in_an_archive_is_not_followed(server, raw, tmp_path):
    link = zipfile.ZipInfo(f'buffer/episode_000011_{STEPS}.npz')
    link.external_attr = 0o120777 << 16
    server.files['rnd.zip'] = archive_of(raw, extra=[(link, b'/etc/passwd')])
    with pytest.raises(UserError, match='points out of the folder'):
        fetch(server, tmp_path)


def test_a_bad_archive_is_fetched_again(server, raw, tmp_path):
    content = bytearray(archive_of(raw))
    content[len(content) // 2] ^= 0xFF
    server.files['rnd.zip'] = bytes(content)
    with pytest.raises(UserError, match=r'rnd\.zip is damaged.*deleted'):
        fetch(server, tmp_path)
    server.files['rnd.zip'] = archive_of(raw)
    assert len(contents(fetch(server, tmp_path))) == 10
    server.files['ou.zip'] = archive_of(raw, layout='elsewhere/{}')
    with pytest.raises(UserError, match='holds no episodes'):
        download_exorl.download('cheetah', 'ou', str(tmp_path), base_url=server.url, pause=0.0)
    with pytest.raises(UserError, match='404'):
        download_exorl.download('cheetah', 'proto', str(tmp_path), base_url=server.url, pause=0.0)


def test_collected_episodes_are_not_overwritten(server, raw, tmp_path):
    server.files['rnd.zip'] = archive_of(raw, count=3)
    copy_of(raw, tmp_path)
    with pytest.raises(UserError, match='10 episodes that this command did not download; --overwrite'):
        fetch(server, tmp_path)
    assert len(contents(fetch(server, tmp_path, overwrite=True))) == 3


def in_the_middle(monkeypatch, action):
    """Has `action` done when an archive has been fetched and unpacked, but is not in its place."""
    unpack = download_exorl._unpack

    def interposed(*arguments):
        count = unpack(*arguments)
        action()
        return count

    monkeypatch.setattr(download_exorl, '_unpack', interposed)


@pytest.mark.usefixtures('jobs_in_this_process')
def test_one_process_at_a_time_writes_into_a_folder(server, raw, tmp_path, monkeypatch):
    server.files['rnd.zip'] = archive_of(raw)
    refused = []

    def others():
        for other in (
            lambda: fetch(server, tmp_path),
            lambda: collect_exorl.collect('cheetah', 'rnd', 10, 0, 1, str(tmp_path), overwrite=True),
        ):
            with pytest.raises(UserError, match='another process is collecting or downloading into') as refusal:
                other()
            refused.append(refusal.value)

    in_the_middle(monkeypatch, others)
    buffer = fetch(server, tmp_path)
    assert len(refused) == 2 and len(server.requests) == 1
    assert contents(buffer) == contents(exorl_episodes.buffer_path(raw, 'cheetah', 'rnd'))
    with (
        episode_parts.hold(buffer.parent / '.lock', 'a collector'),
        pytest.raises(UserError, match='another process is collecting or downloading into'),
    ):
        fetch(server, tmp_path, overwrite=True)
    assert len(contents(buffer)) == 10


def test_episodes_that_came_meanwhile_are_not_removed(server, raw, tmp_path, monkeypatch):
    """As where the file system has no locks."""
    server.files['rnd.zip'] = archive_of(raw, count=3)
    in_the_middle(monkeypatch, lambda: copy_of(raw, tmp_path))
    with pytest.raises(UserError, match='10 episodes that this command did not download; --overwrite'):
        fetch(server, tmp_path)
    buffer = exorl_episodes.buffer_path(tmp_path, 'cheetah', 'rnd')
    assert contents(buffer) == contents(exorl_episodes.buffer_path(raw, 'cheetah', 'rnd'))
    (buffer.parent / 'explorer.msgpack').write_bytes(b'of the collector')
    monkeypatch.undo()
    assert len(contents(fetch(server, tmp_path, overwrite=True))) == 3 and len(server.requests) == 1
    assert {path.name for path in buffer.parent.iterdir()} == {'buffer', 'metadata.json'}


def command(module, *arguments):
    name = [sys.executable, module] if module.endswith('.py') else [sys.executable, '-m', f'envs.{module}']
    return subprocess.run([*name, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_from_the_server_to_training(server, raw, tmp_path):
    server.files['rnd.zip'] = archive_of(raw)
    got = command('download_exorl', '--domain=cheetah', f'--exorl_dir={tmp_path}', f'--base_url={server.url}')
    assert got.returncode == 0, got.stderr
    sizes = [f'--{name}={size}' for name, size in zip(convert_exorl.SIZE_FLAGS, SIZES, strict=True)]
    folders = [f'--exorl_dir={tmp_path}', f'--dataset_dir={tmp_path / "data"}']
    made = command('convert_exorl', '--domain=cheetah', '--task=walk', '--workers=2', *sizes, *folders)
    assert made.returncode == 0 and made.stdout.count('wrote') == 4, made.stderr
    flags = ['--env_name=cheetah_walk', '--preset=smoke', f'--dataset_dir={tmp_path / "data"}', '--eval_episodes=1']
    trained = command('main.py', *flags, '--eval_workers=1', f'--save_dir={tmp_path / "exp"}')
    assert trained.returncode == 0, trained.stderr
    metrics = (tmp_path / 'exp/smoke/cheetah_walk_infom_sd0/metrics.jsonl').read_text().splitlines()
    evaluations = [row for row in map(json.loads, metrics) if 'evaluation/episode.return' in row]
    assert len(evaluations) == 2
    for row in evaluations:
        assert row['evaluation/episode.length'] == 1000 and 0 <= row['evaluation/episode.return'] <= 1000
        assert 'evaluation/episode.success' not in row  # ExORL's tasks have no success.


def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    for module, arguments, message in (
        ('download_exorl', ['--domain=walkr'], 'did you mean walker'),
        ('download_exorl', ['--base_url=nowhere'], '--base_url'),
        ('convert_exorl', [f'--dataset_dir={tmp_path}'], 'holds no episodes'),
        ('convert_exorl', ['--finetuning_size=0'], 'finetuning_size'),
    ):
        result = command(module, f'--exorl_dir={tmp_path}', *arguments)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and message in result.stderr, result
    assert not list(tmp_path.iterdir())
