"""The wandb sink: a real offline run, resuming, and a wandb that fails in every way without stopping anything."""

import json
import logging
import os
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest

from utils import wandb_sink
from utils.wandb_sink import WandbSink, combine_seeds

ROOT = Path(__file__).resolve().parents[1]


class FakeRun:
    url, dir = 'https://somewhere', None

    def __init__(self, failing=()):
        self.logged, self.failing, self.finished = [], failing, False

    def define_metric(self, *_, **__):
        pass

    def log(self, row):
        if 'log' in self.failing:
            raise ConnectionError('the service\nis gone')
        self.logged.append(row)

    def finish(self):
        if 'hang' in self.failing:
            time.sleep(30)
        if 'finish' in self.failing:
            raise RuntimeError('cannot finish')
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    """A stand-in for the wandb module; returns what `init` was called with and the run that it gave."""
    monkeypatch.setattr(os, 'environ', dict(os.environ))
    calls = types.SimpleNamespace(arguments=[], run=FakeRun(), error=None, own_id=None)

    def init(**arguments):
        calls.arguments.append(arguments)
        if calls.error is not None:
            raise calls.error
        calls.run.id = calls.own_id or arguments['id']
        return calls.run

    module = types.ModuleType('wandb')
    module.init, module.Settings, module.Video = init, dict, lambda path, format: ('video', path, format)
    monkeypatch.setitem(sys.modules, 'wandb', module)
    return calls


def test_disabled_does_not_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # importing it would raise
    sink = WandbSink(tmp_path, 'disabled')
    sink.log(1, {'a': 1.0})
    sink.log_video(1, tmp_path / 'x.mp4')
    sink.finish()
    assert not sink.active and list(tmp_path.iterdir()) == []


def test_importing_the_module_does_not_import_wandb():
    program = "import sys, utils.wandb_sink; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=False).returncode == 0


def test_metrics_and_videos_are_forwarded(fake, tmp_path, monkeypatch):
    monkeypatch.delenv('WANDB_PROJECT', raising=False)
    sink = WandbSink(tmp_path, 'online', group='g', name='n', config={'seed': 3})
    assert sink.active
    sink.log(40, {'training/loss': 0.5, 'unknown': None, 'diverged': float('nan')})
    sink.log_seeds(50, {0: {'a': 1.0}, 1: {'a': 3.0}})
    sink.log_video(60, tmp_path / 'x.mp4')
    sink.finish()
    assert fake.run.logged == [
        {'step': 40, 'training/loss': 0.5},
        {'step': 50, 'a': 2.0, 'seed_0/a': 1.0, 'seed_1/a': 3.0},
        {'step': 60, 'video': ('video', str(tmp_path / 'x.mp4'), 'mp4')},
    ]
    assert fake.run.finished
    arguments = fake.arguments[0]
    assert (arguments['project'], arguments['group'], arguments['name']) == ('infom', 'g', 'n')
    assert (arguments['mode'], arguments['resume'], arguments['config']) == ('online', 'allow', {'seed': 3})


