"""Small InFOM agents, batches and row arrays for the tests. Expectations and references are elsewhere; nothing here is random without a seed."""

import jax
import jax.numpy as jnp
import numpy as np

from agents.infom import InFOMAgent, get_config
from utils.datasets import Dataset
from utils.normalizers import Normalizer

BATCH_SIZE, STATE_DIM, ACTION_DIM = 8, 5, 3

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
    """A fresh agent whose parameters, biases and norms included, are all off their initial values, and whose targets differ from them.

    Flow samples are clipped to a narrow range, so that clipping is at work; the last feature counts as constant.
    """
    example = dict(batch)
    if batch['observations'].ndim == 2:
        varies = jnp.arange(STATE_DIM) < STATE_DIM - 1
        example['observation_min'] = jnp.where(varies, -0.6, 0.25)
        example['observation_max'] = jnp.where(varies, 0.9, 0.25)
    config = make_config(**overrides)
    agent = jax.jit(lambda key: InFOMAgent.create(key, example, config))(jax.random.key(seed))
    return agent.replace(params=perturb(agent.params, 1, 0.1), target_params=perturb(agent.target_params, 2, 0.1))


def perturb(tree, seed, scale):
    """Every array plus `scale` times standard normal noise."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([leaf + scale * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


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
