"""Goals of a batch: inside the episode, later than the row, with the distribution that was asked for, and cropped and
stacked like the row's own images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny_agents
from tests.test_datasets import episode_of, gradient_images, image_dataset, numbered
from tests.tiny import make_dataset
from utils import datasets
from utils.errors import UserError
from utils.goals import Goals, sample_goal_rows

EPISODES = st.lists(st.integers(2, 9), min_size=1, max_size=8)


def rows_of(observations):
    return np.asarray(observations[:, 0]).astype(int)


def sample_episode(goals, length=400, first=100, num_rows=1000, row=120, size=20_000, seed=0):
    """Goals' rows of one row of an episode that spans [first, first + length)."""
    rows, ends = jnp.full(size, row, jnp.int32), jnp.full(size, first + length - 1, jnp.int32)
    return np.asarray(sample_goal_rows(goals, jax.random.key(seed), rows, ends, num_rows))


@settings(max_examples=25, deadline=None)
@given(EPISODES, st.integers(0, 99), st.sampled_from([0, 1, 3]))
def test_goals_stay_inside_the_episode_and_after_the_row(lengths, seed, first_offset):
    raw = numbered(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    # Always the same number of rows: shapes cost compilations.
    rows = np.resize(np.flatnonzero(~raw['terminals']), 64).astype(np.int32)
    ends = starts[episode_of(lengths, rows)] + np.asarray(lengths)[episode_of(lengths, rows)] - 1
    for goals, first in (
        (Goals('goal', future=1.0, discount=0.9, first_offset=first_offset), np.minimum(rows + first_offset, ends)),
        (Goals('goal', trajectory=1.0), rows + 1),
        (Goals('goal', future=0.5, trajectory=0.5, discount=0.5), rows + 1),
    ):
        goal_rows = np.asarray(sample_goal_rows(goals, jax.random.key(seed), jnp.asarray(rows), ends, len(rows)))
        assert (goal_rows >= first).all() and (goal_rows <= ends).all()


def test_future_offsets_are_geometric_and_end_with_the_episode():
    """P(k) = (1−γ)·γ^(k−1) from 1, with all that lies beyond the end on the final state."""
    discount = 0.9
    offsets = sample_episode(Goals('goal', future=1.0, discount=discount), length=41) - 120
    expected = (1 - discount) * discount ** (np.arange(1, 21) - 1)
    expected[-1] = discount**19
    np.testing.assert_allclose(np.bincount(offsets, minlength=21)[1:] / len(offsets), expected, atol=0.01)
    shifted = sample_episode(Goals('goal', future=1.0, discount=discount, first_offset=0), length=41) - 120
    np.testing.assert_allclose((shifted == 0).mean(), 1 - discount, atol=0.01)


def test_trajectory_goals_are_uniform_over_the_later_states():
    rows = sample_episode(Goals('goal', trajectory=1.0), length=31)
    np.testing.assert_allclose(np.bincount(rows - 120, minlength=11)[1:] / len(rows), 0.1, atol=0.01)


def test_marginal_goals_are_uniform_over_the_data():
    rows = sample_episode(Goals('goal', marginal=1.0), num_rows=10, row=3)
    np.testing.assert_allclose(np.bincount(rows, minlength=10) / len(rows), 0.1, atol=0.01)


def test_sources_have_their_probabilities():
    goals = Goals('goal', future=0.5, trajectory=0.2, marginal=0.3, discount=0.0)
    rows = sample_episode(goals, num_rows=100)  # Marginal goals are before the episode, future ones the next row.
    np.testing.assert_allclose(
        [(rows == 121).mean(), (rows > 121).mean(), (rows < 100).mean()], [0.5, 0.2, 0.3], atol=0.01
    )


def test_a_batch_holds_the_goals_that_were_asked_for():
    """Names, row equality, and independence of what else is asked for: streams do not change with the needs."""
    dataset = make_dataset(numbered([3, 3]))
    goals, actor_goals = Goals('goal', marginal=1.0), Goals('actor_goal', trajectory=1.0)
    batch = datasets.sample(dataset, jax.random.key(0), 64, frozenset({goals, actor_goals, 'next_actions'}))
    names = {'observations', 'actions', 'next_observations', 'next_actions', 'masks'}
    assert set(batch) == names | {'goals', 'goal_masks', 'actor_goals', 'actor_goal_masks'}
    rows, goal_rows = rows_of(batch['observations']), rows_of(batch['goals'])
    np.testing.assert_array_equal(batch['goal_masks'], rows != goal_rows)
    assert 0 < batch['goal_masks'].mean() < 1 and batch['goal_masks'].dtype == np.float32
    np.testing.assert_array_equal(batch['actor_goal_masks'], 1)
    assert (rows_of(batch['actor_goals']) > rows).all() and set(goal_rows) == set(range(6))
    plain = datasets.sample(dataset, jax.random.key(0), 64, frozenset({'next_actions'}))
    for name in plain:
        np.testing.assert_array_equal(plain[name], batch[name])


def test_two_goals_of_one_source_are_drawn_apart():
    needs = frozenset({Goals('goal', marginal=1.0), Goals('actor_goal', marginal=1.0)})
    batch = datasets.sample(make_dataset(numbered([3, 3])), jax.random.key(0), 64, needs)
    assert np.mean(rows_of(batch['goals']) == rows_of(batch['actor_goals'])) < 0.4, 'by chance a sixth'


def test_equal_observations_are_not_equal_rows():
    """A goal that looks like the row's state, but is another row, is not reached."""
    raw = numbered([6])
    raw['observations'] = np.zeros_like(raw['observations'])
    batch = datasets.sample(make_dataset(raw), jax.random.key(0), 64, frozenset({Goals('goal', trajectory=1.0)}))
    np.testing.assert_array_equal(batch['goals'], batch['observations'])
    np.testing.assert_array_equal(batch['goal_masks'], 1)


def test_goals_are_stacks_of_their_own_frames():
    dataset = image_dataset([4, 5], frame_stack=3)
    stacks = datasets.sample(dataset, jax.random.key(0), 32, frozenset({Goals('goal', marginal=1.0)}))['goals'][:, 0, 0]
    last = np.asarray(stacks[:, 2]).astype(int)
    start = np.where(last < 4, 0, 4)
    for frame in range(3):
        np.testing.assert_array_equal(stacks[:, frame], np.maximum(last - 2 + frame, start))


def test_goals_are_cropped_like_their_row():
    needs = frozenset({Goals('goal', marginal=1.0), Goals('actor_goal', trajectory=1.0)})
    batch = datasets.sample(gradient_images([6, 6], p_aug=1.0), jax.random.key(2), 32, needs)
    for name in ('goals', 'actor_goals'):
        assert batch[name].dtype == np.uint8
        np.testing.assert_array_equal(batch[name][..., 0], batch['observations'][..., 0])
    assert len({image.tobytes() for image in np.asarray(batch['goals'][..., 0])}) > 10


@pytest.mark.parametrize(
    'options',
    [
        dict(future=0.5, discount=0.9),
        dict(future=1.5, marginal=-0.5, discount=0.9),
        dict(future=1.0),
        dict(future=1.0, discount=1.0),
        dict(trajectory=1.0, first_offset=-1),
    ],
)
def test_impossible_goals_are_user_errors(options):
    with pytest.raises(UserError, match="'goal'"):
        Goals('goal', **options)


def test_the_goals_that_agents_ask_for():
    """Of the published settings, and of those that may be chosen instead."""
    batch = tiny_agents.make_batch()

    def goals_of(name, **settings):
        agent = tiny_agents.make_agent(name, batch, discount=0.9, **settings)
        return {need for need in agent.needs if isinstance(need, Goals)}

    later, anywhere = Goals('actor_goal', trajectory=1.0), Goals('actor_goal', marginal=1.0)
    future = Goals('goal', future=1.0, discount=0.9)
    assert goals_of('crl_infonce') == {future, later}
    assert goals_of('crl_infonce', goal_offset=0, actor_goals='marginal') == {
        Goals('goal', future=1.0, discount=0.9, first_offset=0),
        anywhere,
    }
    assert goals_of('td_infonce') == {future, later}
    marginal = {anywhere, Goals('goal', marginal=1.0, discount=0.9)}
    assert goals_of('td_infonce', goals='marginal', actor_goals='marginal') == marginal
    distances = {Goals('goal', future=0.625, marginal=0.375, discount=0.9)}
    assert goals_of('hilp_iql') == goals_of('infom', intention_encoder='hilp') == distances
    assert goals_of('infom') == set()
