"""InFOM's ablations: intentions of another origin or none, and explicit or no policy improvement over them, against
float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents import fb_iql, hilp_iql
from tests import baseline_reference, tiny, tiny_agents
from tests import infom_reference as reference
from tests.tiny import BATCH_SIZE, OBSERVED_RANGE, STATE_DIM
from utils.errors import UserError

KEY = jax.random.key(7)
VARIANTS = {
    'none': dict(intention_encoder='none'),
    'one_step': dict(policy_extraction='one_step'),
    'fb': dict(intention_encoder='fb'),
    'hilp': dict(intention_encoder='hilp'),
    'gpi': dict(policy_extraction='gpi'),
}


@functools.cache
def make_case(name):
    batch = tiny_agents.make_batch()
    agent = tiny_agents.make_agent('infom', batch, **VARIANTS[name])
    if agent.representation is not None:
        agent = agent.replace(representation=tiny.off_initial(agent.representation))
    return agent, batch


def numpy_of(agent, batch):
    return (
        agent.config,
        reference.float64(agent.params),
        reference.float64(agent.target_params),
        reference.float64(batch),
    )


def expected_latents(agent, batch):
    """z of a batch in NumPy, (B, Z) of norm √Z; (B, 0) without intentions."""
    if agent.networks.intention_encoder is None and agent.representation is None:
        return np.zeros((BATCH_SIZE, 0))
    config, params = agent.representation.config, reference.float64(agent.representation.params)
    if agent.config.intention_encoder == 'fb':
        return baseline_reference.backward(params, config, batch['next_observations'])
    return baseline_reference.to_sphere(baseline_reference.displacements(params, config, batch))


@jax.jit
def updates(agent, batch):
    """Both updates, with the occupancy loss and the critic's targets: one program."""
    pretrained, pretraining_metrics = agent.pretrain(batch, KEY)
    finetuned, finetuning_metrics = agent.finetune(batch, KEY, update_actor=False)
    values = agent.occupancy_loss(agent.params, batch, KEY)[0], agent.q_targets(agent.params, batch, KEY)
    return (
        (pretrained, finetuned),
        (pretraining_metrics, finetuning_metrics),
        values,
        agent.critic_loss(agent.params, batch, KEY),
    )


def critic_latents(agent, key, batch):
    if agent.networks.intention_encoder is None and agent.representation is None:
        return np.zeros((BATCH_SIZE, 0))
    normal = np.float64(jax.random.normal(key, (BATCH_SIZE, agent.config.latent_dim)))
    return normal if agent.representation is None else baseline_reference.to_sphere(normal)


def expected_returns(agent, batch, key):
    config, params, _, batch = numpy_of(agent, batch)
    latent_key, noise_key = jax.random.split(key)
    futures = jax.random.normal(noise_key, (BATCH_SIZE, config.num_flow_goals, STATE_DIM))
    draws = dict(latents=critic_latents(agent, latent_key, batch), futures=np.float64(futures))
    return reference.q_targets(params, config, batch, draws, tuple(np.float64(bound) for bound in OBSERVED_RANGE))


@pytest.mark.parametrize('name', VARIANTS)
def test_targets_of_the_critic(name):
    agent, batch = make_case(name)
    _, _, (_, targets), (critic_loss, _) = updates(agent, batch)
    if name == 'gpi':
        returns = [expected_returns(agent, batch, key) for key in jax.random.split(KEY, 8)]
        expected = np.max(returns, axis=0)
        assert np.abs(expected - np.mean(returns, axis=0)).max() > 1e-3
    else:
        expected = expected_returns(agent, batch, KEY)
    np.testing.assert_allclose(targets, expected[None], rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    config, params, _, batch64 = numpy_of(agent, batch)
    u = expected - reference.critics(params['critic'], config, batch64['observations'], batch64['actions'])
    expectile = 0.5 if name in ('gpi', 'one_step') else config.expectile
    np.testing.assert_allclose(critic_loss, (np.abs(expectile - (u < 0)) * u**2).mean(), rtol=1e-3)


@pytest.mark.parametrize('name', ['none', 'fb', 'hilp'])
def test_the_occupancy_is_that_of_the_intentions(name):
    agent, batch = make_case(name)
    config, params, target, batch64 = numpy_of(agent, batch)
    assert 'intention_encoder' not in agent.params
    z = expected_latents(agent, batch64)
    if name != 'none':
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), np.sqrt(config.latent_dim))

    _, times, noise, next_noise = jax.random.split(KEY, 4)
    t = np.float64(jax.random.uniform(times, (BATCH_SIZE, 1)))
    noise, next_noise = (np.float64(jax.random.normal(key, (BATCH_SIZE, STATE_DIM))) for key in (noise, next_noise))
    s, a, next_s, next_a = (batch64[k] for k in ('observations', 'actions', 'next_observations', 'next_actions'))
    field, target_field = params['vector_field'], target['vector_field']
    current = ((s - noise) - reference.vector_field(field, config, t * s + (1 - t) * noise, t, s, a, z)) ** 2
    bounds = tuple(np.float64(bound) for bound in OBSERVED_RANGE)
    future = reference.euler(target_field, config, bounds, next_noise, next_s, next_a, z)
    x = t * future + (1 - t) * next_noise
    goal = reference.vector_field(target_field, config, x, t, next_s, next_a, z)
    bootstrapped = (goal - reference.vector_field(field, config, x, t, s, a, z)) ** 2
    expected = ((1 - config.discount) * current + config.discount * bootstrapped).mean()
    np.testing.assert_allclose(updates(agent, batch)[2][0], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ('name', 'agent_class', 'trained'),
    [('fb', fb_iql.AGENT, {'forward', 'backward', 'actor'}), ('hilp', hilp_iql.AGENT, {'representation'})],
)
def test_the_representation_learns_beside_in_both_phases(name, agent_class, trained):
    agent, batch = make_case(name)
    assert isinstance(agent.representation, agent_class)
    assert any('goal' in str(need) for need in agent.needs) == (name == 'hilp')
    results, metrics, _, _ = updates(agent, batch)
    for updated, values in zip(results, metrics, strict=True):
        before, after = agent.representation, updated.representation
        changed = {
            module
            for module in before.params
            if any(
                jax.tree.leaves(
                    jax.tree.map(lambda x, y: bool((x != y).any()), before.params[module], after.params[module])
                )
            )
        }
        assert changed == trained
        assert any(metric.startswith('representation_') for metric in values)
        assert all(jnp.isfinite(value) for value in values.values())
    begun = agent.begin_finetuning(batch, KEY)
    for owner in (begun, begun.representation):
        online = {module: owner.params[module] for module in owner.target_params}
        jax.tree.map(np.testing.assert_array_equal, owner.target_params, online)


