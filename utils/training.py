"""The compiled half of the training loop: chunks of updates as pure functions of (agents, data, keys, step).

`agents` is one agent whose arrays have a leading seed axis; every function here is vmapped over it. Deciding when to
log, evaluate or save, and everything that touches files, is `utils/experiment.py`.
"""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from utils import datasets, devices, diagnostics, processor, random_keys

# Streams of randomness; a seed's key of phase p at step t is fold_in(fold_in(key(seed), p), t), so a resumed run needs
# only the step.
STREAMS = {'create': 0, 'pretraining': 1, 'finetuning': 2, 'begin_finetuning': 3, 'validation': 4, 'act': 5}


def stream_keys(seeds, stream: str):
    """Keys (S,) of the named stream, one for each seed."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), STREAMS[stream]))(jnp.asarray(seeds))


def create_agents(agent_class, seeds, example_batch, config):
    """Fresh agents, vmapped over `seeds`: every array gains a leading axis (S, …)."""
    # It runs once: optimising it takes a CPU seconds, and running it as it is a fraction of one.
    options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
    create = jax.jit(_creation(agent_class, example_batch, config), compiler_options=options)
    return create(stream_keys(seeds, 'create'))


def describe_agents(agent_class, seeds, example_batch, config):
    """What `create_agents` would return, with shapes and types in place of arrays."""
    return jax.eval_shape(_creation(agent_class, example_batch, config), stream_keys(seeds, 'create'))


def _creation(agent_class, example_batch, config):
    """The function of keys (S,) that creates agents."""
    return jax.vmap(lambda key: agent_class.create(key, example_batch, config))


def num_seeds(agents) -> int:
    return jax.tree.leaves(agents)[0].shape[0]


def over_seeds(function, agents, *others):
    """`function(agent, *others)` for every seed: vmapped, or for a single seed called without the seed axis.

    A leading axis of 1 is not free: on CPUs XLA's column sums and optimiser arithmetic take three to six times as long
    on (1, H, H) as on (H, H).
    """
    if num_seeds(agents) > 1:
        return jax.vmap(function, spmd_axis_name=devices.seed_axis())(agents, *others)
    outputs = function(*jax.tree.map(lambda x: x[0], (agents, *others)))
    return jax.tree.map(lambda x: x[None], outputs)


# ---------------------------------------------------------------------------------------------------------- batches


class BatchSpec(NamedTuple):
    """What an agent's batches are; hashable, so that compiled functions can be chosen by it."""

    size: int
    needs: frozenset[str]


def batch_spec(agents) -> BatchSpec:
    return BatchSpec(agents.config.batch_size, agents.needs)


def step_keys(key, step):
    """(key of the batch, key of the update) of one step of a phase."""
    return jax.random.split(jax.random.fold_in(key, step))


def draw(dataset, key, spec: BatchSpec):
    """One batch (B, …): the only place where training draws one, whether on the device or on the host."""
    return datasets.sample(dataset, key, spec.size, spec.needs)


@functools.partial(jax.jit, static_argnames=('spec', 'n'))
def draw_chunk(dataset, keys, start, *, spec: BatchSpec, n: int):
    """The batches (S, n, B, …) that `train_chunk` would draw from a data set for its updates, drawn ahead of them."""

    def draw_step(key, step):
        return draw(dataset, step_keys(key, step)[0], spec)

    # One step after the other: a gather of all batches at once is no faster, and takes more memory.
    return jax.vmap(lambda key: jax.lax.map(lambda step: draw_step(key, step), start + jnp.arange(n)))(keys)


# ----------------------------------------------------------------------------------------------------------- chunks


def _update(agent, source, keys, phase, **options):
    """One update on a batch drawn from the data set `source`, or on `source` itself where that is a batch; keys (2,)
    as by `step_keys`."""
    batch_key, update_key = keys
    batch = draw(source, batch_key, batch_spec(agent)) if isinstance(source, datasets.Dataset) else source
    batch = devices.spread(batch, 'batch')
    return (agent.pretrain if phase == 'pretraining' else agent.finetune)(batch, update_key, **options)


def _pack(tree):
    """(arrays, unpack): the pytree's scalars and vectors of floats in one array and its other arrays as they are, and
    the function that makes the pytree of such arrays."""
    leaves, structure = jax.tree.flatten(tree)
    small = [x.ndim <= 1 and x.dtype == jnp.float32 for x in leaves]
    vector, unravel = ravel_pytree([x for x, is_small in zip(leaves, small, strict=True) if is_small])

    def unpack(arrays):
        vector, others = arrays
        parts, others = iter(unravel(vector)), iter(others)
        return structure.unflatten([next(parts) if is_small else next(others) for is_small in small])

    return (vector, [x for x, is_small in zip(leaves, small, strict=True) if not is_small]), unpack


