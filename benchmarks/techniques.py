"""What each technique of the training loop saves: the loop without it, in turns with the loop as it is.

    python -m benchmarks.techniques [--preset=paper] [--only=hoisting,donation] [--output=results/throughput]

InFOM on synthetic data of a task's shapes, one seed unless said; one technique is taken out at a time, by putting a
plain form in its place while the loop is compiled. Leaves `techniques.md` and `techniques.jsonl` (a line for each
technique, machine and versions included; another device's lines are kept). A ratio is the time without the technique
over the time with it, the median over pairs of turns: above 1 it pays.
"""

import contextlib
import dataclasses
import datetime
import functools
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import flags
from tqdm import tqdm

import agents
from agents import infom
from benchmarks import suite, throughput
from utils import cli, devices, networks, processor, runs, training
from utils.errors import UserError, expanded

FLAGS = flags.FLAGS

# What does not depend on each other runs side by side, and more kinds of operations are in a graph than by default.
CONCURRENT_GRAPHS = {
    'xla_gpu_enable_command_buffer': 'FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL',
    'xla_gpu_graph_min_graph_size': 1,
    'xla_gpu_command_buffer_scheduling_mode': 'CONCURRENT',
}
ENTRY = 'technique', 'preset', 'env_name', 'precision'  # What tells two lines of one machine apart.


# ------------------------------------------------------------------------------------------------------- plain forms


def rolled_euler(velocity, noise, num_steps, bounds=None):
    """`flows.euler_integrate` as a loop of the program."""

    def step(i, x):
        x = x + velocity(x, i.astype(x.dtype) / num_steps) / num_steps
        return x if bounds is None else jnp.clip(x, *bounds)

    return jax.lax.fori_loop(0, num_steps, step, noise)


class UnhoistedField(networks.VectorField):
    """The first layer's whole product at every evaluation, for every sample; `condition` gives its constant inputs."""

    def condition(self, *conditions):
        return jnp.concatenate(conditions, axis=-1)

    def through_last(self, condition, last):
        return jnp.concatenate([condition[..., : -last.shape[-1]], last], axis=-1)

    def __call__(self, x, times, condition):
        parts = [jnp.broadcast_to(part, (*x.shape[:-1], part.shape[-1])) for part in (jnp.atleast_1d(times), condition)]
        h = nn.gelu(networks.matmul(jnp.concatenate([x, *parts], axis=-1), self.first_kernel) + self.first_bias)
        return self.rest(self.first_norm(h) if self.layer_norm else h)


def all_rows_at_once(function, *arrays, samples_per_row=1):
    return jax.vmap(function)(*arrays)


def layer_norm_of_moments(x, scale, bias):
    """`networks._layer_norm_forward` with the variance as E x² − (E x)²."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.maximum(0.0, (x * x).mean(axis=-1, keepdims=True) - mean**2)
    inverse_std = jax.lax.rsqrt(variance + networks.LAYER_NORM_EPSILON)
    return (x - mean) * (inverse_std * scale) + bias, (x, mean, inverse_std, scale)


@jax.custom_vjp
def moments_layer_norm(x, scale, bias):
    """`networks.layer_norm` with `layer_norm_of_moments` as its forward pass."""
    return layer_norm_of_moments(x, scale, bias)[0]


moments_layer_norm.defvjp(layer_norm_of_moments, networks._layer_norm_backward)


def with_options(options):
    return [mock.patch.object(processor, 'compiler_options', lambda backend: options)]


def flax_layer_norm():
    return nn.LayerNorm(epsilon=networks.LAYER_NORM_EPSILON)


def flattened_adam(*args, **kwargs):
    """One vector for each module's parameters, as fewer and longer operations."""
    return optax.flatten(plain_adam(*args, **kwargs))


plain_adam = optax.adam


def undonated_chunk():
    return jax.jit(training.train_chunk.__wrapped__, static_argnames=('phase', 'n'))


# -------------------------------------------------------------------------------------------------------- techniques


@dataclasses.dataclass(frozen=True)
class Technique:
    """`without` gives the patches that take it out, `taken_out` is a context with them in force; `single_updates`:
    without it a call makes one update, or one period of the actor; `agent`: settings without it; `num_seeds`: side by
    side, against one after the other (times are of all); `backends`, `precision`: those that have it."""

    text: str
    without: Callable[[], list] = list
    single_updates: bool = False
    agent: dict = dataclasses.field(default_factory=dict)
    num_seeds: int = 1
    backends: tuple[str, ...] = ('cpu', 'gpu', 'tpu')
    precision: str | None = None

    @contextlib.contextmanager
    def taken_out(self):
        with contextlib.ExitStack() as stack:
            for patch in self.without():
                stack.enter_context(patch)
            yield


