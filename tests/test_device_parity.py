"""Device parity: two devices that compute alike agree, and a device that is wrong is told from rounding."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import device_parity, throughput

ROOT = Path(__file__).resolve().parents[1]


def metrics(**means):
    return {name: np.array(mean, np.float32) for name, mean in means.items()}


def test_the_seed_that_differs_most_counts():
    on_host = metrics(loss=[1.0, 2.0], q=[-90.0, -80.0], zero=[0.0, 0.0])
    on_device = metrics(loss=[1.001, 1.0], q=[-90.0, np.nan], zero=[1e-6, 0.0])
    loss, q, zero = device_parity.differences('finetuning', 40, on_host, on_device)
    assert loss == ('finetuning', 40, 'loss', 2.0, 1.0, 0.5)
    assert q.share == np.inf and q.host == -80.0
    assert zero.share == pytest.approx(1e-4)
    lines = device_parity.table([zero, loss, zero._replace(start=50, share=0.2), q]).splitlines()[2:]
    assert [line.split(' | ')[1:3] for line in lines] == [['q', '40'], ['loss', '40'], ['zero', '50']]


@pytest.mark.slow
def test_a_device_that_trains_otherwise_is_found(monkeypatch):
    """The second of each pair of chunks is the processor's: here the devices' rows are those of other batches."""
    problem = throughput.make_problem('iql', 'cube-single-play-singletask-task1-v0', 'smoke', 2000, 16)
    train_chunk, calls = device_parity.training.train_chunk, []

    def wrong(agents, data, keys, start, **options):
        calls.append(options['phase'])
        wrong_step = options['phase'] == 'finetuning' and len(calls) % 2 == 1
        return train_chunk(agents, data, keys, start + 1000 * wrong_step, **options)

    def begin_with_exchanged_moments(*inputs):
        agents = begin_finetuning(*inputs)
        adam, *rest = agents.opt_states['actor']
        exchanged = adam._replace(mu=adam.nu, nu=adam.mu)
        return agents.replace(opt_states=agents.opt_states | {'actor': (exchanged, *rest)})

    begin_finetuning = device_parity.training.begin_finetuning
    monkeypatch.setattr(device_parity.training, 'begin_finetuning', begin_with_exchanged_moments)
    monkeypatch.setattr(device_parity.training, 'train_chunk', wrong)
    updates = {'pretraining': 4, 'finetuning': 4}
    rows = list(device_parity.compare(problem, 2, updates, 2, jax.devices('cpu')[0]))
    assert calls == ['pretraining'] * 4 + ['finetuning'] * 4
    assert all(row.share == 0 for row in rows if row.phase == 'pretraining')
    assert {row.start for row in rows} == {0, 4}
    assert sum(row.share > 0.01 for row in rows if row.phase == 'finetuning') > 4
    moved = {row.metric for row in rows if row.phase == 'switch' and row.share > 0.5}
    assert moved and all(".opt_states['actor'][0]." in part for part in moved)


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'code', 'said'), [(2, 0, '0 of'), (1, 2, 'no device but the processor')])
def test_the_command(count, code, said):
    options = ['--preset=smoke', '--agent=iql', '--updates=4', '--finetuning_updates=4', '--repeats=1', '--rows=2000']
    command = [sys.executable, '-m', 'benchmarks.device_parity', *options]
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={count}'
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {'XLA_FLAGS': flags.strip()}, capture_output=True, text=True, check=False
    )
    assert result.returncode == code and said in result.stdout + result.stderr, result.stderr[-2000:]
