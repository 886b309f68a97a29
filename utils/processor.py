"""What XLA is asked for, by the kind of device that a program is compiled for."""

import functools
from pathlib import Path


@functools.cache
def has_avx512() -> bool:
    """Whether it has vectors of 512 bits, which XLA leaves unused unless asked; False where Linux does not tell."""
    information = Path('/proc/cpuinfo')
    return information.exists() and 'avx512f' in information.read_text(encoding='utf-8').split()


def compiler_options(backend: str) -> dict:
    """XLA's options for a program that runs for long on a `backend` as `jax.default_backend` names them."""
    return {'xla_cpu_prefer_vector_width': 512} if backend == 'cpu' and has_avx512() else {}
