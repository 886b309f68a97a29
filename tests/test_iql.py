"""IQL's losses, and their gradients, against float64 NumPy. What holds for every agent is in `test_agents.py`, what IQL
learns in `test_baseline_learning.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents import common
from tests import infom_reference as reference
from tests import loss_checks, tiny, tiny_agents

KEY = jax.random.key(7)
# Two configurations that differ in every switch that a loss depends on.
VARIANTS = {
    'awr': dict(alpha=3.0),
    'ddpgbc': dict(
        actor_loss='ddpgbc',
        alpha=0.3,
        expectile=0.7,
        value_layer_norm=False,
        actor_layer_norm=True,
        const_std=False,
    ),
}


@functools.cache
def make_case(name):
    """(agent, batch): some transitions end their episode, and some of the policy's modes are beyond ±1."""
    batch = tiny_agents.make_batch()
    batch['masks'] = batch['masks'].at[::3].set(0.0)
    return tiny_agents.bold(tiny_agents.make_agent('iql', batch, **VARIANTS[name])), batch


def values(params, config, s):
    return reference.mlp(params['MLP_0'], s, len(config.value_hidden_dims), config.value_layer_norm)[:, 0]


def make_reference(agent, batch):
    """IQL's losses as a function of the parameters that are not behind a stop-gradient."""
    config, batch = agent.config, reference.float64(batch)
    frozen, target = reference.float64(agent.params), reference.float64(agent.target_params)
    s, a, next_s = batch['observations'], batch['actions'], batch['next_observations']

    def actor_loss(params):
        means, stds = reference.actor(params['actor'], config, s)
        cloning = -reference.log_normal(a, means, stds)
        if config.actor_loss == 'awr':
            advantages = reference.critics(frozen['critic'], config, s, a).min(0) - values(frozen['value'], config, s)
            return (np.minimum(np.exp(config.alpha * advantages), 100) * cloning).mean()
        q = reference.critics(frozen['critic'], config, s, np.clip(means, -1, 1)).min(0)
        mode = np.clip(reference.actor(frozen['actor'], config, s)[0], -1, 1)
        scale = np.abs(reference.critics(frozen['critic'], config, s, mode).min(0)).mean()
        return -q.mean() / scale + config.alpha * cloning.mean()

    def losses(params):
        u = reference.critics(target['critic'], config, s, a).min(0) - values(params['value'], config, s)
        value_loss = (np.where(u < 0, 1 - config.expectile, config.expectile) * u**2).mean()
        y = batch['rewards'] + config.discount * batch['masks'] * values(frozen['value'], config, next_s)
        critic_loss = ((reference.critics(params['critic'], config, s, a) - y) ** 2).sum(0).mean()
        cloning = reference.cloning_loss(params, config, batch)
        modes = np.clip(reference.actor(params['actor'], config, s)[0], -1, 1)
        both = {'value_loss': value_loss, 'critic_loss': critic_loss}
        actor = actor_loss(params)
        return {
            'pretraining': {'loss': cloning, 'bc_loss': cloning, 'actor_mse': ((modes - a) ** 2).mean()},
            'finetuning': {'loss': value_loss + critic_loss, **both},
            'finetuning_with_actor': {'loss': value_loss + critic_loss + actor, 'actor_loss': actor, **both},
        }

    return losses


@pytest.mark.parametrize('name', VARIANTS)
def test_losses(name):
    agent, batch = make_case(name)
    loss_checks.assert_losses_match(agent, batch, KEY, make_reference(agent, batch))


@pytest.mark.parametrize('name', VARIANTS)
def test_gradients(name):
    agent, batch = make_case(name)
    loss_checks.assert_gradients_match(agent, batch, KEY, make_reference(agent, batch))


def test_weights_of_awr_are_bounded_without_overflow():
    """exp(α·A) of an enormous advantage is 100, in the loss as in its gradient."""
    qs, actions = jnp.array([[1e6, 0.0], [2e6, 1.0]]), jnp.zeros((2, tiny.ACTION_DIM))

    def loss(means):
        return common.advantage_weighted_regression(qs, jnp.zeros(2), means, jnp.ones_like(means), actions, alpha=1.0)

    (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.ones_like(actions))
    np.testing.assert_allclose(metrics['awr_weight'], (100 + 1) / 2, rtol=1e-5)
    np.testing.assert_allclose(gradient, [[50.0] * tiny.ACTION_DIM, [0.5] * tiny.ACTION_DIM], rtol=1e-5)
