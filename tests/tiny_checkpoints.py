"""A small state, and checkpoints of it."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from utils.checkpoints import CheckpointWriter

META = {'phase': 'pretraining', 'env_name': 'some-task', 'normalizer': {'mean': [0.1, -2.5]}, 'metrics_lines': 7}


class State(flax.struct.PyTreeNode):
    params: dict
    optimizer: tuple
    step: jax.Array
    name: str = flax.struct.field(pytree_node=False)


def make_state(scale=1.0):
    params = {'actor': {'kernel': scale * jnp.arange(1200.0).reshape(30, 40), 'bias': jnp.full(40, scale)}}
    return State(params=params, optimizer=(optax.adam(1e-3).init(params), ()), step=jnp.int32(17), name='state')


def save_one(directory, state, step=40, meta=META, keep=False):
    with CheckpointWriter(directory) as writer:
        writer.save(step, state, meta, keep)
    return directory / str(step)


def names(directory):
    return sorted(path.name for path in directory.iterdir())
