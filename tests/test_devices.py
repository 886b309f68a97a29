"""Several devices: the tests of `four_devices.py`, in a process that has four."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.tiny import make_agent, make_batch
from utils import devices
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_four_virtual_devices():
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=4'
    command = [sys.executable, '-m', 'pytest', '-q', '-x', 'tests/four_devices.py']
    environment = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST_')} | {'XLA_FLAGS': flags.strip()}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]


def test_one_device_has_no_mesh():
    """And so nothing is spread: a single device's programs are what they would be without `devices.py`."""
    assert devices.make_mesh(8, 256) is None
    assert devices.seed_axis() is None
    batch = {'observations': object()}
    assert devices.spread(batch, 'batch') is batch


@pytest.mark.parametrize(
    ('seeds', 'batch_size', 'there', 'shape'),
    [
        (3, 256, 4, (1, 4)),
        (3, 256, 8, (1, 8)),
        (3, 256, 6, (3, 2)),
        (8, 256, 4, (4, 1)),
        (2, 32, 8, (2, 4)),
        (4, 3, 6, (2, 3)),
    ],
)
def test_several_processes_leave_no_device_out_where_it_can_be(monkeypatch, seeds, batch_size, there, shape):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(jax, 'devices', lambda: list(range(there)))
    monkeypatch.setattr(devices, 'Mesh', lambda array, axes: array.shape)
    assert devices.make_mesh(seeds, batch_size) == shape


def test_devices_without_work_are_refused_where_there_are_several_processes(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(jax, 'devices', lambda: list(range(4)))
    with pytest.raises(UserError, match='leave 1 of 4 devices without work'):
        devices.make_mesh(3, 9)


@pytest.mark.usefixtures('precision_as_before')
def test_a_cpu_computes_in_float32_at_every_precision():
    matrix = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    exact = matrix.astype(np.float64) @ matrix
    for precision in ('highest', 'tensorfloat32', 'bfloat16'):
        devices.set_matmul_precision(precision)
        product = jax.jit(lambda x: x @ x)(matrix)
        np.testing.assert_allclose(product, exact, atol=2e-5, err_msg=precision)


@pytest.mark.usefixtures('precision_as_before')
@pytest.mark.parametrize(
    ('precision', 'asked_for'),
    [
        ('highest', 'precision = [HIGHEST, HIGHEST]'),
        ('tensorfloat32', 'precision = [HIGH, HIGH]'),
        ('bfloat16', 'lhs_precision_type = bf16, rhs_precision_type = bf16, accumulation_type = f32'),
    ],
)
def test_what_an_update_asks_of_an_accelerator(precision, asked_for, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    devices.set_matmul_precision(precision)
    batch = make_batch()
    agent = make_agent(batch)
    # Made for another platform than this one: what is asked for can be read without the device.
    update = jax.jit(lambda agent: agent.finetune(batch, jax.random.key(0), update_actor=True)).trace(agent)
    for platform in ('cuda', 'tpu'):
        program = update.lower(lowering_platforms=(platform,)).as_text()
        products = [line for line in program.splitlines() if 'stablehlo.dot_general' in line]
        assert len(products) > 20
        assert [line for line in products if asked_for not in line] == [], platform
