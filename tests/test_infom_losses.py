"""Every loss of InFOM, and its gradient, against the float64 NumPy reference in `tests/infom_reference.py`, on a batch
of 8.

The reference gets the agent's own random draws, made here from the same key splits: an occupancy key splits in four
(latents, times, noise of the current term, noise of the future term), a critic key in two (latents, futures' noise), a
fine-tuning key in (critic, occupancy). Where a gradient goes by module, and what an update leaves alone, is in
`test_infom_updates.py`.
"""

import functools

import jax
import numpy as np
import pytest

from tests import infom_reference as reference
from tests import tiny, tiny_agents

KEY = jax.random.key(7)
# Two configurations that differ in every switch that a loss depends on.
VARIANTS = {
    'defaults': dict(),
    'switched': dict(
        critic_latent_type='encoding',
        q_agg='mean',
        normalize_q_loss=True,
        value_layer_norm=False,
        reward_layer_norm=False,
        intention_encoder_layer_norm=False,
        actor_layer_norm=True,
        const_std=False,
        expectile=0.7,
        num_flow_steps=3,
        clip_flow_goals=False,
        future_intention_gradient=True,
        absorbing_ends=False,
    ),
}
REWARD_AT = {'defaults': 'observations', 'switched': 'next_observations'}  # As on OGBench, as on ExORL.
RTOL = 1e-4


class Case:
    """An agent, its batch and the float64 copies that the reference works on."""

    def __init__(self, name):
        self.batch = tiny.make_batch(reward_at=REWARD_AT[name])
        self.batch['masks'] = self.batch['masks'].at[2].set(0.0)
        self.agent = tiny.make_agent(self.batch, **VARIANTS[name])
        self.config = self.agent.config
        self.params = reference.float64(self.agent.params)
        self.target = reference.float64(self.agent.target_params)
        self.batch64 = reference.float64(self.batch)
        self.bounds = None
        if self.config.clip_flow_goals:
            self.bounds = tuple(np.float64(bound) for bound in tiny.OBSERVED_RANGE)

    def occupancy_draws(self, key):
        latents, times, noise, next_noise = jax.random.split(key, 4)
        states = (tiny.BATCH_SIZE, tiny.STATE_DIM)
        return reference.float64(
            dict(
                latents=jax.random.normal(latents, (tiny.BATCH_SIZE, self.config.latent_dim)),
                times=jax.random.uniform(times, (tiny.BATCH_SIZE, 1)),
                noise=jax.random.normal(noise, states),
                next_noise=jax.random.normal(next_noise, states),
            )
        )

    def critic_draws(self, key):
        latents, futures = jax.random.split(key)
        shape = (tiny.BATCH_SIZE, self.config.num_flow_goals, tiny.STATE_DIM)
        return reference.float64(
            dict(
                latents=jax.random.normal(latents, (tiny.BATCH_SIZE, self.config.latent_dim)),
                futures=jax.random.normal(futures, shape),
            )
        )

    def occupancy(self, params=None, key=KEY):
        draws = self.occupancy_draws(key)
        params = params or self.params
        return reference.occupancy_loss(
            params, self.target, self.config, self.batch64, draws, self.bounds, frozen=self.params
        )

    def q_targets(self, key=KEY):
        return reference.q_targets(self.params, self.config, self.batch64, self.critic_draws(key), self.bounds)

    def losses(self, params):
        """Every loss as a function of the parameters that are not behind a stop-gradient."""
        critic_key, occupancy_key = jax.random.split(KEY)
        targets = self.q_targets(critic_key)
        reward = reference.reward_loss(params, self.config, self.batch64)
        critic = reference.critic_loss(params, self.config, self.batch64, targets)
        # The critic is a constant of the actor's loss.
        behind = {**params, 'critic': self.params['critic']}
        actor = reference.actor_loss(behind, self.config, self.batch64, frozen=self.params)
        cloning = reference.cloning_loss(params, self.config, self.batch64)
        finetuning = reward + critic + self.occupancy(params, occupancy_key)['total']
        return {
            'pretraining': self.occupancy(params)['total'] + cloning,
            'finetuning': finetuning,
            'finetuning_with_actor': finetuning + actor,
        }


