"""HILP + IQL: losses and gradients against float64 NumPy, the task's latent, and the distances that it learns on a
ring."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agents
from agents.hilp_iql import HILPIQLAgent
from tests import baseline_reference as reference
from tests import rings, tiny, tiny_agents
from tests.learning import train
from utils import datasets, training

KEY = jax.random.key(7)


@functools.cache
def make_case(**overrides):
    batch = tiny_agents.make_batch()
    batch['masks'] = batch['masks'].at[:3].set(0.0)
    return tiny_agents.make_agent('hilp_iql', batch, **overrides), batch


def test_losses_and_gradients():
    """With a goal that is its row's own state among the batch's: the distance's root has no derivative there."""
    agent, batch = make_case(alpha=0.5)
    assert (batch['goals'][0] == batch['observations'][0]).all() and batch['goal_masks'][0] == 0
    config, target, batch64 = agent.config, reference.float64(agent.target_params), reference.float64(batch)
    task_latents = np.tile(np.float64(agent.task_latent), (tiny.BATCH_SIZE, 1))
    skills = reference.to_sphere(np.float64(jax.random.normal(KEY, (tiny.BATCH_SIZE, config.latent_dim))))

    def losses(params, frozen):
        def iql(latents, rewards, masks, with_actor):
            arguments = (params, frozen, target, config, batch64, latents, rewards, masks, config.alpha, with_actor)
            return reference.iql(*arguments)

        skill_rewards = (reference.displacements(frozen, config, batch64) * skills).sum(1)
        pretraining = reference.hilp_representation(params, target, config, batch64)
        pretraining += iql(skills, skill_rewards, np.ones(tiny.BATCH_SIZE), True)
        task = (task_latents, batch64['rewards'], batch64['masks'])
        return {
            'pretraining': pretraining,
            'finetuning': iql(*task, False),
            'finetuning_with_actor': iql(*task, True),
        }

    reference.check_losses_and_gradients(agent, batch, KEY, losses)


# --------------------------------------------------------------------------------------------------- the task's latent


@jax.jit
def begin(agent, batch, key):
    """`begin_finetuning` on three keys, vmapped as the training loop does."""
    return jax.vmap(lambda key: agent.begin_finetuning(batch, key))(jax.random.split(key, 3)).task_latent


def test_the_latent_is_the_least_squares_solution(caplog):
    agent, batch = make_case(alpha=0.5)
    agent = agent.replace(
        params={**agent.params, 'representation': jax.tree.map(lambda x: 3 * x, agent.params['representation'])}
    )
    features = reference.displacements(reference.float64(agent.params), agent.config, reference.float64(batch))
    assert np.linalg.cond(features) < 1e3
    solution = np.linalg.lstsq(features, np.float64(batch['rewards']))[0]
    expected = np.sqrt(agent.config.latent_dim) * solution / np.linalg.norm(solution)
    with caplog.at_level(logging.WARNING):
        latents = begin(agent, batch, KEY)
        jax.effects_barrier()
        assert not caplog.records
        np.testing.assert_allclose(latents, np.tile(expected, (3, 1)), rtol=2e-3, atol=2e-3)

        random = begin(agent, {**batch, 'rewards': jnp.zeros_like(batch['rewards'])}, KEY)
        still = begin(agent, {**batch, 'next_observations': batch['observations']}, KEY)
        jax.effects_barrier()
    for latents in (random, still):
        np.testing.assert_allclose(np.linalg.norm(latents, axis=1), np.sqrt(agent.config.latent_dim), rtol=1e-5)
        assert np.abs(latents[0] - latents[1]).max() > 0.1
    assert len(caplog.records) == 2, 'one for each call: the seeds share their labels'


# ----------------------------------------------------------------------------------------------------------- learning

NUM_STATES, DISCOUNT = 9, 0.9


@pytest.mark.slow
def test_distances_are_monotone_in_the_steps_between_states():
    """‖φ(s) − φ(g)‖ grows with the shortest way, for every state, and one step is about 1."""
    raw, _ = rings.random_walk(NUM_STATES)
    dataset = tiny.make_dataset(raw)
    config = tiny_agents.make_config(
        'hilp_iql', discount=DISCOUNT, lr=1e-3, tau=0.02, batch_size=128, latent_dim=16, value_hidden_dims=(64, 64)
    )
    fresh = training.create_agents(HILPIQLAgent, [0], datasets.example_batch(dataset), config)
    agent = jax.tree.map(lambda x: x[0], train(fresh, [0], dataset, 'pretraining', 2500))
    states = jnp.asarray(rings.observations_of(np.arange(NUM_STATES), NUM_STATES))
    representations = np.asarray(agent.represent(agent.params, states))
    steps = rings.distances(NUM_STATES)
    for phi in representations:
        learnt = np.linalg.norm(phi[:, None] - phi, axis=-1)
        by_steps = np.stack([[row[way == k].mean() for k in range(5)] for row, way in zip(learnt, steps, strict=True)])
        assert (np.diff(by_steps, axis=1) > 0.1).all(), np.round(by_steps, 2)
        assert abs(by_steps[:, 1].mean() - 1) < 0.3, np.round(by_steps[:, 1], 2)


def test_the_alias_loads_it():
    assert agents.load('hilp').AGENT is HILPIQLAgent
