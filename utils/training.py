"""The compiled half of the training loop: chunks of updates as pure functions of (agents, data, keys, step).

`agents` is one agent whose arrays have a leading seed axis; every function here is vmapped over it. Deciding when to
log, evaluate or save, and everything that touches files, is `utils/experiment.py`.
"""

import functools
import time

import jax
import jax.numpy as jnp

from utils import datasets

# Streams of randomness; a seed's key of phase p at step t is fold_in(fold_in(key(seed), p), t), so a resumed run needs
# only the step.
STREAMS = {'create': 0, 'pretraining': 1, 'finetuning': 2, 'begin_finetuning': 3, 'validation': 4, 'act': 5}


def stream_keys(seeds, stream: str):
    """Keys (S,) of the named stream, one for each seed."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), STREAMS[stream]))(jnp.asarray(seeds))


def create_agents(agent_class, seeds, example_batch, config):
    """Fresh agents, vmapped over `seeds`: every array gains a leading axis (S, …)."""
    create = jax.jit(jax.vmap(lambda key: agent_class.create(key, example_batch, config)))
    return create(stream_keys(seeds, 'create'))


def num_seeds(agents) -> int:
    return jax.tree.leaves(agents)[0].shape[0]


def over_seeds(function, agents, keys):
    """`function(agent, key)` for every seed: vmapped, or for a single seed called without the seed axis.

    A leading axis of 1 is not free: on CPUs XLA's column sums and optimiser arithmetic take three to six times as long
    on (1, H, H) as on (H, H).
    """
    if num_seeds(agents) > 1:
        return jax.vmap(function)(agents, keys)
    outputs = function(jax.tree.map(lambda x: x[0], agents), keys[0])
    return jax.tree.map(lambda x: x[None], outputs)


def _update(agent, dataset, key, step, phase, **options):
    batch_key, update_key = jax.random.split(jax.random.fold_in(key, step))
    batch = datasets.sample(dataset, batch_key, agent.config.batch_size, agent.needs)
    return (agent.pretrain if phase == 'pretraining' else agent.finetune)(batch, update_key, **options)


def _scan_updates(agent, dataset, key, steps, phase, **options):
    def body(agent, step):
        return _update(agent, dataset, key, step, phase, **options)

    return jax.lax.scan(body, agent, steps)


def _reduce(metrics, steps):
    """Mean of each stacked metric (n,), and the first step at which it was not finite (−1 if none)."""

    def first_bad(values):
        bad = ~jnp.isfinite(values)
        return jnp.where(bad.any(), steps[jnp.argmax(bad)], -1)

    return {name: (values.mean(), first_bad(values)) for name, values in metrics.items()}


def _pretrain_chunk(agent, dataset, key, start, n):
    steps = start + jnp.arange(n)
    agent, metrics = _scan_updates(agent, dataset, key, steps, 'pretraining')
    return agent, _reduce(metrics, steps)


def _finetune_chunk(agent, dataset, key, start, n):
    """Blocks of `actor_freq` updates, the last of which trains the actor: no branch on the step, which vmap would
    execute twice."""
    freq = agent.config.actor_freq

    def block(agent, steps):
        agent, without_actor = _scan_updates(agent, dataset, key, steps[:-1], 'finetuning', update_actor=False)
        agent, with_actor = _update(agent, dataset, key, steps[-1], 'finetuning', update_actor=True)
        # The loss of a step with the actor has a term more: metrics are those of the steps that have them.
        common = {k: jnp.append(v, with_actor[k]) for k, v in without_actor.items() if k != 'loss'}
        return agent, (common, {k: v for k, v in with_actor.items() if k not in common})

    steps = start + jnp.arange(n).reshape(-1, freq)
    agent, (common, actor) = jax.lax.scan(block, agent, steps)
    flat = {k: v.reshape(-1) for k, v in common.items()}
    return agent, {**_reduce(flat, steps.reshape(-1)), **_reduce(actor, steps[:, -1])}


@functools.partial(jax.jit, static_argnames=('phase', 'n'), donate_argnames='agents')
def train_chunk(agents, dataset, keys, start, *, phase: str, n: int):
    """`n` updates of every seed, starting after `start` updates of this phase; one compilation for each (phase, n).

    keys (S,): the phase's stream. Returns (agents, {metric: (mean (S,), first non-finite step (S,) or −1)}); `agents`
    is donated.
    In fine-tuning, start and n are multiples of `actor_freq`.
    """
    chunk = _pretrain_chunk if phase == 'pretraining' else _finetune_chunk
    return over_seeds(lambda agent, key: chunk(agent, dataset, key, start, n), agents, keys)


def compile_chunk(agents, dataset, keys, *, phase: str, n: int):
    """Compiles `train_chunk` ahead of time; returns (function of (agents, dataset, keys, start), seconds)."""
    began = time.perf_counter()
    compiled = train_chunk.lower(agents, dataset, keys, jnp.int32(0), phase=phase, n=n).compile()
    return compiled, time.perf_counter() - began


@functools.partial(jax.jit, static_argnames='phase')
def validation_metrics(agents, dataset, keys, step, *, phase: str):
    """Metrics of the phase's loss on one validation batch for each seed: {metric: (S,)}; nothing is updated."""

    def one_seed(agent, key):
        batch_key, loss_key = jax.random.split(jax.random.fold_in(key, step))
        batch = datasets.sample(dataset, batch_key, agent.config.batch_size, agent.needs)
        loss = agent.pretraining_loss if phase == 'pretraining' else agent.finetuning_loss
        return loss(agent.params, batch, loss_key)[1]

    return jax.vmap(one_seed)(agents, keys)


@functools.partial(jax.jit, donate_argnames='agents')
def begin_finetuning(agents, dataset, keys):
    """Every seed's `begin_finetuning` on a labelled batch of its own (the agent's `num_latent_inference_samples`, or
    one batch)."""

    def one_seed(agent, key):
        batch_key, agent_key = jax.random.split(key)
        size = agent.config.get('num_latent_inference_samples', agent.config.batch_size)
        return agent.begin_finetuning(datasets.sample(dataset, batch_key, size, agent.needs), agent_key)

    return jax.vmap(one_seed)(agents, keys)


def make_policy(agents, normalizer, seeds, temperature: float = 0.0):
    """A policy for evaluation: observations (W, …) from the simulator → actions (S, W, A) of every seed, as NumPy.

    At temperature 0 the actions are modes and the key plays no part.
    """
    keys = stream_keys(seeds, 'act')

    def policy(observations):
        return jax.device_get(_act(agents, keys, normalizer(observations), temperature))

    return policy


@jax.jit
def _act(agents, keys, observations, temperature):
    return jax.vmap(lambda agent, key: agent.act(observations, key, temperature))(agents, keys)