@functools.cache
def make_case(name):
    return Case(name)


@pytest.fixture(params=list(VARIANTS))
def case(request):
    return make_case(request.param)


def test_occupancy_loss_terms(case):
    loss, metrics = tiny.compiled('occupancy_loss')(case.agent, case.agent.params, case.batch, KEY)
    expected = case.occupancy()
    np.testing.assert_allclose(loss, expected.pop('total'), rtol=RTOL)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=RTOL, err_msg=name)


def test_flow_samples_are_clipped_at_work():
    """The configured range cuts into what the flow of the test agent samples: otherwise clipping would go untested
    here."""
    case = make_case('defaults')
    s, a = case.batch64['next_observations'], case.batch64['next_actions']
    draws = case.occupancy_draws(KEY)
    z = reference.intentions(case.params['intention_encoder'], case.config, case.batch64, draws['latents'])[0]
    arguments = (draws['next_noise'], s, a, z)
    clipped = reference.euler(case.target['vector_field'], case.config, case.bounds, *arguments)
    free = reference.euler(case.target['vector_field'], case.config, None, *arguments)
    varies = case.bounds[1] > case.bounds[0]
    assert (np.abs(clipped - free)[:, varies] > 0.1).mean() > 0.1
    assert not varies.all()
    outside = (free < case.bounds[0]) | (free > case.bounds[1])
    assert outside[:, ~varies].any(), 'the constant feature must have samples that clipping would move'


def test_reward_loss(case):
    loss, metrics = tiny.compiled('reward_loss')(case.agent, case.agent.params, case.batch)
    np.testing.assert_allclose(loss, reference.reward_loss(case.params, case.config, case.batch64), rtol=RTOL)
    np.testing.assert_allclose(metrics['reward_loss'], loss, rtol=1e-6)


def test_reward_belongs_to_the_state_that_the_batch_names():
    batch = tiny.make_batch(reward_at='next_observations')
    np.testing.assert_array_equal(batch['reward_observations'], batch['next_observations'])
    case = make_case('switched')
    before = case.batch64 | {'reward_observations': case.batch64['observations']}
    at_next = reference.reward_loss(case.params, case.config, case.batch64)
    assert abs(at_next - reference.reward_loss(case.params, case.config, before)) > 1e-2


def test_q_targets(case):
    targets = tiny.compiled('q_targets')(case.agent, case.agent.params, case.batch, KEY)
    expected = case.q_targets()
    np.testing.assert_allclose(targets, expected[None], rtol=RTOL, atol=RTOL * np.abs(expected).max())
    assert np.std(expected) > 1e-2


def test_aggregate_intentions_are_those_of_other_transitions():
    case = make_case('switched')
    config = type(case.config)({**case.config, 'critic_latent_type': 'aggregate'})
    agent = case.agent.replace(config=config)
    draws = case.critic_draws(KEY)
    own = reference.intentions(case.params['intention_encoder'], case.config, case.batch64, draws['latents'])[0]
    latent_key, _ = jax.random.split(KEY)
    draws['latents'] = jax.random.permutation(jax.random.fold_in(latent_key, 1), own)
    expected = reference.q_targets(case.params, agent.config, case.batch64, draws, case.bounds)
    targets = tiny.compiled('q_targets')(agent, agent.params, case.batch, KEY)
    np.testing.assert_allclose(targets, expected[None], rtol=RTOL, atol=RTOL * np.abs(expected).max())
    assert np.abs(expected - case.q_targets()).max() > 1e-2, 'its own intention would give something else'