def _scan(body, carry, inputs):
    """`jax.lax.scan`, with `carry` and outputs packed from step to step.

    Each vector (a bias and its two moments, a metric) would be an operation of its own in every update: on a GPU a
    kernel, which takes as long as a matrix's. Packed, all of them are one.
    """
    packed, unpack = _pack(carry)
    unpack_outputs = None

    def packed_body(packed, inputs_of_step):
        nonlocal unpack_outputs
        carry, outputs = body(unpack(packed), inputs_of_step)
        outputs, unpack_outputs = _pack(outputs)
        return _pack(carry)[0], outputs

    packed, outputs = jax.lax.scan(packed_body, packed, inputs)
    return unpack(packed), jax.vmap(unpack_outputs)(outputs)


def _scan_updates(agent, source, keys, phase, **options):
    """Updates with keys (n, 2); `source`: the data set, or their batches (n, B, …)."""
    if isinstance(source, datasets.Dataset):
        return _scan(lambda agent, keys: _update(agent, source, keys, phase, **options), agent, keys)

    def body(agent, keys_and_batch):
        keys, batch = keys_and_batch
        return _update(agent, batch, keys, phase, **options)

    return _scan(body, agent, (keys, source))


def _keys_of(key, steps):
    """The steps' keys (n, 2), all at once: in the loop each would be many tiny operations."""
    return jax.vmap(lambda step: step_keys(key, step))(steps)


def _reduce(metrics, steps):
    """Mean of each stacked metric (n,), and the first step at which it was not finite (−1 if none)."""

    def first_bad(values):
        bad = ~jnp.isfinite(values)
        return jnp.where(bad.any(), steps[jnp.argmax(bad)], -1)

    return {name: (values.mean(), first_bad(values)) for name, values in metrics.items()}


def _pretrain_chunk(agent, source, key, start, n):
    steps = start + jnp.arange(n)
    agent, metrics = _scan_updates(agent, source, _keys_of(key, steps), 'pretraining')
    return agent, _reduce(metrics, steps)


def _finetune_chunk(agent, source, key, start, n):
    """Blocks of `actor_freq` updates, the last of which trains the actor: no branch on the step, which vmap would
    execute twice."""
    freq = agent.config.actor_freq
    on_device = isinstance(source, datasets.Dataset)

    def block(agent, keys_and_batches):
        keys, batches = keys_and_batches
        first, last = (source, source) if on_device else split_last(batches)
        agent, without_actor = _scan_updates(agent, first, keys[:-1], 'finetuning', update_actor=False)
        agent, with_actor = _update(agent, last, keys[-1], 'finetuning', update_actor=True)
        # The loss of a step with the actor has a term more: metrics are those of the steps that have them.
        common = {k: jnp.append(v, with_actor[k]) for k, v in without_actor.items() if k != 'loss'}
        return agent, (common, {k: v for k, v in with_actor.items() if k not in common})

    def split_last(batches):
        return jax.tree.map(lambda x: x[:-1], batches), jax.tree.map(lambda x: x[-1], batches)

    steps = start + jnp.arange(n)
    keys = _keys_of(key, steps).reshape(-1, freq, 2)
    blocks = None if on_device else jax.tree.map(lambda x: x.reshape(-1, freq, *x.shape[1:]), source)
    agent, (common, actor) = _scan(block, agent, (keys, blocks))
    flat = {k: v.reshape(-1) for k, v in common.items()}
    return agent, {**_reduce(flat, steps), **_reduce(actor, steps[freq - 1 :: freq])}


@functools.partial(jax.jit, static_argnames=('phase', 'n'), donate_argnames='agents')
def train_chunk(agents, source, keys, start, *, phase: str, n: int):
    """`n` updates of every seed, starting after `start` updates of this phase; one compilation for each (phase, n).

    source: the `Dataset` on the device, or the updates' batches by `draw_chunk`. keys (S,): the phase's stream.
    Returns (agents, {metric: (mean (S,), first non-finite step (S,) or −1)}); `agents` is donated, and comes first and
    whole in what is returned, so that each array stays in its buffer (see `_begin_finetuning`).
    In fine-tuning, start and n are multiples of `actor_freq`.
    """
    chunk = _pretrain_chunk if phase == 'pretraining' else _finetune_chunk
    if isinstance(source, datasets.Dataset):
        outputs = over_seeds(lambda agent, key: chunk(agent, source, key, start, n), agents, keys)
    else:
        outputs = over_seeds(lambda agent, key, batches: chunk(agent, batches, key, start, n), agents, keys, source)
    agents, metrics = outputs
    return devices.spread(agents, 'seed'), devices.spread(metrics)


def trace_chunk(agents, source, keys, *, phase: str, n: int):
    """Traces `train_chunk` for these arguments; returns a function that compiles it, in any thread, to a function of
    (agents, source, keys, start)."""
    with devices.tracing(devices.mesh_of(agents)):
        lowered = train_chunk.lower(agents, source, keys, np.int32(0), phase=phase, n=n)
    return functools.partial(lowered.compile, compiler_options=processor.compiler_options(jax.default_backend()))


def compile_chunk(agents, source, keys, *, phase: str, n: int):
    """Compiles `train_chunk` ahead of time; returns (function of (agents, source, keys, start), seconds)."""
    began = time.perf_counter()
    compiled = trace_chunk(agents, source, keys, phase=phase, n=n)()
    return compiled, time.perf_counter() - began


