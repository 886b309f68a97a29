"""Settings of every test: JAX on the CPU with exact float32 matrix products, and compiled functions kept between runs
of the tests.

Fixtures belong to the files that use them, shared problems and configurations to `tests/tiny.py`. The compilation
cache lives in pytest's own cache directory: `pytest --cache-clear` empties it, `-p no:cacheprovider` does without.
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax

jax.config.update('jax_default_matmul_precision', 'highest')


def pytest_configure(config):
    cache = getattr(config, 'cache', None)
    if cache is not None and not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
        jax.config.update('jax_compilation_cache_dir', str(cache.mkdir('jax')))
        # The tests' programs are small: keep those, too, that compile in a moment.
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
