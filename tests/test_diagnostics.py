"""Diagnostics on constructed agents: each sign of divergence is seen where it is built in, and not where it is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from utils import diagnostics

KEY = jax.random.key(3)
BATCH = tiny.make_batch()
RANGES = diagnostics.Ranges((jnp.full(tiny.STATE_DIM, -4.0), jnp.full(tiny.STATE_DIM, 4.0)), (-1.0, 0.0))


@functools.cache
def infom():
    return tiny.make_agent(BATCH, clip_flow_goals=True)


def with_params(agent, module, function):
    return agent.replace(params={**agent.params, module: jax.tree.map(function, agent.params[module])})


@jax.jit
def diagnose(agent):
    return diagnostics.diagnose(agent, BATCH, KEY, RANGES)


def test_excess_is_the_distance_to_the_interval():
    np.testing.assert_allclose(diagnostics.excess(jnp.array([-3.0, -1.0, 0.5, 2.5]), -1.0, 2.0), [2, 0, 0, 0.5])


@pytest.mark.parametrize(
    'rewards, expected',
    [((-1.0, 0.0), (-10, 0)), ((0.0, 1.0), (0, 10)), ((-2.0, -1.0), (-20, -1)), ((1.0, 2.0), (1, 20))],
)
def test_value_range_holds_for_episodes_that_end_and_that_do_not(rewards, expected):
    np.testing.assert_allclose(diagnostics.value_range(rewards, discount=0.9), expected, rtol=1e-6)


def test_a_field_that_diverges_is_reported_as_such():
    # Of a field that is 0 everywhere, samples are the noise itself, whose range is far inside ±8.
    wide = RANGES._replace(observations=(jnp.full(tiny.STATE_DIM, -8.0), jnp.full(tiny.STATE_DIM, 8.0)))
    still = with_params(infom(), 'vector_field', jnp.zeros_like)
    metrics = diagnostics.occupancy_diagnostics(still, BATCH, KEY, wide)
    assert metrics['flow_outside'] == 0 and metrics['flow_excess'] == 0
    # A constant velocity of 100 in every feature puts every sample there, clipped or not.
    output = infom().params['vector_field']['rest']['Dense_2']['bias']
    params = jax.tree.map(jnp.zeros_like, infom().params['vector_field'])
    params['rest']['Dense_2']['bias'] = jnp.full_like(output, 100.0)
    diverging = infom().replace(params={**infom().params, 'vector_field': params})
    metrics = diagnostics.occupancy_diagnostics(diverging, BATCH, KEY, wide)
    assert metrics['flow_outside'] == 1
    assert 90 < metrics['flow_excess'] < 97, 'noise of a few units around 100, less the bound of 8'


def test_rewards_that_no_row_has_are_reported():
    offset = 50.0
    params = jax.tree.map(jnp.zeros_like, infom().params['reward'])
    last = max(name for name in params['MLP_0'] if name.startswith('Dense'))
    params['MLP_0'][last]['bias'] = jnp.full_like(params['MLP_0'][last]['bias'], offset)
    metrics = diagnose(infom().replace(params={**infom().params, 'reward': params}))
    assert metrics['reward_lowest'] == metrics['reward_highest'] == offset
    assert metrics['reward_excess'] == offset, 'in widths of the labels’ range [-1, 0]'


@pytest.mark.parametrize('offset, outside, excess', [(-3.0, 0.0, 0.0), (30.0, 1.0, 3.0), (-30.0, 1.0, 2.0)])
def test_values_that_no_policy_can_have_are_reported(offset, outside, excess):
    """With γ = 0.9 and rewards in [-1, 0], Q lies in [-10, 0]."""
    params = jax.tree.map(jnp.zeros_like, infom().params['critic'])
    mlp = next(value for name, value in params.items() if 'MLP' in name)
    last = max(name for name in mlp if name.startswith('Dense'))
    mlp[last]['bias'] = jnp.full_like(mlp[last]['bias'], offset)
    metrics = diagnose(infom().replace(params={**infom().params, 'critic': params}))
    assert metrics['q_data'] == metrics['q_policy'] == offset
    assert metrics['q_outside'] == outside
    np.testing.assert_allclose(metrics['q_excess'], excess, rtol=1e-5)
    np.testing.assert_allclose([metrics['q_lowest_possible'], metrics['q_highest_possible']], [-10, 0], rtol=1e-5)


def test_a_policy_off_the_data_is_reported():
    """The policy that acts: the average of the trained actor."""
    acting = jax.tree.map(jnp.zeros_like, infom().params['actor'])
    metrics = diagnose(infom().replace(opt_states={**infom().opt_states, 'acting_actor': acting}))
    np.testing.assert_allclose(metrics['actor_mse'], (BATCH['actions'] ** 2).mean(), rtol=1e-5)


def test_gradient_norms_are_euclidean_over_all_of_a_module():
    norms = diagnostics.gradient_norms(
        {'a': {'kernel': jnp.array([3.0, 0.0]), 'bias': jnp.array([4.0])}, 'b': jnp.zeros(2)}
    )
    assert norms == {'gradient_norm/a': 5.0, 'gradient_norm/b': 0.0}


def test_the_observed_range_is_that_of_states_and_of_labelled_transitions():
    class Rows:
        observations = np.array([[0.0, 5.0], [1.0, -5.0], [9.0, 0.0]], np.float32)
        rewards = np.array([0.25, 0.5, 100.0], np.float32)  # The last row ends the episode and has no transition.
        transition_rows = np.array([0, 1])

    ranges = diagnostics.observed_ranges(Rows)
    np.testing.assert_array_equal(ranges.observations, [[0, -5], [9, 5]])
    assert ranges.rewards == (0.25, 0.5)
    Rows.observations, Rows.rewards = np.zeros((3, 2, 2, 3), np.uint8), None
    assert diagnostics.observed_ranges(Rows) == diagnostics.Ranges(None, None)