TECHNIQUES = {
    'chunks': Technique('many updates in one call (`scan`), against one a call', single_updates=True),
    'unrolling': Technique(
        'Euler steps as straight-line code', lambda: [mock.patch.object(infom, 'euler_integrate', rolled_euler)]
    ),
    'hoisting': Technique(
        "the field's product with [s, a, z] once for a flow",
        lambda: [mock.patch.object(infom, 'VectorField', UnhoistedField)],
    ),
    'blocks': Technique(
        'flows in blocks of two halves (CPU only)',
        lambda: [mock.patch.object(infom, 'map_rows', all_rows_at_once)],
        backends=('cpu',),
    ),
    'centred variance': Technique(
        "LayerNorm's variance of centred values, against E x² − (E x)²",
        lambda: [mock.patch.object(networks, 'layer_norm', moments_layer_norm)],
    ),
    'layer norm': Technique(
        "LayerNorm's gradient in closed form",
        lambda: [mock.patch.object(networks, 'LayerNorm', flax_layer_norm)],
    ),
    'early rounding': Technique(
        'what only products read stored rounded (`--precision=bfloat16`), against rounded on its way into them',
        lambda: [mock.patch.object(infom, 'rounded', lambda params: params)],
        backends=('gpu', 'tpu'),
        precision='bfloat16',
    ),
    'donation': Technique(
        'agents updated in their own memory', lambda: [mock.patch.object(training, 'train_chunk', undonated_chunk())]
    ),
    'own Adams': Technique('an Adam for each module, of those that learn', agent={'joint_adam': True}),
    'wide vectors': Technique(
        'vectors of 512 bits (CPUs with AVX-512 only)', lambda: with_options({}), backends=('cpu',)
    ),
    'graphs': Technique(
        'CUDA graphs (GPU only), against none',
        lambda: with_options({'xla_gpu_enable_command_buffer': ''}),
        backends=('gpu',),
    ),
    'concurrent graphs': Technique(
        'not taken: the operations of CUDA graphs in their order, against side by side (GPU only)',
        lambda: with_options(CONCURRENT_GRAPHS),
        backends=('gpu',),
    ),
    'packing': Technique(
        'vectors and scalars in one array from update to update, against each in its own',
        lambda: [mock.patch.object(training, '_scan', jax.lax.scan)],
    ),
    'flat Adam': Technique(
        'not taken: parameters as they are, against one vector for each module',
        lambda: [mock.patch.object(optax, 'adam', flattened_adam)],
    ),
    'seeds': Technique('four seeds side by side, against one after the other', num_seeds=4),
}


def prepare_without(technique: Technique, problem, phase, updates, initial, compilers) -> Callable[[], throughput.Loop]:
    """The loop of `updates` updates without a technique, as `throughput.prepare_loop` gives it; `initial(config)` makes
    the agents."""
    chunk = updates
    if technique.single_updates:
        chunk = problem.config.actor_freq if phase == 'finetuning' else 1
    config = ml_collections.ConfigDict(problem.config)
    config.update(technique.agent)
    plain = dataclasses.replace(problem, config=ml_collections.FrozenConfigDict(config))
    with technique.taken_out():
        jax.clear_caches()  # Traces do not know that what they called has changed.
        calls = updates // chunk * technique.num_seeds
        ready = throughput.prepare_loop(
            plain, phase, chunk, calls=calls, agents=initial(plain.config), compilers=compilers
        )
    jax.clear_caches()
    return lambda: dataclasses.replace(ready(), updates=updates)  # Of each seed.


def measure(loops, repeats: int) -> dict:
    """Of {phase: {'ours': loop, 'without': loop}}: {phase: {'ratio', 'ratio_min', 'ratio_max', and 'ms' with and
    'without_ms' without the technique}}."""
    result = {}
    for phase, pair in loops.items():
        times = throughput.measure(pair, repeats, phase)
        medians = {'ms': statistics.median(times['ours']), 'without_ms': statistics.median(times['without'])}
        result[phase] = throughput.paired_ratio(times['without'], times['ours']) | medians
    return result