def test_runs_go_to_the_project_of_the_environment(fake, tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_PROJECT', 'mine')
    WandbSink(tmp_path, 'online').finish()
    assert fake.arguments[0]['project'] == 'mine'


def test_a_resumed_run_goes_on_in_the_same_wandb_run(fake, tmp_path):
    for _ in range(2):
        WandbSink(tmp_path, 'online').finish()
    first, second = (arguments['id'] for arguments in fake.arguments)
    assert first == second == json.loads((tmp_path / 'wandb.json').read_text())['id']


def test_the_id_that_is_kept_is_the_runs(fake, tmp_path):
    """In a sweep wandb does not take the one that it is given."""
    fake.own_id = 'of_the_sweep'
    WandbSink(tmp_path, 'online').finish()
    fake.own_id = None
    WandbSink(tmp_path, 'online').finish()
    assert fake.arguments[1]['id'] == 'of_the_sweep'


def test_a_key_is_not_waited_for_for_ever(fake, tmp_path):
    os.environ.pop('WANDB_LOGIN_TIMEOUT', None)
    WandbSink(tmp_path, 'online').finish()
    assert os.environ['WANDB_LOGIN_TIMEOUT'] == '60'
    os.environ['WANDB_LOGIN_TIMEOUT'] = '5'  # The user's own.
    WandbSink(tmp_path, 'online').finish()
    assert os.environ['WANDB_LOGIN_TIMEOUT'] == '5'


def test_wandb_not_installed_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    sink = WandbSink(tmp_path, 'offline')
    sink.log(1, {'a': 1.0})
    assert not sink.active and 'wandb could not start' in caplog.text


def test_a_failing_start_is_one_warning(fake, tmp_path, caplog):
    fake.error = OSError('no network')
    sink = WandbSink(tmp_path, 'online')
    for step in range(3):
        sink.log(step, {'a': 1.0})
    sink.finish()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert 'no network' in caplog.text


@pytest.mark.parametrize('failing', ['log', 'finish'])
def test_a_failure_later_is_one_warning(fake, tmp_path, caplog, failing):
    fake.run.failing = (failing,)
    sink = WandbSink(tmp_path, 'online')
    for step in range(3):
        sink.log(step, {'a': 1.0})
        sink.log_video(step, tmp_path / 'x.mp4')
    sink.finish()
    assert not sink.active
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f'wandb could not {failing}' in caplog.text and '\n' not in caplog.records[0].getMessage()


def test_finishing_does_not_wait_for_ever(fake, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(wandb_sink, 'FINISH_TIMEOUT', 0.2)
    fake.run.failing = ('hang',)
    began = time.monotonic()
    WandbSink(tmp_path, 'online').finish()
    assert time.monotonic() - began < 25 and 'no answer in 0.24 seconds' in caplog.text


def test_seeds_are_combined_by_hand():
    assert combine_seeds({7: {'a': 1.0, 'b': 2}}) == {'a': 1.0, 'b': 2.0}
    per_seed = {0: {'a': 1.0, 'b': float('nan')}, 1: {'a': 2.0, 'b': 5.0}, 2: {'a': 6.0, 'b': None, 'c': 1.0}}
    assert combine_seeds(per_seed) == {
        'a': 3.0, 'b': 5.0, 'c': 1.0,
        'seed_0/a': 1.0, 'seed_1/a': 2.0, 'seed_2/a': 6.0, 'seed_1/b': 5.0, 'seed_2/c': 1.0,
    }  # fmt: skip


def test_a_real_offline_run(tmp_path):
    """In a process of its own: wandb starts services and changes the environment."""
    program = textwrap.dedent("""
        import logging, sys
        from pathlib import Path
        from utils.wandb_sink import WandbSink
        directory = Path(sys.argv[1])
        (directory / 'video.mp4').write_bytes(b'not really a film')
        sink = WandbSink(directory, 'offline', group='g', name='n', config={'agent': {'alpha': 10.0}})
        assert sink.active
        sink.log(40, {'training/loss': 0.5})
        sink.log_seeds(40, {0: {'a': 1.0}, 1: {'a': 2.0}})
        sink.log_video(40, directory / 'video.mp4')
        sink.log(20, {'training/loss': 0.25})  # steps may go back
        assert sink.active
        sink.finish()
    """)
    result = subprocess.run(
        [sys.executable, '-c', program, tmp_path],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        env={'PATH': '/usr/bin:/bin', 'HOME': str(tmp_path), 'WANDB_MODE': 'disabled'},  # the flag wins
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert 'could not' not in result.stderr
    records = list(tmp_path.glob('wandb/offline-run-*/run-*.wandb'))
    assert len(records) == 1 and records[0].stat().st_size > 0
    assert json.loads((tmp_path / 'wandb.json').read_text())['id'] in records[0].name
    assert len(list(records[0].parent.glob('files/media/videos/*.mp4'))) == 1
    content = records[0].read_bytes()
    assert b'training/loss' in content and b'seed_1/a' in content and b'alpha' in content
