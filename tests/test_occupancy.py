"""Distances, futures and returns on cases worked out by hand, and the report on an occupancy that is known."""

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import agents
from tests import tiny, tiny_agents
from utils import occupancy, values


def test_energy_distance_by_hand():
    x, y = jnp.array([[0.0], [2.0]]), jnp.array([[1.0]])
    # 2·E|x − y| = 2, E|x − x'| = (0 + 2 + 2 + 0)/4 = 1, E|y − y'| = 0.
    assert float(occupancy.energy_distance(x, y)) == pytest.approx(1.0)
    shift = jnp.array([3.0, 4.0])
    assert float(occupancy.energy_distance(jnp.zeros((5, 2)), jnp.zeros((7, 2)) + shift)) == pytest.approx(10.0)
    sample = jax.random.normal(jax.random.key(0), (40, 3))
    assert float(occupancy.energy_distance(sample, sample)) == pytest.approx(0.0, abs=1e-5)
    others = jax.random.normal(jax.random.key(1), (2, 400, 3))
    assert 0 < float(occupancy.energy_distance(*others)) < 0.03, 'two samples of one distribution'


def test_sliced_wasserstein_by_hand():
    x, y = jnp.array([[1.0], [0.0]]), jnp.array([[2.0], [3.0]])
    assert float(occupancy.sliced_wasserstein(jax.random.key(0), x, y)) == pytest.approx(2.0)
    # A shift by v: the mean of |u·v| over directions u of the plane is 2/π·‖v‖.
    planes = jnp.zeros((4, 2)), jnp.tile(jnp.array([3.0, 4.0]), (4, 1))
    assert float(occupancy.sliced_wasserstein(jax.random.key(0), *planes, 20_000)) == pytest.approx(
        10 / np.pi, rel=0.02
    )


def test_geometric_futures_have_geometric_offsets():
    rows, ends = jnp.array([5, 100]), jnp.array([10_000, 10_000])
    futures = np.asarray(occupancy.geometric_futures(jax.random.key(0), rows, ends, 0.5, 20_000))
    assert futures.shape == (2, 20_000)
    for row, drawn in zip((5, 100), futures, strict=True):
        for offset in range(4):
            assert (drawn == row + offset).mean() == pytest.approx(0.5 ** (offset + 1), abs=0.015)
    later = occupancy.geometric_futures(jax.random.key(0), rows, ends, 0.5, 1000, first_offset=1)
    assert (np.asarray(later) - rows[:, None]).min() == 1


def test_geometric_futures_stay_at_the_end_of_the_episode():
    futures = occupancy.geometric_futures(jax.random.key(0), jnp.array([3]), jnp.array([5]), 0.9, 20_000)
    assert (futures.min(), futures.max()) == (3, 5)
    assert float((futures == 5).mean()) == pytest.approx(0.9**2, abs=0.015), 'all that would have come later'


def test_early_rows_are_the_first_halves():
    raw = tiny.random_walks(num_episodes=2, num_transitions=6)
    # Rows 0 to 6 and 7 to 13; the halves end at rows 3 and 10.
    np.testing.assert_array_equal(occupancy.early_rows(tiny.make_dataset(raw)), [0, 1, 2, 3, 7, 8, 9, 10])


class KnownOccupancy(flax.struct.PyTreeNode):
    """Predicts that states stay what they are, plus `error`."""

    params: dict
    error: float
    representation: None = None
    config: ml_collections.FrozenConfigDict = flax.struct.field(
        pytree_node=False,
        default=ml_collections.FrozenConfigDict(
            {'discount': 0.9, 'latent_dim': 2, 'intention_encoder': 'hilp', 'policy_extraction': 'gpi'}
        ),
    )

    def features(self, params, observations):
        return observations

    def condition(self, params, features, actions, latents):
        return features

    def sample_futures(self, params, noise, condition):
        return jnp.zeros_like(noise) + condition + jnp.array([3.0, 4.0]) * self.error

    def intentions_and_kl(self, params, batch, key):
        return jnp.zeros((len(batch['actions']), 2)), 0.0


