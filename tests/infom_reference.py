"""InFOM's networks and losses in float64 NumPy, written from the formulas and nothing else: what
`test_infom_losses.py` compares with.

Parameters are the agent's nested dicts. The vector field is the plain MLP on the concatenation [x_t, t, s, a, z], one
forward pass for each term.
Randomness comes in as `draws`. Gradients are not implemented: a loss takes the parameters it is a function of and, as
`frozen`, those behind a stop-gradient, so that a directional derivative is a difference of two values.
"""

import jax
import numpy as np


def float64(tree):
    """The same tree with every array as float64 NumPy."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def dense(params, x):
    return x @ params['kernel'] + params['bias']


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(params, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * params['scale'] + params['bias']


def mlp(params, x, num_hidden, norm):
    """`num_hidden` times Dense → GELU → (LayerNorm), then a plain Dense if the parameters hold one more."""
    for layer in range(num_hidden):
        x = gelu(dense(params[f'Dense_{layer}'], x))
        x = layer_norm(params[f'LayerNorm_{layer}'], x) if norm else x
    return dense(params[f'Dense_{num_hidden}'], x) if f'Dense_{num_hidden}' in params else x


def vector_field(params, config, x, t, s, a, z):
    x = np.concatenate([x, t, s, a, z], axis=-1) @ params['first_kernel'] + params['first_bias']
    x = gelu(x)
    x = layer_norm(params['first_norm'], x) if config.value_layer_norm else x
    return mlp(params['rest'], x, len(config.value_hidden_dims) - 1, config.value_layer_norm)


def euler(params, config, bounds, noise, s, a, z):
    """Left end points, clipped after every step to [min + 1e-5, max − 1e-5] where max > min; bounds = (min, max) or
    None."""
    x = noise
    for step in range(config.num_flow_steps):
        t = np.full((*x.shape[:-1], 1), step / config.num_flow_steps)
        x = x + vector_field(params, config, x, t, s, a, z) / config.num_flow_steps
        if bounds is not None:
            low, high = bounds
            x = np.where(high > low, np.clip(x, low + 1e-5, high - 1e-5), x)
    return x


def intentions(params, config, batch, noise):
    """z ~ q(z | s', a') from standard normal `noise`, with the mean and log std of q."""
    inputs = np.concatenate([batch['next_observations'], batch['next_actions']], axis=-1)
    num_hidden = len(config.intention_encoder_hidden_dims)
    features = mlp(params['MLP_0'], inputs, num_hidden, config.intention_encoder_layer_norm)
    means, log_stds = dense(params['mean'], features), np.clip(dense(params['log_std'], features), -10, 2)
    return means + np.exp(log_stds) * noise, means, log_stds


def rewards(params, config, s):
    return mlp(params['MLP_0'], s, len(config.reward_hidden_dims), config.reward_layer_norm)[..., 0]


def critics(params, config, s, a):
    """Both members, (2, B)."""
    members = [jax.tree.map(lambda x: x[e], params['VmapMLP_0']) for e in range(2)]
    inputs = np.concatenate([s, a], axis=-1)
    return np.stack([mlp(p, inputs, len(config.value_hidden_dims), config.value_layer_norm)[:, 0] for p in members])


def actor(params, config, s):
    """Mean and standard deviation, (B, A)."""
    features = mlp(params['MLP_0'], s, len(config.actor_hidden_dims), config.actor_layer_norm)
    means = dense(params['mean'], features)
    return means, np.ones_like(means) if config.const_std else np.exp(np.clip(params['log_std'], -5, 2)) + 0 * means


def log_normal(x, means, stds):
    return (-0.5 * ((x - means) / stds) ** 2 - np.log(stds) - 0.5 * np.log(2 * np.pi)).sum(-1)


def occupancy_loss(params, target, config, batch, draws, bounds, frozen=None):
    """L_FM + λ L_KL and its parts. draws: latents (B, Z), times (B, 1), noise and next_noise (B, S); `frozen` gives
    the z of the future term where no gradient goes to it: in the target and, without `future_intention_gradient`, in
    the trained field."""
    s, a, next_s, next_a = (batch[k] for k in ('observations', 'actions', 'next_observations', 'next_actions'))
    t, noise, next_noise = draws['times'], draws['noise'], draws['next_noise']
    z, means, log_stds = intentions(params['intention_encoder'], config, batch, draws['latents'])
    frozen_z = intentions((frozen or params)['intention_encoder'], config, batch, draws['latents'])[0]

    kl = -0.5 * (1 + 2 * log_stds - means**2 - np.exp(2 * log_stds)).mean()
    x = t * s + (1 - t) * noise
    current = (((s - noise) - vector_field(params['vector_field'], config, x, t, s, a, z)) ** 2).mean(-1)
    future_state = euler(target['vector_field'], config, bounds, next_noise, next_s, next_a, frozen_z)
    x = t * future_state + (1 - t) * next_noise
    goal = vector_field(target['vector_field'], config, x, t, next_s, next_a, frozen_z)
    if config.absorbing_ends and 'reward_observations' in batch:
        over = batch['masks'] == 0
        last_s = batch['reward_observations'][over]
        x[over] = t[over] * last_s + (1 - t[over]) * next_noise[over]
        goal[over] = last_s - next_noise[over]
    future_z = z if config.future_intention_gradient else frozen_z
    future = ((goal - vector_field(params['vector_field'], config, x, t, s, a, future_z)) ** 2).mean(-1)

    flow = ((1 - config.discount) * current + config.discount * future).mean()
    return {
        'total': flow + config.kl_weight * kl,
        'flow_loss': flow,
        'current_flow_loss': current.mean(),
        'future_flow_loss': future.mean(),
        'kl_loss': kl,
    }


def reward_loss(params, config, batch):
    return ((rewards(params['reward'], config, batch['reward_observations']) - batch['rewards']) ** 2).mean()


def q_targets(params, config, batch, draws, bounds):
    """y (B,), one future after the other. draws: latents (B, Z), futures (B, N, S)."""
    z = draws['latents']
    if config.critic_latent_type == 'encoding':
        z = intentions(params['intention_encoder'], config, batch, z)[0]
    total = 0.0
    for k in range(config.num_flow_goals):
        future = euler(
            params['vector_field'], config, bounds, draws['futures'][:, k], batch['observations'], batch['actions'], z
        )
        total = total + rewards(params['reward'], config, future)
    return total / ((1 - config.discount) * config.num_flow_goals)


def critic_loss(params, config, batch, targets):
    u = targets - critics(params['critic'], config, batch['observations'], batch['actions'])
    return (np.abs(config.expectile - (u < 0)) * u**2).mean()


def cloning_loss(params, config, batch):
    return -log_normal(batch['actions'], *actor(params['actor'], config, batch['observations'])).mean()


def actor_loss(params, config, batch, frozen=None):
    """`frozen` gives the normaliser E|q| of `normalize_q_loss`."""

    def q(params):
        means = actor(params['actor'], config, batch['observations'])[0]
        values = critics(params['critic'], config, batch['observations'], np.clip(means, -1, 1))
        return values.min(0) if config.q_agg == 'min' else values.mean(0)

    scale = np.abs(q(frozen or params)).mean() if config.normalize_q_loss else 1.0
    return -q(params).mean() / scale + config.alpha * cloning_loss(params, config, batch)