@pytest.mark.parametrize('name', ['fb', 'hilp'])
def test_the_representation_has_the_sizes_and_rates_of_its_agent(name):
    settings = {'discount': 0.7, 'tau': 0.3, 'lr': 2e-3, 'latent_dim': 6, 'actor_hidden_dims': (4,)}
    batch = tiny_agents.make_batch()
    agent = tiny_agents.make_agent('infom', batch, intention_encoder=name, value_layer_norm=False, **settings)
    own = agent.representation.config
    assert {key: own[key] for key in settings} == settings and own.value_layer_norm, "its critics' LayerNorm is its own"
    assert own.get('repr_hidden_dims', agent.config.value_hidden_dims) == agent.config.value_hidden_dims
    # Of InFOM's actor and the representation's the first layers are alike in shape, and not in what was drawn.
    ours, theirs = (owner.params['actor'] for owner in (agent, agent.representation))
    shared = [
        (x, y)
        for path, x in jax.tree.leaves_with_path(ours)
        for other, y in jax.tree.leaves_with_path(theirs)
        if path == other and x.shape == y.shape and x.std() > 0
    ]
    assert all(not np.array_equal(x, y) for x, y in shared)


@pytest.mark.slow
def test_several_intentions_per_row():
    """M draws of z for a row are M targets of its Q: the mean of their expectile losses."""
    batch = tiny_agents.make_batch()
    agent = tiny_agents.make_agent('infom', batch, num_critic_latents=3, expectile=0.8)
    _, _, (_, targets), (critic_loss, metrics) = updates(agent, batch)
    expected = np.stack([expected_returns(agent, batch, key) for key in jax.random.split(KEY, 3)])
    np.testing.assert_allclose(targets, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    config, params, _, batch64 = numpy_of(agent, batch)
    qs = reference.critics(params['critic'], config, batch64['observations'], batch64['actions'])
    u = expected[:, None] - qs
    np.testing.assert_allclose(critic_loss, (np.abs(0.8 - (u < 0)) * u**2).mean(), rtol=1e-3)
    np.testing.assert_allclose(metrics['q_target_mean'], expected.mean(), rtol=1e-3)
    of_their_mean = expected.mean(axis=0) - qs
    assert abs(critic_loss - (np.abs(0.8 - (of_their_mean < 0)) * of_their_mean**2).mean()) > 1e-4
    single = tiny_agents.make_agent('infom', batch, num_critic_latents=1)
    np.testing.assert_array_equal(
        updates(single, batch)[2][1], updates(tiny_agents.make_agent('infom', batch), batch)[2][1]
    )


@pytest.mark.parametrize(
    'overrides',
    [
        dict(intention_encoder='cvae'),
        dict(policy_extraction='max'),
        dict(intention_encoder='none', policy_extraction='gpi'),
        dict(intention_encoder='fb', policy_extraction='one_step'),
    ],
)
def test_impossible_ablations_are_user_errors(overrides):
    with pytest.raises(UserError, match=list(overrides)[-1]):
        tiny_agents.make_agent('infom', tiny_agents.make_batch(), **overrides)
