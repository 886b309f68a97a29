"""This machine's processor, as far as Linux describes it, and what XLA is asked for because of it."""

import functools
import hashlib
import platform
from pathlib import Path


def _described(*names: str) -> str | None:
    """The first line of the processor's description that begins with one of the names; None if there is none."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        return None
    return next((line for line in lines if line.lower().startswith(names)), None)


@functools.cache
def has_avx512() -> bool:
    """Whether it has vectors of 512 bits, which XLA leaves unused unless asked; False where Linux does not tell."""
    return 'avx512f' in (_described('flags') or '').split()


def instruction_set() -> str:
    """A short name of its instruction set: machines that share a home must not share programs compiled for a CPU."""
    return hashlib.sha256((_described('flags', 'features') or platform.machine()).encode()).hexdigest()[:12]


def model_name() -> str:
    """What its maker calls it."""
    line = _described('model name')
    return platform.processor() if line is None else line.split(':')[1].strip()


def compiler_options(backend: str) -> dict:
    """XLA's options for a program that runs for long on a `backend` as `jax.default_backend` names them."""
    return {'xla_cpu_prefer_vector_width': 512} if backend == 'cpu' and has_avx512() else {}
