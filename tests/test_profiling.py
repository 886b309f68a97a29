"""The profile of a run: files that TensorBoard and Perfetto open, of the updates that were asked for."""

import gzip
import json
import logging

import jax
import jax.numpy as jnp

from tests.test_experiment import make_config, run
from utils.profiling import Profile


def test_a_run_writes_a_profile_of_each_phase(tmp_path):
    """With the very metrics of a run without one."""
    config = make_config(tmp_path, '--agent=iql', '--profile=5', '--log_interval=4')
    run(config)
    for phase in ('pretraining', 'finetuning'):
        (directory,) = (config.run_dir / 'profile' / phase / 'plugins' / 'profile').iterdir()
        assert len(list(directory.glob('*.xplane.pb'))) == 1, 'what TensorBoard opens'
        with gzip.open(directory / 'perfetto_trace.json.gz', 'rt') as file:
            events = json.load(file)['traceEvents']
        names = {event.get('name', '') for event in events}
        assert any('train_chunk' in name for name in names)


def test_it_ends_once_the_updates_are_done(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda *_, **__: seen.append('start'))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: seen.append('stop'))
    profile = Profile(tmp_path, 9)
    for chunk in range(8):
        profile.before_chunk(jnp.zeros(1), 4)
        seen.append(chunk)
    profile.close()
    assert seen == [0, 1, 'start', 2, 3, 4, 'stop', 5, 6, 7], 'three chunks of 4 for 9 updates'


def test_a_phase_too_short_is_reported_and_none_asked_for_is_none(tmp_path, caplog):
    for updates in (0, 4):
        profile = Profile(tmp_path, updates)
        for _ in range(2):
            profile.before_chunk(jnp.zeros(1), 4)
        with caplog.at_level(logging.WARNING):
            profile.close()
        assert ('no profile' in caplog.text) == (updates > 0)
    assert not list(tmp_path.iterdir())
