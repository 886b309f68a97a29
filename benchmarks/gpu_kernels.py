"""How many kernels an update is on a GPU, counted in the program that XLA makes for one; no GPU is needed.

    pip install "jax[cuda12]"    # Several GB.
    python -m benchmarks.gpu_kernels [--agent=infom] [--preset=paper] [--num_seeds=1]

The networks here are small for a GPU: a kernel takes a few µs, whatever it does, and the time of an update is about
their number. The program is compiled for an H100. What XLA chooses by trial on a GPU (which library or tiling makes a
product, and whether its sums are split) it does not choose here, so that numbers may differ by some there: they are for
comparing programs. Prints a table and, as the last line, one JSON object.
"""

import collections
import json
import os
import re

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import agents
from benchmarks import throughput
from utils import cli, devices, training
from utils.errors import UserError

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 device_memory_size: 84929347584 memory_bandwidth: 3352320000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
KINDS = 'products', 'rows', 'sums', 'elementwise', 'other'
NO_KERNEL = {
    *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id'),
    'opt-barrier',
}
COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][a-z\-]*)\(')


def compile_for_gpu(problem: throughput.Problem, phase: str, updates: int, num_seeds: int) -> str:
    """The compiled chunk of `updates` updates as text (HLO). Raises UserError where JAX has no compiler for GPUs."""
    try:
        topology = topologies.get_topology_desc(platform='cuda', target_config=H100, topology='1x1x1')
    except NotImplementedError:
        raise UserError('JAX has no compiler for NVIDIA GPUs here: pip install "jax[cuda12]"') from None
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ('device',)), PartitionSpec())

    def described(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    seeds = list(range(num_seeds))
    arguments = (
        training.describe_agents(problem.agent_class, seeds, problem.example, problem.config),
        problem.dataset(phase),
        jax.eval_shape(lambda: training.stream_keys(seeds, phase)),
        np.int32(0),
    )
    traced = training.train_chunk.trace(*map(described, arguments), phase=phase, n=updates)
    # Nothing can be tried where there is no GPU.
    options = {'xla_gpu_autotune_level': 0}
    return traced.lower(lowering_platforms=('cuda',)).compile(compiler_options=options).as_text()


def count_kernels(hlo: str) -> tuple[collections.Counter, collections.Counter]:
    """Kernels of a compiled chunk by kind: ({kind: in the loop over updates, all its turns}, {kind: outside of it})."""
    computations, entry = _computations(hlo)
    outside, loops = _own_kernels(computations[entry])
    return sum((_all_kernels(computations, loop) for loop in loops), collections.Counter()), outside


def _computations(hlo: str):
    """({name: lines of its instructions}, name of the entry)."""
    computations, entry, lines = {}, None, None
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line):
            lines = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif lines is not None:
            lines.append(line)
    return computations, entry


def _own_kernels(lines):
    """({kind: kernels}, [(computation called, turns)]) of one computation."""
    kernels, calls = collections.Counter(), []
    for line in lines:
        match = INSTRUCTION.match(line)
        if match is None or match[1] in NO_KERNEL:
            continue
        if match[1] == 'while':
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            if turns is None:
                raise ValueError(f'a loop without a known number of turns: {line.strip()[:200]}')
            calls.append((re.search(r'body=%?([\w.\-]+)', line)[1], int(turns[1])))
        elif match[1] == 'call':
            calls.append((re.search(r'to_apply=%?([\w.\-]+)', line)[1], 1))
        else:
            kernels[_kind(match[1], line)] += 1
    return kernels, calls


def _all_kernels(computations, call):
    name, turns = call
    kernels, calls = _own_kernels(computations[name])
    kernels = sum((_all_kernels(computations, inner) for inner in calls), kernels)
    return collections.Counter({kind: number * turns for kind, number in kernels.items()})


def _kind(opcode: str, line: str) -> str:
    if opcode == 'custom-call' or 'gemm' in line.split('=')[0] or '__triton_nested_gemm' in line:
        return 'products'
    if opcode != 'fusion':
        return 'other'
    if '"kind":"__triton' in line:
        return 'rows'
    return {'kInput': 'sums', 'kLoop': 'elementwise'}.get(re.search(r'kind=(\w+)', line)[1], 'other')


def main(_):
    values = flags.FLAGS
    # No GPU is looked for, nor its driver; before anything asks JAX for its devices.
    os.environ |= {'CUDA_VISIBLE_DEVICES': '-1', 'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1'}
    devices.set_matmul_precision(values.precision, 'gpu')
    problem = throughput.make_problem(agents.resolve(values.agent), values.env_name, values.preset, rows=5000)
    # Two turns of the loop at least: of a single one XLA makes no loop.
    updates = {'pretraining': 2, 'finetuning': 2 * problem.config.actor_freq}
    report = {name: getattr(values, name) for name in ('agent', 'env_name', 'preset', 'num_seeds', 'precision')}
    print(f'{"kernels of an update":<22}{"all":>8}' + ''.join(f'{kind:>13}' for kind in KINDS) + f'{"once a call":>13}')
    for phase in throughput.PHASES:
        hlo = compile_for_gpu(problem, phase, updates[phase], values.num_seeds)
        inside, outside = count_kernels(hlo)
        counts = {'all': inside.total(), **{kind: inside[kind] for kind in KINDS}}
        counts = {name: number / updates[phase] for name, number in counts.items()}
        report[phase] = counts | {'once_a_call': outside.total()}
        columns = ''.join(f'{counts[kind]:13.1f}' for kind in KINDS)
        print(f'{phase:<22}{counts["all"]:8.1f}{columns}{outside.total():13d}')
    print(json.dumps(report))


if __name__ == '__main__':
    cli.run(main)
