"""Signs of a run that goes wrong before its score does, on a validation batch at every log line.

In long fine-tuning an occupancy model may diverge off the training rows, and Q and the policy with it, while the
training losses look as ever. What is measured here shows that: flow samples outside the observed states, rewards that
no row has, values that no policy can have, actions that leave the data, gradients that grow. Pure functions; an agent
gets those that it has the networks for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from utils import datasets, occupancy
from utils.values import value_range


class Ranges(NamedTuple):
    """What the training rows span: `observations` (lower, upper), each (S,), None for images; `rewards` (lowest,
    highest), None without labels."""

    observations: tuple[jax.Array, jax.Array] | None
    rewards: tuple[jax.Array, jax.Array] | None


def observed_ranges(dataset) -> Ranges:
    """The `Ranges` of a `datasets.Dataset`; the rewards of rows that end an episode belong to no transition."""
    rewards = None
    if dataset.rewards is not None:
        labels = dataset.rewards[dataset.transition_rows]
        rewards = labels.min(), labels.max()
    return Ranges(datasets.observation_range(dataset), rewards)


def excess(values, lower, upper):
    """How far each value lies outside [lower, upper]: 0 inside."""
    return jnp.maximum(values - upper, 0) + jnp.maximum(lower - values, 0)


def gradient_norms(grads):
    """{gradient_norm/<module>: Euclidean norm of the module's gradient}."""
    return {f'gradient_norm/{name}': optax.tree.norm(gradient) for name, gradient in grads.items()}


def value_diagnostics(agent, batch, modes, ranges: Ranges):
    """Q of the data's actions and of the policy's, `modes` (B, A), and the possible range; `q_outside`: share of both
    that lies outside it, `q_excess`: the largest distance from it, in widths of the range."""
    lowest, highest = value_range(ranges.rewards, agent.config.discount)
    observations = batch['observations']
    qs = {'data': agent.q_values(observations, batch['actions']), 'policy': agent.q_values(observations, modes)}
    outside = excess(jnp.stack(list(qs.values())), lowest, highest)
    return {f'q_{name}': q.mean() for name, q in qs.items()} | {
        'q_lowest_possible': lowest,
        'q_highest_possible': highest,
        'q_outside': jnp.mean(outside > 0),
        'q_excess': outside.max() / jnp.maximum(highest - lowest, 1e-6),
    }


def occupancy_diagnostics(agent, batch, key, ranges: Ranges):
    """Flow samples (one for each row), under the intentions of the critic's targets, before any clipping:
    `flow_outside`, the share of their features outside the observed range, and `flow_excess`, the mean over rows of the
    largest distance from it, in the units of the (normalised) states; with labels the learned reward's range on the
    samples as training has them, and `reward_excess`, its distance from the labels' range in widths of that."""
    latent_key, noise_key = jax.random.split(key)
    latents = agent.critic_intentions(agent.params, batch, latent_key)

    def futures(agent):  # From the same noise at every call: (B, S).
        return occupancy.sample_futures(agent, batch, latents, noise_key, num_samples=1)[:, 0]

    metrics = {}
    if ranges.observations is not None:
        unclipped = futures(agent.replace(flow_bounds=None))
        outside = excess(unclipped, *ranges.observations)
        metrics['flow_outside'] = jnp.mean(outside > 0)
        metrics['flow_excess'] = outside.max(axis=-1).mean()
    if ranges.rewards is not None:
        lowest, highest = ranges.rewards
        rewards = agent.predicted_rewards(agent.params, futures(agent))
        metrics['reward_lowest'], metrics['reward_highest'] = rewards.min(), rewards.max()
        metrics['reward_excess'] = excess(rewards, lowest, highest).max() / jnp.maximum(highest - lowest, 1e-6)
    return metrics


def diagnose(agent, batch, key, ranges: Ranges):
    """All that the agent has the networks for, and `actor_mse`, the mean squared difference between the policy's modes
    and the data's actions: {name: scalar}."""
    modes = agent.act(batch['observations'], key, 0.0)
    metrics = {'actor_mse': jnp.mean((modes - batch['actions']) ** 2)}
    if ranges.rewards is not None and hasattr(agent, 'q_values'):
        metrics |= value_diagnostics(agent, batch, modes, ranges)
    if occupancy.models_occupancy(agent):
        metrics |= occupancy_diagnostics(agent, batch, key, ranges)
    return metrics