def markdown(reports) -> str:
    """One table for each device, preset and task."""
    lines = [
        '# What each technique saves',
        '',
        'Written by `python -m benchmarks.techniques`: InFOM, time of an update without the technique over the time',
        'with it, median and range over pairs of turns. Above 1 it pays.',
    ]
    kinds = [(*suite.place(report), report['preset'], report['env_name'], report['precision']) for report in reports]
    for kind in dict.fromkeys(kinds):
        here = [report for report, its_kind in zip(reports, kinds, strict=True) if its_kind == kind]
        device, processor_name, cores, preset, env_name, precision = kind
        versions = ', '.join(f'{name} {version}' for name, version in here[0]['versions'].items())
        lines += [
            '',
            f'## {device}: {cores} cores of {processor_name}, preset {preset}, {env_name}, {precision}',
            '',
            f'{", ".join(sorted({report["date"] for report in here}))}; {versions}.',
            '',
            '| technique | | pre-training | fine-tuning |',
            '| --- | --- | --- | --- |',
        ]
        for report in here:
            cells = [
                f'{report[phase]["ratio"]:.2f} ({report[phase]["ratio_min"]:.2f}–{report[phase]["ratio_max"]:.2f})'
                for phase in throughput.PHASES
            ]
            lines.append(f'| {report["technique"]} | {TECHNIQUES[report["technique"]].text} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def main(_):
    if agents.resolve(FLAGS.agent) != 'infom' or FLAGS.num_seeds != 1:
        raise UserError('the techniques are measured on InFOM, one seed: leave out --agent and --num_seeds')
    unknown = sorted(set(FLAGS.only) - set(TECHNIQUES))
    if unknown:
        raise UserError(f'--only={",".join(unknown)}: expected of {", ".join(TECHNIQUES)}')
    directory = runs.require_writable(expanded(FLAGS.output))
    devices.set_matmul_precision(FLAGS.precision)
    path = directory / 'techniques.jsonl'
    reports = suite.read(path)
    problem = throughput.make_problem('infom', FLAGS.env_name, FLAGS.preset, FLAGS.rows, FLAGS.batch_size)
    updates = throughput.updates_of_a_turn(problem.config)
    about = throughput.machine() | {'date': datetime.datetime.now(datetime.UTC).date().isoformat()}

    @functools.cache
    def created(config, num_seeds):
        return training.create_agents(problem.agent_class, list(range(num_seeds)), problem.example, config)

    def initial(config, num_seeds=1):
        return jax.tree.map(jnp.copy, created(config, num_seeds))

    names = FLAGS.only or [
        name
        for name, each in TECHNIQUES.items()
        if about['platform'] in each.backends and each.precision in (None, FLAGS.precision)
    ]
    progress = tqdm(total=len(names), desc='techniques', unit='technique')
    with ThreadPoolExecutor(FLAGS.compilers) as compilers:

        @functools.cache
        def ours(phase, num_seeds):
            options = {'agents': initial(problem.config, num_seeds), 'compilers': compilers}
            return functools.cache(throughput.prepare_loop(problem, phase, updates[phase], num_seeds, **options))

        def prepare(technique, phase):
            without = prepare_without(technique, problem, phase, updates[phase], initial, compilers)
            return {'ours': ours(phase, technique.num_seeds), 'without': without}

        for first in range(0, len(names), FLAGS.compilers):
            group = names[first : first + FLAGS.compilers]
            preparing = {
                name: {phase: prepare(TECHNIQUES[name], phase) for phase in throughput.PHASES} for name in group
            }
            # All of them are compiled before one is measured.
            loops = jax.tree.map(lambda ready: ready(), preparing)
            for name in group:
                settings = {setting: getattr(FLAGS, setting) for setting in ('preset', 'env_name', 'precision')}
                report = {'technique': name, **settings, **measure(loops[name], FLAGS.repeats), **about}
                reports = [other for other in reports if not suite.same_place(report, other, ENTRY)] + [report]
                suite.write(path, reports, 'techniques.md', markdown(reports))
                progress.update()
    progress.close()
    print(markdown(reports))


if __name__ == '__main__':
    flags.DEFINE_list('only', [], f'Techniques to measure, of {", ".join(TECHNIQUES)}; empty for all.')
    flags.DEFINE_string('output', 'results/throughput', 'Folder of techniques.jsonl and techniques.md.')
    cli.run(main)
