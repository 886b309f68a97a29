"""The losses of CRL, TD InfoNCE, FB and HILP in float64 NumPy, written from the formulas and nothing else.

A loss is a function of (params, frozen, …): `params` where gradient flows, `frozen` behind a stop-gradient, so that a
directional derivative is a difference of two values. Networks come from `tests/infom_reference.py`.
"""

import jax
import numpy as np

from tests import loss_checks
from tests.infom_reference import actor, float64, log_normal, mlp


def heads(params, inputs, dims, norm=True):
    """The vectors of a head: (B, ·), or (2, B, ·) where it has two members."""
    x = np.concatenate(inputs, axis=-1)
    if 'MLP_0' in params:
        return mlp(params['MLP_0'], x, len(dims), norm)
    members = [jax.tree.map(lambda leaf: leaf[e], params['VmapMLP_0']) for e in range(2)]
    return np.stack([mlp(member, x, len(dims), norm) for member in members])


def lse(x, axis):
    return np.log(np.exp(x).sum(axis=axis))


def log_probability(params, config, s, a, *latents):
    return log_normal(a, *actor(params['actor'], config, np.concatenate([s, *latents], axis=-1)))


def mode(params, config, s, *latents):
    return np.clip(actor(params['actor'], config, np.concatenate([s, *latents], axis=-1))[0], -1, 1)


def reward(params, config, s):
    return heads(params['reward'], [s], config.reward_hidden_dims)[:, 0]


# --------------------------------------------------------------------------------------------------- CRL, TD InfoNCE


def logits(params, config, s, a, g):
    """f_ij = φ_e(s_i, a_i)·ψ_e(g_j)/√d, pair by pair: (2, B, B)."""
    phi = heads(params['critic']['state_action_head'], [s, a], config.value_hidden_dims)
    psi = heads(params['critic']['goal_head'], [g], config.value_hidden_dims)
    size = len(s)
    f = np.zeros((2, size, size))
    for e, i, j in np.ndindex(2, size, size):
        f[e, i, j] = phi[e, i] @ psi[e, j] / np.sqrt(config.latent_dim)
    return f


def crl_contrastive(params, config, batch):
    f = logits(params, config, batch['observations'], batch['actions'], batch['goals'])
    diagonal = np.stack([np.diag(member) for member in f])
    forward = -diagonal + lse(f, axis=2)
    if config.contrastive_loss == 'forward_infonce':
        return (forward + config.logsumexp_penalty_coeff * lse(f, axis=2) ** 2).mean()
    return (forward - diagonal + lse(f, axis=1)).mean()


def td_contrastive(params, target, config, batch, next_actions):
    s, a, g = batch['observations'], batch['actions'], batch['goals']
    future = logits(params, config, s, a, g)
    current = future.copy()
    size = len(s)
    positives = logits(params, config, s, a, batch['next_observations'])
    for i in range(size):
        current[:, i, i] = positives[:, i, i]
    target_logits = logits(target, config, batch['next_observations'], next_actions, g)
    target_logits = target_logits.mean(0) if config.logit_agg == 'mean' else target_logits.min(0)
    weights = np.exp(target_logits - lse(target_logits, axis=1)[:, None])
    total = 0.0
    for e, i in np.ndindex(2, size):
        l1 = -current[e, i, i] + lse(current[e, i], axis=0)
        l2 = -(weights[i] * (future[e, i] - lse(future[e, i], axis=0))).sum()
        total += (1 - config.discount) * l1 + config.discount * l2
    return total / (2 * size)


def importance_weighted_actor(params, frozen, config, batch, aggregate):
    """`aggregate` makes one set of logits of the members'."""
    s, g = batch['observations'], batch['actor_goals']

    def q(params):
        f = aggregate(logits(frozen, config, s, mode(params, config, s), g))
        weights = len(s) * np.exp(np.diag(f)) / np.exp(f).sum(axis=1)
        return weights * reward(frozen, config, g)

    scale = np.abs(q(frozen)).mean() if config.normalize_q_loss else 1.0
    cloning = -log_probability(params, config, s, batch['actions']).mean()
    return -q(params).mean() / scale + config.alpha * cloning


def reward_loss(params, config, batch):
    return ((reward(params, config, batch['reward_observations']) - batch['rewards']) ** 2).mean()


# ---------------------------------------------------------------------------------------------------- FB, HILP, IQL


def to_sphere(x):
    return np.sqrt(x.shape[-1]) * x / np.sqrt((x**2).sum(-1, keepdims=True))


