"""FB + IQL: losses and gradients against float64 NumPy, the task's latent, and three tasks of a ring solved without a
further update."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agents
from agents.fb_iql import FBIQLAgent
from tests import baseline_reference as reference
from tests import rings, tiny, tiny_agents
from tests.learning import train
from utils import datasets, training

KEY = jax.random.key(7)


@functools.cache
def make_case(**overrides):
    batch = tiny_agents.make_batch()
    batch['masks'] = batch['masks'].at[:3].set(0.0)
    return tiny_agents.bold(tiny_agents.make_agent('fb_iql', batch, **overrides)), batch


def draws(agent):
    """The random numbers of `sample_latents`, by the same key splits."""
    normal, permutation, uniform = jax.random.split(KEY, 3)
    return reference.float64(
        dict(
            normal=jax.random.normal(normal, (tiny.BATCH_SIZE, agent.config.latent_dim)),
            permutation=jax.random.permutation(permutation, tiny.BATCH_SIZE),
            uniform=jax.random.uniform(uniform, (tiny.BATCH_SIZE, 1)),
        )
    )


@pytest.mark.parametrize(
    'overrides', [dict(), dict(repr_agg='min', orthonorm_coeff=0.3, latent_mix_prob=0.3, alpha_repr=0.1, alpha_awr=0.5)]
)
def test_losses_and_gradients(overrides):
    agent, batch = make_case(**overrides)
    config, target, batch64 = agent.config, reference.float64(agent.target_params), reference.float64(batch)
    latents = np.tile(np.float64(agent.task_latent), (tiny.BATCH_SIZE, 1))
    np.testing.assert_allclose(np.linalg.norm(latents, axis=1), np.sqrt(config.latent_dim), rtol=1e-5)
    random = draws(agent)
    assert 0 < (random['uniform'] < config.latent_mix_prob).mean() < 1, 'both kinds of latents are in the batch'

    def losses(params, frozen):
        def iql(with_actor):
            return reference.iql(
                params, frozen, target, config, batch64, latents, batch64['rewards'], batch64['masks'],
                config.alpha_awr, with_actor,
            )  # fmt: skip

        pretraining = reference.fb_pretraining(params, frozen, target, config, batch64, random)
        return {'pretraining': pretraining, 'finetuning': iql(False), 'finetuning_with_actor': iql(True)}

    reference.check_losses_and_gradients(agent, batch, KEY, losses)


# ---------------------------------------------------------------------------------------------------- the task's latent


@functools.partial(jax.jit, static_argnames='n')
def begin(agent, batch, key, n=3):
    """`begin_finetuning` on three keys, vmapped as the training loop does."""
    return jax.vmap(lambda key: agent.begin_finetuning(batch, key))(jax.random.split(key, n)).task_latent


def test_the_latent_is_the_mean_of_rewards_times_b():
    agent, batch = make_case()
    batch = {**batch, 'reward_observations': batch['next_observations']}
    params, batch64 = reference.float64(agent.params), reference.float64(batch)
    backwards = reference.backward(params, agent.config, batch64['next_observations'])
    direction = (batch64['rewards'][:, None] * backwards).mean(0)
    expected = np.sqrt(agent.config.latent_dim) * direction / np.linalg.norm(direction)
    for scale in (1.0, 1e-12, 1e12):
        latents = begin(agent, {**batch, 'rewards': scale * batch['rewards']}, KEY)
        np.testing.assert_allclose(latents, np.tile(expected, (3, 1)), rtol=1e-4, atol=1e-5)


def test_rewards_of_zero_give_a_random_direction_and_a_warning(caplog):
    agent, batch = make_case()
    with caplog.at_level(logging.WARNING):
        begin(agent, batch, KEY)
        jax.effects_barrier()
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        latents = begin(agent, {**batch, 'rewards': jnp.zeros_like(batch['rewards'])}, KEY)
        jax.effects_barrier()
    np.testing.assert_allclose(np.linalg.norm(latents, axis=1), np.sqrt(agent.config.latent_dim), rtol=1e-5)
    assert np.abs(latents[0] - latents[1]).max() > 0.1
    assert [record.levelname for record in caplog.records] == ['WARNING'], 'one, for labels that all seeds share'
    assert 'random direction' in caplog.text


def test_the_policy_acts_at_the_latent_of_the_task():
    agent, batch = make_case()
    act = jax.jit(lambda agent: agent.act(batch['observations'], KEY, 0.0))
    other = agent.replace(task_latent=-agent.task_latent)
    expected = reference.mode(
        reference.float64(agent.params), agent.config, np.float64(batch['observations']),
        np.tile(np.float64(agent.task_latent), (tiny.BATCH_SIZE, 1)),
    )  # fmt: skip
    np.testing.assert_allclose(act(agent), expected, atol=1e-5)
    assert np.abs(act(agent) - act(other)).max() > 1e-3


# ----------------------------------------------------------------------------------------------------------- learning

NUM_STATES = 7


@pytest.mark.slow
def test_the_inferred_latent_solves_a_ring_for_three_rewards():
    """After pre-training without any reward, and nothing but the latent's inference, the policy takes the shorter way
    to each of three states from everywhere."""
    raw, states = rings.random_walk(NUM_STATES)
    dataset = tiny.make_dataset(raw)
    config = tiny_agents.make_config(
        'fb_iql', discount=0.8, lr=1e-3, tau=0.02, batch_size=128, latent_dim=8, repr_hidden_dims=(64, 64),
        actor_hidden_dims=(64, 64), alpha_repr=0.1, num_latent_inference_samples=2000,
    )  # fmt: skip
    fresh = training.create_agents(FBIQLAgent, [0], datasets.example_batch(dataset), config)
    trained = jax.tree.map(lambda x: x[0], train(fresh, [0], dataset, 'pretraining', 3000))

    @jax.jit
    def modes(agent, labelled):
        batch = datasets.sample(labelled, KEY, config.num_latent_inference_samples)
        agent = agent.begin_finetuning(batch, KEY)
        return agent.act(jnp.asarray(rings.observations_of(np.arange(NUM_STATES), NUM_STATES)), KEY, 0.0)

    for goal in (0, 2, 5):
        actions = np.asarray(modes(trained, tiny.make_dataset(rings.labelled(raw, states == goal))))[:, 0]
        ahead = (goal - np.arange(NUM_STATES)) % NUM_STATES
        elsewhere = ahead > 0
        np.testing.assert_array_equal(actions[elsewhere] > 0, (ahead <= NUM_STATES // 2)[elsewhere], str(actions))


def test_the_alias_loads_it():
    assert agents.load('fb_repr').AGENT is FBIQLAgent
