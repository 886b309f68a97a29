"""What several agents share: losses that are no one's own, target averaging, and the per-module Adam step."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from utils.networks import gaussian_log_prob


def expectile_loss(differences, expectile: float):
    """ρ_κ(u) = |κ − 1{u < 0}|·u², elementwise (IQL, arXiv 2110.06169, eq. 4)."""
    weights = jnp.where(differences < 0, 1.0 - expectile, expectile)
    return weights * differences**2


def behavioral_cloning(means, stds, actions):
    """Behavioural cloning of a Gaussian policy: L_BC = −E log π(a|s), with the mode's mean squared error to the data
    as a metric.

    means, stds, actions: (B, A).
    """
    loss = -gaussian_log_prob(means, stds, actions).mean()
    return loss, {'bc_loss': loss, 'actor_mse': jnp.mean((jnp.clip(means, -1, 1) - actions) ** 2)}


def reward_regression(predictions, rewards):
    """L_R = E(R(s̃) − r)² of a learned reward; predictions, rewards: (B,)."""
    loss = jnp.mean((predictions - rewards) ** 2)
    return loss, {'reward_loss': loss, 'reward_prediction': predictions.mean()}


def iql_value_loss(target_qs, values, expectile: float):
    """L_V = E ρ_κ(min_k Q̄_k(s, a) − V(s)) (IQL, arXiv 2110.06169, eq. 5).

    target_qs: (K, B), by the target critics; values: (B,).
    """
    loss = expectile_loss(target_qs.min(axis=0) - values, expectile).mean()
    return loss, {'value_loss': loss, 'v_mean': values.mean(), 'v_max': values.max(), 'v_min': values.min()}


def iql_critic_loss(qs, next_values, rewards, masks, discount: float):
    """L_Q = E Σ_k (Q_k(s, a) − (r + γ·m·sg V(s')))² (IQL, arXiv 2110.06169, eq. 6).

    qs: (K, B); next_values, rewards, masks: (B,).
    """
    targets = rewards + discount * masks * lax.stop_gradient(next_values)
    loss = ((qs - targets) ** 2).sum(axis=0).mean()
    return loss, {'critic_loss': loss, 'q_mean': qs.mean(), 'q_max': qs.max(), 'q_min': qs.min()}


def advantage_weighted_regression(qs, values, means, stds, actions, alpha: float):
    """L_π = −E sg[w]·log π(a|s) with w = min(exp(α·A), 100), A = min_k Q_k(s, a) − V(s) (AWR, arXiv 1910.00177).

    qs: (K, B), of the data's actions; values: (B,); means, stds, actions: (B, A).
    """
    advantages = qs.min(axis=0) - values
    # The bound is put on the exponent, too: exp must not overflow, even where the result is cut.
    weights = lax.stop_gradient(jnp.exp(jnp.minimum(alpha * advantages, jnp.log(100.0))))
    loss = -(weights * gaussian_log_prob(means, stds, actions)).mean()
    _, bc_metrics = behavioral_cloning(means, stds, actions)
    return loss, {'actor_loss': loss, 'advantage': advantages.mean(), 'awr_weight': weights.mean(), **bc_metrics}


def q_maximization(q, normalize: bool):
    """−E q for the actor; with `normalize` divided by sg E|q|, which makes its scale independent of the rewards'.

    q: (B,), of the policy's own actions.
    """
    loss = -q.mean()
    return loss / lax.stop_gradient(jnp.abs(q).mean()) if normalize else loss


def copy_of(params):
    """A copy on buffers of its own: a target network must never share a donated buffer with its online network."""
    return jax.tree.map(jnp.copy, params)


def target_update(params, target_params, tau: float):
    """Exponential moving average θ̄ ← τθ + (1−τ)θ̄ over the modules that have a target."""
    return {
        name: jax.tree.map(lambda p, t: tau * p + (1.0 - tau) * t, params[name], target)
        for name, target in target_params.items()
    }


def learning_rate(config, module: str) -> float:
    """`actor_lr` where it is set and the module is the actor, else `lr`."""
    if module == 'actor' and config.actor_lr is not None:
        return config.actor_lr
    return config.lr


def init_adam(params, config):
    """One Adam state per module."""
    return {name: optax.adam(learning_rate(config, name)).init(module) for name, module in params.items()}


def adam_step(agent, modules, loss_fn):
    """One Adam step of `agent` on the named modules only; all others, and their Adam states, stay exactly where they
    are.

    `loss_fn(params) -> (loss, metrics)` takes the full dict of parameters. Returns (params, opt_states, metrics).
    """
    trained = {name: agent.params[name] for name in modules}
    grads, metrics = jax.grad(lambda trained: loss_fn({**agent.params, **trained}), has_aux=True)(trained)
    params, opt_states = dict(agent.params), dict(agent.opt_states)
    for name in modules:
        optimizer = optax.adam(learning_rate(agent.config, name))
        updates, opt_states[name] = optimizer.update(grads[name], opt_states[name])
        params[name] = optax.apply_updates(params[name], updates)
    return params, opt_states, metrics
