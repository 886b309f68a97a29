"""ReBRAC's losses in float64 NumPy, written from the formulas: what the tests of ReBRAC and of what is built on it
compare with. Conventions as in `tests/infom_reference.py`, whose networks these are."""

import numpy as np

from tests.infom_reference import actor, critics, log_normal


def mode(params, config, s):
    means, _ = actor(params['actor'], config, s)
    return np.tanh(means) if config.tanh_squash else means


def cloning_loss(params, config, batch):
    means, stds = actor(params['actor'], config, batch['observations'])
    a = batch['actions']
    if not config.tanh_squash:
        return -log_normal(a, means, stds).mean()
    return -(log_normal(np.arctanh(a), means, stds) - np.log(1 - a**2).sum(-1)).mean()


def critic_loss(params, target, config, batch, noise):
    """`noise`: standard normal, (B, A)."""
    smoothing = np.clip(config.actor_noise * noise, -config.actor_noise_clip, config.actor_noise_clip)
    next_a = np.clip(mode(target, config, batch['next_observations']) + smoothing, -1, 1)
    penalty = ((next_a - batch['next_actions']) ** 2).sum(-1)
    next_q = critics(target['critic'], config, batch['next_observations'], next_a).min(0)
    y = batch['rewards'] + config.discount * batch['masks'] * (next_q - config.alpha_critic * penalty)
    return ((critics(params['critic'], config, batch['observations'], batch['actions']) - y) ** 2).mean()


def actor_loss(params, config, batch, frozen):
    """`frozen` gives the critic and the normaliser E|q|."""

    def q(params):
        a = np.clip(mode(params, config, batch['observations']), -1, 1)
        return critics(frozen['critic'], config, batch['observations'], a).min(0)

    scale = np.abs(q(frozen)).mean() if config.normalize_q_loss else 1.0
    penalty = ((mode(params, config, batch['observations']) - batch['actions']) ** 2).sum(-1).mean()
    return -q(params).mean() / scale + config.alpha_actor * penalty


def losses(params, frozen, target, config, batch, noise):
    """{phase: {metric: value}} of ReBRAC proper."""
    cloning = cloning_loss(params, config, batch)
    critic = critic_loss(params, target, config, batch, noise)
    policy = actor_loss(params, config, batch, frozen)
    return {
        'pretraining': {'loss': cloning, 'bc_loss': cloning},
        'finetuning': {'loss': critic, 'critic_loss': critic},
        'finetuning_with_actor': {'loss': critic + policy, 'critic_loss': critic, 'actor_loss': policy},
    }
