"""What XLA is asked for, by the kind of device that a program is compiled for."""

import functools
from pathlib import Path

# What a GPU's command buffers (CUDA graphs) hold. XLA's default leaves out conditionals and slices at places that are
# computed, and puts operations that do not depend on each other one after the other.
GRAPH_OPTIONS = {
    'xla_gpu_enable_command_buffer': 'FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL',
    'xla_gpu_graph_min_graph_size': 1,
    'xla_gpu_command_buffer_scheduling_mode': 'CONCURRENT',
}


@functools.cache
def has_avx512() -> bool:
    """Whether it has vectors of 512 bits, which XLA leaves unused unless asked; False where Linux does not tell."""
    information = Path('/proc/cpuinfo')
    return information.exists() and 'avx512f' in information.read_text(encoding='utf-8').split()


def compiler_options(backend: str) -> dict:
    """XLA's options for a program that runs for long on a `backend` as `jax.default_backend` names them; they count
    above XLA_FLAGS."""
    if backend == 'gpu':
        return GRAPH_OPTIONS
    return {'xla_cpu_prefer_vector_width': 512} if backend == 'cpu' and has_avx512() else {}