def test_critic_loss(case):
    loss, metrics = tiny.compiled('critic_loss')(case.agent, case.agent.params, case.batch, KEY)
    targets = case.q_targets()
    np.testing.assert_allclose(loss, reference.critic_loss(case.params, case.config, case.batch64, targets), rtol=RTOL)
    qs = reference.critics(case.params['critic'], case.config, case.batch64['observations'], case.batch64['actions'])
    np.testing.assert_allclose(metrics['q_mean'], qs.mean(), rtol=RTOL)
    np.testing.assert_allclose([metrics['q_min'], metrics['q_max']], [qs.min(), qs.max()], rtol=RTOL)
    np.testing.assert_allclose(metrics['q_target_mean'], targets.mean(), rtol=RTOL)


def test_cloning_loss(case):
    loss, metrics = tiny.compiled('cloning_loss')(case.agent, case.agent.params, case.batch)
    np.testing.assert_allclose(loss, reference.cloning_loss(case.params, case.config, case.batch64), rtol=RTOL)
    means = reference.actor(case.params['actor'], case.config, case.batch64['observations'])[0]
    error = ((np.clip(means, -1, 1) - case.batch64['actions']) ** 2).mean()
    np.testing.assert_allclose(metrics['actor_mse'], error, rtol=RTOL)


@pytest.mark.parametrize('q_agg', ['min', 'mean'])
@pytest.mark.parametrize('normalize_q_loss', [False, True])
def test_actor_loss(case, q_agg, normalize_q_loss):
    """Of a policy whose modes are in part beyond ±1: the critics see them clipped."""
    agent = tiny.with_config(tiny_agents.bold(case.agent), q_agg=q_agg, normalize_q_loss=normalize_q_loss)
    loss, metrics = tiny.compiled('actor_loss')(agent, agent.params, case.batch)
    params = reference.float64(agent.params)
    np.testing.assert_allclose(loss, reference.actor_loss(params, agent.config, case.batch64), rtol=RTOL)
    np.testing.assert_allclose(metrics['actor_loss'], loss, rtol=1e-6)


def test_phase_losses(case):
    """The phases' losses are the sums that the formulas say, each term on the key that it is given."""
    expected = case.losses(case.params)
    agent = case.agent
    loss, metrics = tiny.compiled('pretraining_loss')(agent, agent.params, case.batch, KEY)
    np.testing.assert_allclose(loss, expected['pretraining'], rtol=RTOL)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
    for update_actor, name in ((False, 'finetuning'), (True, 'finetuning_with_actor')):
        finetuning_loss = tiny.compiled('finetuning_loss', update_actor=update_actor)
        loss, _ = finetuning_loss(agent, agent.params, case.batch, KEY)
        np.testing.assert_allclose(loss, expected[name], rtol=RTOL, err_msg=name)


@jax.jit
def phase_gradients(agent, batch):
    losses = {
        'pretraining': lambda params: agent.pretraining_loss(params, batch, KEY)[0],
        'finetuning': lambda params: agent.finetuning_loss(params, batch, KEY, False)[0],
        'finetuning_with_actor': lambda params: agent.finetuning_loss(params, batch, KEY, True)[0],
    }
    return {name: jax.grad(loss)(agent.params) for name, loss in losses.items()}


def test_gradients(case):
    """Directional derivatives of the phases' losses, one module at a time, against central differences of the
    reference.

    The reference holds fixed what the formulas put behind a stop-gradient (targets, the future term's z, the critic of
    the actor loss, the normaliser), so agreement says that gradients flow where they should and nowhere else.
    """
    agent, step = case.agent, 1e-5
    gradients = phase_gradients(agent, case.batch)
    for module in agent.params:
        direction = tiny.perturb(jax.tree.map(np.zeros_like, case.params[module]), seed=3, scale=1.0)

        def shifted(size, module=module, direction=direction):
            moved = jax.tree.map(lambda p, d: p + size * d, case.params[module], direction)
            return case.losses({**case.params, module: moved})

        up, down = shifted(step), shifted(-step)
        for name, gradient in gradients.items():
            expected = (up[name] - down[name]) / (2 * step)
            actual = tiny.dot(gradient[module], direction)
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5, err_msg=f'{name}, {module}')
