"""CRL and TD InfoNCE: losses and gradients against float64 NumPy, and the density ratios that they learn on a ring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agents
from tests import baseline_reference as reference
from tests import rings, tiny, tiny_agents
from tests.learning import train
from utils import datasets, training

KEY = jax.random.key(7)
NAMES = ('crl_infonce', 'td_infonce')


@functools.cache
def make_case(name, **overrides):
    batch = tiny_agents.make_batch()
    return tiny_agents.bold(tiny_agents.make_agent(name, batch, **overrides)), batch


def crl_losses(agent, batch):
    config, batch = agent.config, reference.float64(batch)

    def aggregate(logits):
        return np.maximum(logits, -13.8).min(0)

    def losses(params, frozen):
        contrastive = reference.crl_contrastive(params, config, batch)
        cloning = -reference.log_probability(params, config, batch['observations'], batch['actions']).mean()
        finetuning = contrastive + reference.reward_loss(params, config, batch)
        actor = reference.importance_weighted_actor(params, frozen, config, batch, aggregate)
        return {
            'pretraining': contrastive + cloning,
            'finetuning': finetuning,
            'finetuning_with_actor': finetuning + actor,
        }

    return losses


def td_losses(agent, batch):
    config, batch, target = agent.config, reference.float64(batch), reference.float64(agent.target_params)

    def aggregate(logits):
        return logits.mean(0) if config.logit_agg == 'mean' else logits.min(0)

    def losses(params, frozen):
        cloning = -reference.log_probability(params, config, batch['observations'], batch['actions']).mean()
        pretraining = reference.td_contrastive(params, target, config, batch, batch['next_actions'])
        next_actions = reference.mode(frozen, config, batch['next_observations'])
        finetuning = reference.td_contrastive(params, target, config, batch, next_actions)
        finetuning += reference.reward_loss(params, config, batch)
        actor = reference.importance_weighted_actor(params, frozen, config, batch, aggregate)
        return {
            'pretraining': pretraining + cloning,
            'finetuning': finetuning,
            'finetuning_with_actor': finetuning + actor,
        }

    return losses


@pytest.mark.parametrize(
    ('name', 'losses', 'overrides'),
    [
        ('crl_infonce', crl_losses, dict()),
        ('crl_infonce', crl_losses, dict(contrastive_loss='symmetric_infonce', normalize_q_loss=False)),
        ('td_infonce', td_losses, dict()),
        ('td_infonce', td_losses, dict(logit_agg='min', normalize_q_loss=False)),
    ],
)
def test_losses_and_gradients(name, losses, overrides):
    agent, batch = make_case(name, **overrides)
    metrics = reference.check_losses_and_gradients(agent, batch, KEY, losses(agent, batch))
    size = tiny.BATCH_SIZE
    if name == 'crl_infonce':
        logits = reference.logits(
            reference.float64(agent.params), agent.config, *(reference.float64(batch)[k] for k in
            ('observations', 'actions', 'goals'))
        ).mean(0)  # fmt: skip
        off = ~np.eye(size, dtype=bool)
        pretraining = metrics['pretraining']
        np.testing.assert_allclose(pretraining['positive_logits'], np.diag(logits).mean(), rtol=1e-3)
        np.testing.assert_allclose(pretraining['negative_logits'], logits[off].mean(), rtol=1e-3, atol=1e-5)
        correct = (logits.argmax(1) == np.arange(size)).mean()
        np.testing.assert_allclose(pretraining['contrastive_accuracy'], correct)


@pytest.mark.parametrize(('name', 'blind'), [('td_infonce', True), ('crl_infonce', False)])
def test_td_infonce_alone_does_not_see_what_all_goals_share(name, blind):
    """A constant added to every ψ(g) is a constant added to each row's logits, which a softmax forgets; CRL's logsumexp
    penalty does not. In TD InfoNCE the last biases of ψ therefore follow nothing but rounding."""
    agent, batch = make_case(name)
    last = f'Dense_{len(agent.config.value_hidden_dims)}'
    shifted = jax.tree.map(lambda x: x, agent.params)
    shifted['critic']['goal_head']['VmapMLP_0'][last]['bias'] += 1.0
    gradient = jax.jit(jax.value_and_grad(lambda params: agent.pretraining_loss(params, batch, KEY)[0]))
    (loss, grads), (shifted_loss, _) = gradient(agent.params), gradient(shifted)
    of_head = grads['critic']['goal_head']['VmapMLP_0'][last]
    share = np.abs(of_head['bias']).max() / np.abs(of_head['kernel']).max()
    assert (abs(shifted_loss - loss) < 1e-5) == blind
    assert (share < 1e-5) == blind


def test_large_logits_stay_in_log_space():
    """Logits far beyond what exp can hold give a finite loss; those below the floor of CRL's weights count as it."""
    agent, batch = make_case('crl_infonce')
    critic = jax.tree.map(lambda x: x, agent.params['critic'])
    last = critic['goal_head']['VmapMLP_0'][f'Dense_{len(agent.config.value_hidden_dims)}']
    last['kernel'], last['bias'] = 300 * last['kernel'], 300 * last['bias']
    agent = agent.replace(params={**agent.params, 'critic': critic})
    losses = jax.jit(
        lambda agent: (agent.pretraining_loss(agent.params, batch, KEY)[0], agent.actor_loss(agent.params, batch))
    )
    contrastive, (actor, _) = losses(agent)
    assert jnp.isfinite(contrastive) and jnp.isfinite(actor)

    params, batch64 = reference.float64(agent.params), reference.float64(batch)
    s, goals = batch64['observations'], batch64['actor_goals']
    logits = reference.logits(params, agent.config, s, reference.mode(params, agent.config, s), goals)
    assert logits.min() < -89 and (logits < -13.8).mean() > 0.1, 'the floor must be at work'
    # In 128 bits: float64's own exponential would not do.
    expected = reference.importance_weighted_actor(
        params, params, agent.config, batch64, lambda f: np.longdouble(np.maximum(f, -13.8).min(0))
    )
    np.testing.assert_allclose(actor, np.float64(expected), rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------- learning

NUM_STATES, FORWARD, DISCOUNT = 5, 0.8, 0.8
SEEDS = [0]


def learnt_logits(name, **overrides):
    """Logits (2, states, signs of the action, goals) of the walk, after pre-training."""
    raw, _ = rings.random_walk(NUM_STATES, FORWARD)
    dataset = tiny.make_dataset(raw)
    config = tiny_agents.make_config(
        name, discount=DISCOUNT, lr=1e-3, batch_size=128, latent_dim=8, value_hidden_dims=(32, 32), **overrides
    )
    agent_class = agents.load(name).AGENT
    fresh = training.create_agents(agent_class, SEEDS, datasets.example_batch(dataset), config)
    agent = jax.tree.map(lambda x: x[0], train(fresh, SEEDS, dataset, 'pretraining', 1500))
    states = jnp.asarray(rings.observations_of(np.arange(NUM_STATES), NUM_STATES))
    critic = {'params': agent.params['critic']}
    logits = []
    for sign in (-1.0, 1.0):
        phi, psi = agent.networks.critic.apply(critic, states, jnp.full((NUM_STATES, 1), 0.5 * sign), states)
        logits.append(np.einsum('eik,ejk->eij', phi, psi) / np.sqrt(psi.shape[-1]))
    return np.stack(logits, axis=2)


# Of the mean error: 0.08 is what 10,000 transitions and the penalty leave, whatever the number of updates.
TOLERANCE = 0.11


def centred(x):
    """Up to a constant for each state and action."""
    return x - x.mean(axis=-1, keepdims=True)


def check_log_ratios(logits):
    """log p(g | s, a)/p(g) up to a constant per (s, a): the goals' marginal is uniform on a ring."""
    expected = centred(np.log(rings.occupancy(NUM_STATES, FORWARD, DISCOUNT)))
    for member in logits:
        errors = np.abs(centred(member) - expected)
        assert errors.mean() < TOLERANCE and errors.max() < 0.35, f'{errors.mean():.3f}, {errors.max():.3f}'


def test_the_problem_tells_ratios_from_what_a_wrong_loss_learns():
    """Other discounts, an offset from 0 and a symmetric walk are all farther away than the tolerance."""
    expected = centred(np.log(rings.occupancy(NUM_STATES, FORWARD, DISCOUNT)))
    for forward, discount in ((FORWARD, 0.7), (FORWARD, 0.9), (0.5, DISCOUNT)):
        other = centred(np.log(rings.occupancy(NUM_STATES, forward, discount)))
        assert np.abs(other - expected).mean() > 1.3 * TOLERANCE
    from_0 = (1 - DISCOUNT) * np.eye(NUM_STATES)[:, None] + DISCOUNT * rings.occupancy(NUM_STATES, FORWARD, DISCOUNT)
    assert np.abs(centred(np.log(from_0)) - expected).mean() > 1.3 * TOLERANCE


def test_crl_learns_the_log_density_ratio():
    logits = learnt_logits('crl_infonce')
    check_log_ratios(logits)
    # The penalty fixes the constant: the partition of the batch is about 1.
    partition = np.log(np.exp(logits).mean(axis=-1) * 128)
    assert np.abs(partition).max() < 1.0


@pytest.mark.slow
@pytest.mark.parametrize('goals', ['future', 'marginal'])
def test_td_infonce_learns_the_log_density_ratio(goals):
    """Goals that follow their own row belong to the candidates of the row, too: one of 128, which the tolerance
    covers."""
    check_log_ratios(learnt_logits('td_infonce', goals=goals, tau=0.02))
