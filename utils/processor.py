"""What is known of the processor that programs are compiled for; nothing of accelerators."""

import functools
from pathlib import Path


@functools.cache
def has_avx512() -> bool:
    """Whether it has vectors of 512 bits, which XLA leaves unused unless asked; False where Linux does not tell."""
    information = Path('/proc/cpuinfo')
    return information.exists() and 'avx512f' in information.read_text(encoding='utf-8').split()


def compiler_options() -> dict:
    """XLA's options for a program that runs for long on this processor."""
    return {'xla_cpu_prefer_vector_width': 512} if has_avx512() else {}
