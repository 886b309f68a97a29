"""ReBRAC's losses, and their gradients, against float64 NumPy, and its squashed policy. What holds for every agent is
in `test_agents.py`, what ReBRAC learns in `test_baseline_learning.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import loss_checks, rebrac_reference, tiny, tiny_agents
from tests.infom_reference import float64
from utils.datasets import ACTION_LIMIT
from utils.networks import tanh_gaussian_log_prob

KEY = jax.random.key(7)
# Two configurations that differ in every switch that a loss depends on.
VARIANTS = {
    'defaults': dict(),
    'switched': dict(
        tanh_squash=False,
        normalize_q_loss=False,
        alpha_actor=0.7,
        alpha_critic=1.3,
        actor_noise=0.5,
        actor_noise_clip=0.3,
        value_layer_norm=False,
        actor_layer_norm=True,
        const_std=False,
    ),
}


@functools.cache
def make_case(name):
    """(agent, batch): some transitions end their episode."""
    batch = tiny_agents.make_batch()
    batch['masks'] = batch['masks'].at[::3].set(0.0)
    return tiny_agents.make_agent('rebrac', batch, **VARIANTS[name]), batch


def make_reference(agent, batch):
    noise = np.float64(jax.random.normal(KEY, batch['actions'].shape))
    frozen, target, batch = float64(agent.params), float64(agent.target_params), float64(batch)
    return lambda params: rebrac_reference.losses(params, frozen, target, agent.config, batch, noise)


@pytest.mark.parametrize('name', VARIANTS)
def test_losses(name):
    agent, batch = make_case(name)
    loss_checks.assert_losses_match(agent, batch, KEY, make_reference(agent, batch))


@pytest.mark.parametrize('name', VARIANTS)
def test_gradients(name):
    agent, batch = make_case(name)
    loss_checks.assert_gradients_match(agent, batch, KEY, make_reference(agent, batch))


def test_noise_is_clipped_at_work():
    """Otherwise the clip would go untested above."""
    noise = 0.5 * np.abs(jax.random.normal(KEY, (tiny.BATCH_SIZE, tiny.ACTION_DIM)))
    assert 0.1 < (noise > 0.3).mean() < 0.9


def test_the_squashed_density_integrates_to_one():
    edges = np.tanh(np.linspace(-6, 6, 20_001))
    actions = np.float32((edges[1:] + edges[:-1]) / 2)[:, None]
    for mean, std in ((0.0, 1.0), (1.2, 0.5), (-0.5, 1.5)):
        density = jnp.exp(tanh_gaussian_log_prob(jnp.full((1, 1), mean), jnp.full((1, 1), std), actions))
        np.testing.assert_allclose((np.float64(density) * np.diff(edges)).sum(), 1, atol=2e-3)


def test_the_squashed_density_is_exact_at_the_limit_of_the_data():
    """In float32, at actions one part in 100,000 away from ±1, with the gradient that cloning follows."""
    action = np.array([ACTION_LIMIT, -ACTION_LIMIT, 0.0], np.float32)
    means, stds = np.full(3, 0.3, np.float32), np.full(3, 0.8, np.float32)
    a = np.float64(action)
    u = np.arctanh(a)
    expected = -0.5 * ((u - 0.3) / 0.8) ** 2 - np.log(0.8 * np.sqrt(2 * np.pi)) - np.log1p(-(a**2))
    np.testing.assert_allclose(tanh_gaussian_log_prob(means, stds, action), expected.sum(), rtol=1e-5)
    gradient = jax.grad(tanh_gaussian_log_prob)(means, stds, action)
    np.testing.assert_allclose(gradient, (u - 0.3) / 0.8**2, rtol=1e-4)


@pytest.mark.parametrize('name', VARIANTS)
def test_actions(name):
    agent, batch = make_case(name)
    means, stds = agent.networks.actor.apply({'params': agent.params['actor']}, batch['observations'])
    noisy = means + 0.5 * stds * jax.random.normal(KEY, means.shape)
    squash = jnp.tanh if agent.config.tanh_squash else lambda x: jnp.clip(x, -1, 1)
    act = jax.jit(lambda agent, temperature: agent.act(batch['observations'], KEY, temperature))
    np.testing.assert_allclose(act(agent, 0.0), squash(means), atol=1e-6)
    np.testing.assert_allclose(act(agent, 0.5), squash(noisy), atol=1e-6)
