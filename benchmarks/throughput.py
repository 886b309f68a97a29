"""Updates per second of an agent's compiled training loop; of InFOM's, side by side with the host loop of the field.

    python -m benchmarks.throughput --agent=infom --preset=paper [--env_name=…] [--num_seeds=8]

Both loops get the same synthetic data of the task's shapes and take turns (ours, host, ours, host, …), so that whatever
else the machine does meets both. Prints a table, then, as the last line, one JSON object; a ratio is the host loop's
time over ours, the median over the pairs of turns. No simulator and no data file is needed. The host loop and its
losses are in `benchmarks/host_loop.py`: InFOM on states, one seed; of anything else our loop is measured alone.
`benchmarks/suite.py` runs several of these and keeps what they say.
"""

import dataclasses
import functools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib.metadata import version

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from tqdm import tqdm

import agents
import envs
from benchmarks import arithmetic, host_loop, suite
from envs import worker_pool
from utils import cli, devices, presets, processor, training
from utils.datasets import Dataset, example_batch
from utils.flags import PHASES, avoid_crash_on_images
from utils.flows import clipping_bounds
from utils.normalizers import Normalizer
from utils.run_config import flag_fields

# Agents that have a host loop to be compared with.
HOST_LOOPS = {'infom': host_loop}
JSON_PREFIX = {'pretraining': 'pretrain', 'finetuning': 'finetune'}
EPISODE_LENGTH = 1000

flags.DEFINE_string('agent', 'infom', f'agent to measure: {", ".join(agents.available())}')
flags.DEFINE_string('env_name', 'cube-single-play-singletask-task1-v0', 'task whose shapes and settings are used')
flags.DEFINE_enum('preset', 'paper', list(presets.PRESETS), 'sizes of the networks')
flags.DEFINE_integer('updates', 32, 'pre-training updates in each turn of a loop', lower_bound=1)
flags.DEFINE_integer(
    'finetuning_updates', 8, 'the same for fine-tuning; rounded up to whole actor periods', lower_bound=1
)
flags.DEFINE_integer('repeats', 7, 'turns of each loop in each phase', lower_bound=1)
flags.DEFINE_integer('rows', 100_000, 'rows of the synthetic data', lower_bound=10)
flags.DEFINE_integer('num_seeds', 1, 'seeds trained side by side', lower_bound=1)
PRECISION = flag_fields()['precision']
flags.DEFINE_enum('precision', PRECISION.default, PRECISION.metadata['choices'], PRECISION.metadata['help'])
flags.DEFINE_integer(
    'compilers', 1, 'programs compiled at a time; their compile times are then of several', lower_bound=1
)
flags.DEFINE_integer('batch_size', None, "rows of a batch instead of the preset's", lower_bound=1)


@dataclasses.dataclass
class Loop:
    """`run()` makes `updates` updates and waits for them; `first_seconds`: the first turn, compilation included.

    gflop: matrix products' arithmetic of one update of one seed. megabytes: memory of the compiled program, its
    arguments (agents and data) included.
    """

    run: Callable[[], None]
    updates: int
    first_seconds: float
    gflop: float | None = None
    megabytes: float | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """What both loops train on: the config, raw rows (numpy), their normaliser, and one example batch."""

    agent_class: type
    config: ml_collections.FrozenConfigDict
    raw: dict
    normalizer: Normalizer
    reward_at: str
    frame_stack: int
    p_aug: float

    def dataset(self, phase):
        labels = () if phase == 'finetuning' else ('rewards', 'masks')
        raw = {name: rows for name, rows in self.raw.items() if name not in labels}
        options = {'reward_at': self.reward_at, 'frame_stack': self.frame_stack, 'p_aug': self.p_aug}
        return Dataset.create(raw, self.normalizer, **options)

    @property
    def example(self):
        return example_batch(self.dataset('pretraining'))


def synthetic_rows(rows: int, observation_shape: tuple[int, ...], action_dim: int, seed: int = 0):
    """Random states, or images (H, W, C), actions, rewards and masks in episodes of `EPISODE_LENGTH`, as
    `envs.data.load_raw` gives rows."""
    rng = np.random.default_rng(seed)
    terminals = np.arange(1, rows + 1) % EPISODE_LENGTH == 0
    terminals[-1] = True
    shape = (rows, *observation_shape)
    if len(observation_shape) == 3:
        observations = rng.integers(0, 256, shape, dtype=np.uint8)
    else:
        observations = rng.normal(size=shape).astype(np.float32)
    return {
        'observations': observations,
        'actions': rng.uniform(-0.9, 0.9, (rows, action_dim)).astype(np.float32),
        'terminals': terminals,
        'rewards': rng.choice(np.float32([-1, 0]), rows),
        'masks': np.ones(rows, np.float32),
    }