def backward(params, config, s):
    return to_sphere(heads(params['backward'], [s], config.repr_hidden_dims))


def fb_pretraining(params, frozen, target, config, batch, draws):
    """draws: normal (B, Z), permutation (B,), uniform (B, 1)."""
    s, a, next_s = batch['observations'], batch['actions'], batch['next_observations']
    size, dims = len(s), config.repr_hidden_dims
    others = backward(frozen, config, s[draws['permutation'].astype(int)])
    z = np.where(draws['uniform'] < config.latent_mix_prob, to_sphere(draws['normal']), others)

    next_a = mode(frozen, config, next_s, z)
    next_f = heads(target['forward'], [next_s, next_a, z], dims)
    next_m = np.einsum('eid,jd->eij', next_f, backward(target, config, next_s))
    next_m = next_m.mean(0) if config.repr_agg == 'mean' else next_m.min(0)
    b = backward(params, config, next_s)
    m = np.einsum('eid,jd->eij', heads(params['forward'], [s, a, z], dims), b)
    fb, orthonormality = 0.0, 0.0
    for i in range(size):
        for e in range(2):
            off = [(m[e, i, j] - config.discount * next_m[i, j]) ** 2 for j in range(size) if j != i]
            fb += (-m[e, i, i] + sum(off) / (2 * (size - 1))) / size
        off = [(b[i] @ b[j]) ** 2 for j in range(size) if j != i]
        orthonormality += (-2 * b[i] @ b[i] + sum(off) / (size - 1)) / size

    q = (heads(frozen['forward'], [s, mode(params, config, s, z), z], dims) * z).sum(-1).min(0)
    actor_loss = -q.mean() - config.alpha_repr * log_probability(params, config, s, a, z).mean()
    return fb + config.orthonorm_coeff * orthonormality + actor_loss


def hilp_representation(params, target, config, batch):
    s, next_s, g, m = (batch[k] for k in ('observations', 'next_observations', 'goals', 'goal_masks'))

    def value(params, s):
        phi, goal = (heads(params['representation'], [x], config.value_hidden_dims) for x in (s, g))
        return -np.sqrt(((phi - goal) ** 2).sum(-1))  # (2, B)

    next_v, v, rewards = value(target, next_s), value(target, s), -1.0 * (m == 1)
    advantage = rewards + config.discount * m * next_v.min(0) - v.mean(0)
    weight = np.where(advantage >= 0, config.expectile, 1 - config.expectile)
    errors = rewards + config.discount * m * next_v - value(params, s)
    return (weight * errors**2).mean(1).sum()


def displacements(params, config, batch):
    """φ₁(s') − φ₁(s)."""
    states = (batch['next_observations'], batch['observations'])
    phi, start = (heads(params['representation'], [x], config.value_hidden_dims)[0] for x in states)
    return phi - start


def iql(params, frozen, target, config, batch, z, rewards, masks, alpha, with_actor):
    """L_V + L_Q (+ AWR's L_π) with everything conditioned on z (B, Z)."""
    s, a, next_s = batch['observations'], batch['actions'], batch['next_observations']

    def value(params, s):
        return heads(params['value'], [s, z], config.value_hidden_dims)[:, 0]

    def critic(params):
        return heads(params['critic'], [s, a, z], config.value_hidden_dims)[..., 0]

    u = critic(target).min(0) - value(params, s)
    total = (np.abs(config.expectile - (u < 0)) * u**2).mean()
    y = rewards + config.discount * masks * value(frozen, next_s)
    total += ((critic(params) - y) ** 2).sum(0).mean()
    if with_actor:
        weights = np.minimum(np.exp(alpha * (critic(frozen).min(0) - value(frozen, s))), 100)
        total += -(weights * log_probability(params, config, s, a, z)).mean()
    return total


# --------------------------------------------------------------------------------------------------------- comparing


def check_losses_and_gradients(agent, batch, key, losses):
    """`loss_checks` for `losses(params, frozen)` → {phase: value}. Returns the metrics of the phases."""
    frozen = float64(agent.params)

    def phases(params):
        return {phase: {'loss': value} for phase, value in losses(params, frozen).items()}

    loss_checks.assert_losses_match(agent, batch, key, phases)
    loss_checks.assert_gradients_match(agent, batch, key, phases)
    values, _ = loss_checks.evaluate(agent, batch, key)
    return {phase: metrics for phase, (_, metrics) in values.items()}
