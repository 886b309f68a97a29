"""Any agent by its name, at the size of the tests, with the batches of `tests/tiny.py`. Expectations are elsewhere."""

import functools

import jax
import jax.numpy as jnp
import ml_collections

import agents
from tests import tiny

# Taken by the agents that have these settings; every `…hidden_dims` is WIDTHS.
WIDTHS = (16,)  # One hidden layer compiles fastest; deeper networks are `test_networks.py`'s.
TINY = dict(
    batch_size=tiny.BATCH_SIZE,
    discount=0.9,
    actor_freq=2,
    actor_tau=0.1,  # An average as short as the tests.
    latent_dim=4,
    num_flow_goals=2,
    num_flow_steps=2,
    num_latent_inference_samples=16,
    num_model_rollouts=6,
    model_buffer_batches=3,
)
IMAGES = dict(encoder='impala_debug', clip_flow_goals=False)
WITHOUT_TARGETS = {'crl_infonce'}  # Agents that have no target networks.


def make_config(name, images=False, **overrides):
    """The agent's defaults at the size of the tests; `overrides` win."""
    config = agents.load(name).get_config()
    sizes = {key: WIDTHS for key in config if key.endswith('hidden_dims')}
    sizes |= {key: value for key, value in {**TINY, **(IMAGES if images else {})}.items() if key in config}
    config.update({**sizes, **overrides})
    return config


def make_batch(images=False, labelled=True, **options):
    """A random batch with all that any agent needs; one of pre-training holds nothing of the reward."""
    batch = tiny.make_image_batch(**options) if images else tiny.make_batch(**options)
    # Goals: other rows' next states, and for the first row's goal its own state.
    others = batch['next_observations']
    batch['goals'] = jnp.roll(others, 3, axis=0).at[0].set(batch['observations'][0])
    batch['goal_masks'] = jnp.ones(len(others)).at[0].set(0.0)
    batch['actor_goals'] = jnp.roll(others, 1, axis=0)
    batch['actor_goal_masks'] = jnp.ones(len(others))
    if not labelled:
        batch = {name: value for name, value in batch.items() if not name.startswith('reward')}
    return batch


def make_agent(name, batch, images=False, seed=0, **overrides):
    """A fresh agent whose parameters, biases and norms included, are all off their initial values, and whose targets
    differ from them."""
    example, config = dict(batch), make_config(name, images, **overrides)
    if not images:
        example['observation_min'], example['observation_max'] = tiny.OBSERVED_RANGE
    agent = jax.jit(lambda key: agents.load(name).AGENT.create(key, example, config))(jax.random.key(seed))
    return tiny.off_initial(agent)


def bold(agent):
    """The agent with an actor whose modes are in part beyond [−1, 1], where losses clip them."""
    actor = {**agent.params['actor'], 'mean': jax.tree.map(lambda x: 8 * x, agent.params['actor']['mean'])}
    acting = {'acting_actor': jax.tree.map(jnp.copy, actor)}
    return agent.replace(params=agent.params | {'actor': actor}, opt_states=agent.opt_states | acting)


def with_config(agent, **overrides):
    """The same agent under another configuration; only values that change no parameter."""
    return agent.replace(config=ml_collections.FrozenConfigDict({**agent.config.to_dict(), **overrides}))


@functools.cache
def compiled(function, **options):
    """A function of an agent as a compiled one, shared by the tests: compiling takes longest."""
    return jax.jit(functools.partial(function, **options))