def make_problem(agent: str, env_name: str, preset: str, rows: int, batch_size: int | None = None) -> Problem:
    """The preset's networks and synthetic data of the task's shapes; the preset's batches where `batch_size` is None.
    Raises UserError for what cannot be measured."""
    name, task = agents.resolve(agent), envs.task_spec(env_name)
    module = agents.load(name)
    settings = presets.resolve(name, env_name, preset)
    config = module.get_config()
    config.update(settings.agent)
    if batch_size is not None:
        config.batch_size = batch_size
    module.validate_config(config)
    raw = synthetic_rows(rows, task.observation_shape, task.action_size)
    normalizer = Normalizer.fit(raw['observations'], settings.flags['obs_norm_type'])
    frames = {flag: settings.flags[flag] for flag in ('frame_stack', 'p_aug')}
    config = ml_collections.FrozenConfigDict(config)
    return Problem(module.AGENT, config, raw, normalizer, task.reward_at, **frames)


def timed(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def prepare_loop(
    problem: Problem, phase: str, updates: int, num_seeds: int = 1, *, calls: int = 1, agents=None, compilers: Executor
) -> Callable[[], Loop]:
    """The agent in the compiled chunk of `utils/training.py`, data on the device, seeds 0, 1, … side by side; a turn is
    `calls` calls of `updates` updates, dispatched one after the other and waited for once.

    Traced now and compiled by the executor; what is returned waits for the program and makes the first turn. agents:
    where to start, instead of new ones; they are given away.
    """
    dataset = jax.device_put(problem.dataset(phase))
    seeds = list(range(num_seeds))
    if agents is None:
        agents = training.create_agents(problem.agent_class, seeds, problem.example, problem.config)
    keys = training.stream_keys(seeds, phase)
    traced = functools.partial(training.train_chunk.__wrapped__, phase=phase, n=updates)
    gflop = arithmetic.matmul_flops(traced, agents, dataset, keys, jnp.int32(0)) / updates / num_seeds / 1e9
    began = time.perf_counter()
    compile_program = training.trace_chunk(agents, dataset, keys, phase=phase, n=updates)
    seconds = time.perf_counter() - began

    def compiled():
        began = time.perf_counter()
        return compile_program(), time.perf_counter() - began

    program = compilers.submit(compiled)

    def ready() -> Loop:
        chunk, more_seconds = program.result()
        state, start = agents, 0

        def run():
            nonlocal state, start
            for _ in range(calls):
                state, metrics = chunk(state, dataset, keys, np.int32(start))
                start += updates
            jax.block_until_ready((state, metrics))

        return Loop(run, updates * calls, seconds + more_seconds + timed(run), gflop, megabytes_of(chunk))

    return ready


def megabytes_of(compiled) -> float | None:
    """Memory of a compiled program while it runs; None where the backend does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (sizes - memory.alias_size_in_bytes) / 1e6


def plain_loop(problem: Problem, phase: str, updates: int, seed: int = 0) -> Loop:
    """The host loop, data in NumPy."""
    dataset, example = problem.dataset(phase), problem.example
    data = host_loop.row_arrays(dataset)
    bounds = None
    if problem.config.clip_flow_goals:
        bounds = clipping_bounds(example['observation_min'], example['observation_max'])
    dims = (example['observations'].shape[-1], example['actions'].shape[-1])
    create = jax.jit(lambda key: host_loop.TrainState.create(key, *dims, problem.config, bounds))
    state, rng, key, start = create(jax.random.key(seed)), np.random.default_rng(seed), jax.random.key(seed), 0

    def run():
        nonlocal state, start
        step_key = jax.random.fold_in(key, start)
        state, metrics = host_loop.train(state, data, rng, step_key, start, updates, phase)
        start += updates
        jax.block_until_ready((state, metrics))

    return Loop(run, updates, timed(run))


def measure(loops: dict[str, Loop], repeats: int, description: str):
    """Milliseconds per update of each loop's turns: {name: (repeats,)}; the loops take turns."""
    for loop in loops.values():
        loop.run()  # The first turns after compilation find cold caches.
    times = {name: [] for name in loops}
    for _ in tqdm(range(repeats), desc=description, leave=False):
        for name, loop in loops.items():
            times[name].append(timed(loop.run) / loop.updates * 1e3)
    return times


def paired_ratio(times, ours) -> dict:
    """Another loop's time over ours, pair by pair: median and range."""
    ratios = [other / own for other, own in zip(times, ours, strict=True)]
    return {'ratio': statistics.median(ratios), 'ratio_min': min(ratios), 'ratio_max': max(ratios)}


def updates_of_a_turn(config) -> dict:
    """{phase: updates} that the command line asks for; in fine-tuning whole periods of the actor."""
    period = config.actor_freq
    updates = -(-flags.FLAGS.finetuning_updates // period) * period
    return {'pretraining': flags.FLAGS.updates, 'finetuning': updates}


def summarize(loops: dict[str, Loop], times, num_seeds: int = 1, matmul_gflops: float | None = None):
    """Medians of one phase's measurements, with the spread of the paired ratios where there is a host loop.

    matmul_gflops: the device's rate of matrix products (10⁹/s), for the share of it that our loop reaches.
    """
    summary = {}
    for name, loop in loops.items():
        prefix = '' if name == 'ours' else f'{name}_'
        median = statistics.median(times[name])
        summary |= {
            f'{prefix}ms': median,
            f'{prefix}updates_per_second': 1e3 / median,
            # A first turn is compilation and the work of any turn.
            f'{prefix}compile_seconds': max(0.0, loop.first_seconds - median * loop.updates / 1e3),
        }
    if 'host' in loops:
        summary |= paired_ratio(times['host'], times['ours'])
    ours = loops['ours']
    summary |= {'updates': ours.updates, 'seed_updates_per_second': num_seeds * summary['updates_per_second']}
    if ours.gflop is not None:
        summary['gflop'] = ours.gflop
        if matmul_gflops is not None:
            summary['matmul_share'] = ours.gflop * summary['seed_updates_per_second'] / matmul_gflops
    if ours.megabytes is not None:
        summary['megabytes'] = ours.megabytes
    return summary


def machine() -> dict:
    """Processor, cores, how busy they were before the measurement, device and versions."""
    return {
        'device': jax.devices()[0].device_kind,
        'platform': jax.default_backend(),
        'processor': processor.model_name(),
        'cores': worker_pool.available_cores(),
        'load_average': round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
        'versions': {
            'python': platform.python_version(),
            **{name: version(name) for name in ('jax', 'flax', 'optax', 'numpy')},
        },
    }


def table(results) -> str:
    header = f'{"phase":<14}{"loop":<8}{"ms/update":>11}{"updates/s":>11}{"compile s":>11}'
    lines = [f'{header}{"GFLOP":>9}{"of matmul":>11}{"MB":>8}{"ratio":>8}  range over pairs']
    for phase, result in results.items():
        if 'ratio' in result:
            columns = [result[f'host_{name}'] for name in ('ms', 'updates_per_second', 'compile_seconds')]
            lines.append(f'{phase:<14}{"host":<8}' + ''.join(f'{column:11.1f}' for column in columns))
        columns = [result[name] for name in ('ms', 'seed_updates_per_second', 'compile_seconds')]
        line = f'{phase:<14}{"ours":<8}' + ''.join(f'{column:11.1f}' for column in columns)
        line += f'{result.get("gflop", math.nan):9.2f}{result.get("matmul_share", math.nan):11.0%}'
        line += f'{result.get("megabytes", math.nan):8.0f}'
        if 'ratio' in result:
            line += f'{result["ratio"]:8.2f}  {result["ratio_min"]:.2f}–{result["ratio_max"]:.2f}'
        lines.append(line)
    return '\n'.join(lines)


def main(_):
    values = flags.FLAGS
    agent, task = agents.resolve(values.agent), envs.task_spec(values.env_name)
    if task.visual:
        avoid_crash_on_images()
    devices.set_matmul_precision(values.precision)
    about = machine()
    problem = make_problem(agent, values.env_name, values.preset, values.rows, values.batch_size)
    updates = updates_of_a_turn(problem.config)
    with ThreadPoolExecutor(values.compilers) as compilers:
        preparing = {
            phase: prepare_loop(problem, phase, updates[phase], values.num_seeds, compilers=compilers)
            for phase in PHASES
        }
        loops = {phase: {'ours': ready()} for phase, ready in preparing.items()}
    if agent in HOST_LOOPS and not task.visual and values.num_seeds == 1:
        for phase in PHASES:
            loops[phase]['host'] = plain_loop(problem, phase, updates[phase])
    if values.wait:
        print(suite.COMPILED, flush=True)
        input()
    measured, rates = {}, []
    for phase in PHASES:
        rates.append(arithmetic.measure_matmul_rate() / 1e9)
        measured[phase] = loops[phase], measure(loops[phase], values.repeats, phase)
        rates.append(arithmetic.measure_matmul_rate() / 1e9)
    results = {phase: summarize(*of_phase, values.num_seeds, max(rates)) for phase, of_phase in measured.items()}

    shapes = {k: '×'.join(map(str, problem.raw[k].shape[1:])) for k in ('observations', 'actions')}
    print(
        f'{agent}, preset {values.preset}, {values.env_name}: {shapes["observations"]} observation and '
        f'{shapes["actions"]} action dimensions, batch {problem.config.batch_size}, {values.num_seeds} seed(s) side by '
        f'side, {values.precision}, {values.repeats} turns\n'
        f'{about["cores"]} cores of {about["processor"]}, load {about["load_average"]}; '
        f'matrix products at {max(rates):.0f} GFLOP/s on {about["device"]}\n\n{table(results)}\n'
    )
    report = {name: getattr(values, name) for name in ('preset', 'env_name', 'num_seeds', 'precision', 'repeats')}
    report |= {'agent': agent, 'batch_size': problem.config.batch_size, 'matmul_gflops': round(max(rates), 1)}
    for phase, result in results.items():
        report.update({f'{JSON_PREFIX[phase]}_{name}': round(value, 4) for name, value in result.items()})
    print(json.dumps({**report, **about}))


if __name__ == '__main__':
    flags.DEFINE_bool(
        'wait', False, f'say "{suite.COMPILED}" and wait for a line on standard input before anything is measured'
    )
    cli.run(main)
