"""Training until something is learnt: thousands of updates, which want an optimised program."""

import jax.numpy as jnp

from utils import training


def train(agents, seeds, dataset, phase, num_updates):
    """The agents of `seeds` after the first `num_updates` updates of a phase; fails where a loss is not finite."""
    keys = training.stream_keys(seeds, phase)
    lowered = training.train_chunk.lower(agents, dataset, keys, jnp.int32(0), phase=phase, n=num_updates)
    # The other tests' programs run for a moment and are compiled in a hurry (conftest.py). Of these, InFOM's ran for
    # most of two minutes without LLVM's first level of optimisation; the smaller ones lose nothing by it.
    update = lowered.compile({'xla_backend_optimization_level': 1})
    agents, metrics = update(agents, dataset, keys, jnp.int32(0))
    assert all((first < 0).all() for _, first in metrics.values()), 'losses stay finite'
    return agents