class WhereTheIntentionPoints(KnownOccupancy):
    """Predicts the state that z names; z of a transition is its state."""

    def condition(self, params, features, actions, latents):
        return latents

    def intentions_and_kl(self, params, batch, key):
        return batch['observations'], 0.0


def still_episodes():
    """Two episodes that rest at (0, 0) and at (6, 8)."""
    places = np.repeat(np.array([[0, 0], [6, 8]], np.float32), 10, axis=0)
    return tiny.make_dataset(
        {'observations': places, 'actions': np.zeros((20, 1), np.float32), 'terminals': np.arange(20) % 10 == 9}
    )


@pytest.mark.parametrize('error', [0.0, 1.0])
def test_report_on_an_occupancy_that_is_known(error):
    agent = KnownOccupancy(params={}, error=error)
    report = occupancy.occupancy_report(agent, still_episodes(), jax.random.key(0), num_states=6, num_samples=400)
    assert tuple(report) == occupancy.PREDICTORS
    for predictor in occupancy.PREDICTORS[:3]:
        assert report[predictor]['energy_distance'] == pytest.approx(2 * 5 * error, abs=1e-4)
    assert report['copy of the state']['energy_distance'] == pytest.approx(0, abs=1e-4)
    # Half of the random rows are 10 away: 2·5 − 2·¼·10 = 5.
    assert report['marginal']['energy_distance'] == pytest.approx(5, abs=1)
    assert report['marginal']['sliced_wasserstein'] > 1 > report['copy of the state']['sliced_wasserstein']


def test_the_intention_of_another_transition_leads_elsewhere():
    agent = WhereTheIntentionPoints(params={}, error=0.0)
    report = occupancy.occupancy_report(agent, still_episodes(), jax.random.key(0), num_states=60, num_samples=4)
    assert report['flow, z inferred']['energy_distance'] == pytest.approx(0, abs=1e-4)
    # Half of them point to where 2·10 is the distance.
    assert report['flow, z of others']['energy_distance'] == pytest.approx(10, abs=3)


def test_report_of_infom_without_intentions():
    settings = {'policy_extraction': 'one_step', 'num_flow_steps': 2}
    agent = tiny.make_agent(tiny.make_batch(), **settings)
    assert occupancy.latent_shape(agent, 3) == (3, 0)
    data = tiny.make_dataset(tiny.random_walks())
    report = occupancy.occupancy_report(agent, data, jax.random.key(0), num_states=4, num_samples=8)
    assert all(np.isfinite(value) for scores in report.values() for value in scores.values())


# --- Values ---


def test_discounted_returns_by_hand():
    # The last reward goes on for ever: 4/(1 − ½) = 8; before it 2 + 4 = 6, 1 + 3 = 4.
    np.testing.assert_allclose(values.discounted_returns([1, 2, 4], 0.5), [4, 6, 8])
    # Nothing comes after row 1.
    np.testing.assert_allclose(values.discounted_returns([1, 2, 4], 0.5, masks=[1, 0, 1]), [2, 2, 8])


@pytest.mark.parametrize('name', agents.available())
def test_which_agents_have_values_and_futures(name):
    batch, config = tiny_agents.make_batch(), tiny_agents.make_config(name)
    example = batch | dict(zip(('observation_min', 'observation_max'), tiny.OBSERVED_RANGE, strict=True))
    agent = jax.eval_shape(lambda: agents.load(name).AGENT.create(jax.random.key(0), example, config))
    assert hasattr(agent, 'q_values') == (name not in ('crl_infonce', 'td_infonce'))
    if hasattr(agent, 'q_values'):
        qs = jax.eval_shape(
            lambda agent, *inputs: agent.q_values(*inputs), agent, batch['observations'], batch['actions']
        )
        assert qs.shape == (tiny.BATCH_SIZE,)
    assert occupancy.models_occupancy(agent) == (name == 'infom')
