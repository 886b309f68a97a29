"""Settings of every test: JAX on the CPU with exact float32 matrix products, programs compiled in a hurry, and kept
between runs of the tests.

Fixtures belong to the files that use them, shared problems and configurations to `tests/tiny.py`. The compilation
cache lives in pytest's own cache directory: `pytest --cache-clear` empties it, `-p no:cacheprovider` does without.
"""

import gc
import importlib.metadata
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# The tests compile much and compute little: without LLVM's optimisation they take a third of the time, without MLIR's
# way of fusing loops compiling takes half of that, and a program in one part, where there is one core, a sixth less.
# The processes that they start inherit this.
if 'xla_backend_optimization_level' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0'.strip()
# XLA ends a process that passes a flag unknown to it, and other versions may not know this one.
if 'fusion_emitters' not in os.environ['XLA_FLAGS'] and importlib.metadata.version('jaxlib').startswith('0.10.'):
    os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
# A core for each of the processes that share the tests: XLA's threads of one would get in the way of the other's.
if 'PYTEST_XDIST_WORKER' in os.environ and hasattr(os, 'sched_setaffinity'):
    cores, number = sorted(os.sched_getaffinity(0)), int(os.environ['PYTEST_XDIST_WORKER'].removeprefix('gw'))
    if int(os.environ['PYTEST_XDIST_WORKER_COUNT']) == len(cores):
        os.sched_setaffinity(0, {cores[number % len(cores)]})

import jax
import pytest

jax.config.update('jax_default_matmul_precision', 'highest')
gc.set_threshold(100_000)  # Tracing makes many objects and little garbage: looking for it takes a tenth of the time.


def pytest_configure(config):
    cache = getattr(config, 'cache', None)
    if cache is not None and not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
        jax.config.update('jax_compilation_cache_dir', str(cache.mkdir('jax')))
        # The tests' programs are small: keep those, too, that compile in a moment.
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def pytest_collection_modifyitems(items):
    """A file's tests share what they compile, so one process runs them all; a file may ask to be parted by the value of
    a parameter, `PARTED_BY`."""
    for item in items:
        part = getattr(item.module, 'PARTED_BY', None)
        parameters = item.callspec.params if hasattr(item, 'callspec') else {}
        item.add_marker(pytest.mark.xdist_group(f'{item.path.stem} {parameters.get(part, "")}'))


@pytest.fixture(autouse=True, scope='module')
def release_programs():
    """Each compiled program takes tens of memory maps, of which a process may have only so many."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def precision_as_before():
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update('jax_default_matmul_precision', before)
