"""What programs are compiled with on this machine's processor."""

import jax
import jax.numpy as jnp
import pytest

from utils import processor


@pytest.mark.parametrize('flags', ['fma avx2 avx512f avx512bw', 'fma avx2', None])
def test_wide_vectors_are_asked_for_where_the_processor_has_them(flags, tmp_path, monkeypatch):
    information = tmp_path / 'cpuinfo'
    if flags is not None:
        information.write_text(f'processor\t: 0\nflags\t\t: {flags}\n')
    monkeypatch.setattr(processor, 'Path', lambda path: information)
    found = processor.has_avx512.__wrapped__()
    assert found == (flags is not None and 'avx512f' in flags)
    monkeypatch.setattr(processor, 'has_avx512', lambda: found)
    options = processor.compiler_options('cpu')
    assert bool(options) == found
    # XLA refuses options that it does not know.
    compiled = jax.jit(lambda x: jnp.tanh(x) + 1).lower(jnp.ones(8)).compile(compiler_options=options)
    assert jnp.allclose(compiled(jnp.zeros(8)), 1.0)
    assert processor.compiler_options('gpu') == {}
