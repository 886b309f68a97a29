"""Small InFOM agents, batches and row arrays for the tests. Expectations and references are elsewhere; nothing here is
random without a seed."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from agents.infom import InFOMAgent, get_config
from utils.datasets import Dataset
from utils.normalizers import Normalizer

BATCH_SIZE, STATE_DIM, ACTION_DIM = 8, 5, 3

# Observed minimum and maximum of each feature: narrow, so that clipping is at work; the last feature counts as
# constant.
OBSERVED_RANGE = (
    np.array([-0.6, -0.6, -0.6, -0.6, 0.25], np.float32),
    np.array([0.9, 0.9, 0.9, 0.9, 0.25], np.float32),
)

TINY = dict(
    batch_size=BATCH_SIZE,
    intention_encoder_hidden_dims=(24, 16),
    actor_hidden_dims=(24, 16),
    value_hidden_dims=(24, 16, 16),
    reward_hidden_dims=(24, 16),
    latent_dim=4,
    num_flow_goals=6,
    discount=0.9,
)


def make_config(**overrides):
    """The agent's defaults at the size of the tests; `overrides` win."""
    config = get_config()
    config.update({**TINY, **overrides})
    return config


def make_batch(seed=0, reward_at='observations', size=BATCH_SIZE):
    """A labelled batch of random states and actions."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    batch = {
        'observations': normal(size, STATE_DIM),
        'actions': np.clip(normal(size, ACTION_DIM), -0.99, 0.99),
        'next_observations': normal(size, STATE_DIM),
        'next_actions': np.clip(normal(size, ACTION_DIM), -0.99, 0.99),
        'rewards': normal(size),
        'masks': np.ones(size, np.float32),
    }
    batch['reward_observations'] = batch[reward_at]
    return jax.tree.map(jnp.asarray, batch)


def make_image_batch(seed=0, size=4, height=16, channels=3):
    """A labelled batch of random uint8 images."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (2, size, height, height, channels), dtype=np.uint8)
    batch = make_batch(seed, size=size)
    batch.update(observations=jnp.asarray(images[0]), next_observations=jnp.asarray(images[1]))
    batch['reward_observations'] = batch['observations']
    return batch


def make_agent(batch, seed=0, **overrides):
    """A fresh agent whose parameters, biases and norms included, are all off their initial values, and whose targets
    differ from them."""
    example, config = dict(batch), make_config(**overrides)
    if batch['observations'].ndim == 2:
        example['observation_min'], example['observation_max'] = OBSERVED_RANGE
    agent = jax.jit(lambda key: InFOMAgent.create(key, example, config))(jax.random.key(seed))
    return off_initial(agent)


def off_initial(agent):
    """The agent with noise on parameters and targets; the actor that acts is a copy of the trained one."""
    params, targets = perturb(agent.params, 1, 0.1), perturb(agent.target_params, 2, 0.1)
    acting = {'acting_actor': jax.tree.map(jnp.copy, params['actor'])}
    return agent.replace(params=params, target_params=targets, opt_states=agent.opt_states | acting)


def with_config(agent, **overrides):
    """The same agent under another configuration; only values that change no parameter."""
    return agent.replace(config=ml_collections.FrozenConfigDict({**agent.config.to_dict(), **overrides}))


@functools.cache
def compiled(method, **options):
    """A method of the agent as a compiled function of (agent, …), shared by the tests: compiling takes longest.

    The agent is an argument, not a constant of the program, which XLA would spend its time on folding.
    """
    return jax.jit(functools.partial(getattr(InFOMAgent, method), **options))


def perturb(tree, seed, scale):
    """Every array plus `scale` times standard normal noise."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([leaf + scale * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def dot(tree, other):
    """Inner product of two trees in float64."""
    products = jax.tree.map(lambda x, y: np.vdot(np.float64(x), np.float64(y)), tree, other)
    return sum(jax.tree.leaves(products))


def random_walks(num_episodes=20, num_transitions=15, seed=0, labelled=False):
    """Row arrays, as `envs.data.load_raw` gives them, of noisy walks in the unit box."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (num_episodes, num_transitions + 1, ACTION_DIM)).astype(np.float32)
    observations = np.zeros((num_episodes, num_transitions + 1, STATE_DIM), np.float32)
    for t in range(num_transitions):
        push = np.pad(0.3 * actions[:, t], ((0, 0), (0, STATE_DIM - ACTION_DIM)))
        noise = 0.1 * rng.normal(size=push.shape)
        observations[:, t + 1] = np.clip(observations[:, t] + push + noise, -1, 1)
    terminals = np.zeros((num_episodes, num_transitions + 1), bool)
    terminals[:, -1] = True
    raw = {
        'observations': observations.reshape(-1, STATE_DIM),
        'actions': actions.reshape(-1, ACTION_DIM),
        'terminals': terminals.reshape(-1),
    }
    if labelled:
        raw['rewards'] = raw['observations'][:, 0] - 1
        raw['masks'] = np.ones(len(raw['rewards']), np.float32)
    return raw


def make_dataset(raw, normalizer=None, **options):
    """A `Dataset` of the rows, on the device."""
    return jax.tree.map(jnp.asarray, Dataset.create(raw, normalizer or Normalizer('none'), **options))