# ------------------------------------------------------------------------------------- between the chunks, and after


@functools.partial(jax.jit, static_argnames='phase')
def validation_metrics(agents, dataset, ranges, keys, step, *, phase: str):
    """For each seed, on one batch of the validation set: the metrics of the phase's loss, as `validation/…`, and the
    signs of divergence of `utils/diagnostics.py`, as `diagnostics/…`: {metric: (S,)}. Nothing is updated.

    ranges: what the training set spans (`diagnostics.observed_ranges`).
    """

    def one_seed(agent, key):
        batch_key, loss_key = step_keys(key, step)
        loss = agent.pretraining_loss if phase == 'pretraining' else agent.finetuning_loss
        batch = draw(dataset, batch_key, batch_spec(agent))
        grads, metrics = jax.grad(loss, has_aux=True)(agent.params, batch, loss_key)
        signs = diagnostics.diagnose(agent, batch, random_keys.beside(loss_key), ranges)
        signs |= diagnostics.gradient_norms(grads)
        return {f'validation/{name}': value for name, value in metrics.items()} | {
            f'diagnostics/{name}': value for name, value in signs.items()
        }

    return devices.spread(over_seeds(one_seed, agents, keys))


def compile_validation(agents, dataset, ranges, keys, *, phase: str):
    """Compiles `validation_metrics` ahead of time; returns a function of (agents, dataset, ranges, keys, step)."""
    with devices.tracing(devices.mesh_of(agents)):
        return validation_metrics.lower(agents, dataset, ranges, keys, np.int32(0), phase=phase).compile()


@functools.partial(jax.jit, static_argnames='spec')
def _draw_labelled(dataset, keys, *, spec: BatchSpec):
    return jax.vmap(lambda key: draw(dataset, key, spec))(keys)


# Not donated: all but the targets stays as it is, and XLA would have it change places with what has its shape, which
# comes out wrong on a GPU (jax-ml/jax#39625): moments of Adam in each other's buffers.
@jax.jit
def _begin_finetuning(agents, batches, keys):
    begun = jax.vmap(lambda agent, batch, key: agent.begin_finetuning(batch, key))(agents, batches, keys)
    return devices.spread(begun, 'seed')


def labelled_batches(agents, dataset, keys, own_normalizer=False):
    """What every seed's `begin_finetuning` is given: (a labelled batch of its own, of the agent's
    `num_latent_inference_samples` or as large as any, drawn where `dataset` is; a key).

    own_normalizer: the labelled observations have other units than those of pre-training; the batch then has their
    range, as `observation_min` and `observation_max`.
    """
    batch_keys, agent_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    spec = batch_spec(agents)
    spec = spec._replace(size=agents.config.get('num_latent_inference_samples', spec.size))
    drawn = _draw_labelled(dataset, jax.device_put(batch_keys, _device_of(dataset)), spec=spec)
    if own_normalizer and (observed := datasets.observation_range(dataset)) is not None:
        lowest, highest = (jnp.broadcast_to(bound, (len(keys), *bound.shape)) for bound in observed)
        drawn |= {'observation_min': lowest, 'observation_max': highest}
    return drawn, agent_keys


def begin_finetuning(agents, dataset, keys, own_normalizer=False):
    """Every seed's `begin_finetuning`, on its `labelled_batches`."""
    inputs = labelled_batches(agents, dataset, keys, own_normalizer)
    mesh = devices.mesh_of(agents)
    with devices.tracing(mesh):
        return _begin_finetuning(agents, *devices.place(inputs, mesh, 'seed'))


def _device_of(tree):
    """The device of a pytree's arrays; NumPy arrays are on the default one."""
    array = jax.tree.leaves(tree)[0]
    return array.device if isinstance(array, jax.Array) else jax.local_devices()[0]


def acting_part(agents, observations):
    """The agents with a NumPy copy of each array that acting on observations (W, …) reads, and None for every other.

    The copy is as good as the agents for `make_policy`, and stays when their buffers are given to `train_chunk`.
    """
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_seeds(agents)))
    traced = jax.make_jaxpr(_act.__wrapped__)(agents, keys, observations).jaxpr
    read = {id(variable) for equation in traced.eqns for variable in equation.invars}
    leaves, structure = jax.tree.flatten(agents)
    copies = [devices.fetch(x) if id(v) in read else None for x, v in zip(leaves, traced.invars, strict=False)]
    return jax.tree.unflatten(structure, copies)


def make_policy(agents, normalizer, seeds):
    """A policy for evaluation, by its modes: observations (W, …) from the simulator → actions (S, W, A) of every seed,
    as NumPy."""
    # Once, not at every step: what came from a mesh is in the host's memory.
    agents, keys = jax.device_put((agents, stream_keys(seeds, 'act')), _device_of(agents))

    def policy(observations):
        return jax.device_get(_act(agents, keys, normalizer(observations)))

    return policy


@jax.jit
def _act(agents, keys, observations):
    return jax.vmap(lambda agent, key: agent.act(observations, key, 0.0))(agents, keys)  # Temperature 0: the modes.
