"""Rows, episodes and batches: nothing crosses an episode, stacks repeat the first frame, crops agree, labels stay
where they belong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from utils import datasets
from utils.datasets import Dataset
from utils.errors import UserError
from utils.normalizers import Normalizer

NEXT = frozenset({'next_actions'})
IDENTITY = Normalizer('none')


def numbered(lengths, **extra):
    """Row arrays in which every observation and action is its row's number; lengths are rows of each episode."""
    rows = np.arange(sum(lengths), dtype=np.float32)
    terminals = np.zeros(len(rows), bool)
    terminals[np.cumsum(lengths) - 1] = True
    scaled = (rows / len(rows))[:, None]
    return {'observations': rows[:, None], 'actions': scaled, 'terminals': terminals, **extra}


def episode_of(lengths, rows):
    return np.searchsorted(np.cumsum(lengths), rows, side='right')


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=8).filter(lambda lengths: max(lengths) > 2), st.integers(0, 99))
def test_batches_never_cross_an_episode(lengths, seed):
    raw = numbered(lengths)
    dataset = Dataset.create(raw, IDENTITY)
    batch = datasets.sample(jax.tree.map(jnp.asarray, dataset), jax.random.key(seed), 64, NEXT)
    rows = np.asarray(batch['observations'][:, 0]).astype(int)
    next_rows = np.asarray(batch['next_observations'][:, 0]).astype(int)
    next_action_rows = np.round(np.asarray(batch['next_actions'][:, 0]) * len(raw['actions'])).astype(int)
    np.testing.assert_array_equal(next_rows, rows + 1)
    np.testing.assert_array_equal(episode_of(lengths, rows), episode_of(lengths, next_rows))
    np.testing.assert_array_equal(next_action_rows, rows + 1)
    assert not raw['terminals'][next_action_rows].any(), "an episode's last row holds no action"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=8))
def test_every_transition_is_in_the_pool_once(lengths):
    raw = numbered(lengths)
    if max(lengths) < 3:
        with pytest.raises(UserError, match='two transitions'):
            Dataset.create(raw, IDENTITY)
        return
    dataset = Dataset.create(raw, IDENTITY)
    np.testing.assert_array_equal(dataset.transition_rows, np.flatnonzero(~raw['terminals']))
    assert dataset.num_transitions == sum(lengths) - len(lengths)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    np.testing.assert_array_equal(dataset.starts, starts)
    np.testing.assert_array_equal(dataset.ends, starts + np.repeat(lengths, lengths) - 1)


def test_what_ends_the_task_needs_no_next_action():
    """Rows 3 and 7 are final states. The transitions into them, 2 and 6, have no next action; 2 ends the task, as row 4
    does within its episode, and serves an agent whose targets end with a mask of 0."""
    masks = np.array([1, 1, 0, np.nan, 0, 1, 1, 0], np.float32)
    raw = numbered([4, 4], rewards=np.arange(8, dtype=np.float32), masks=masks)
    dataset = tiny.make_dataset(raw)
    np.testing.assert_array_equal(dataset.end_labels, [2, 4])
    sampled = {
        needs: np.unique(datasets.sample_rows(dataset, jax.random.key(0), 200, needs))
        for needs in (frozenset(), NEXT, NEXT | {'task_ends'})
    }
    assert [rows.tolist() for rows in sampled.values()] == [[0, 1, 2, 4, 5, 6], [0, 1, 4, 5], [0, 1, 2, 4, 5]]
    batch = datasets.gather_batch(dataset, jnp.arange(3), NEXT | {'task_ends'})
    np.testing.assert_allclose(batch['next_actions'][:, 0], np.array([1, 2, 2]) / 8)
    np.testing.assert_array_equal(batch['next_observations'][:, 0], [1, 2, 3])
    reward_free = tiny.make_dataset(numbered([4, 4]))
    assert len(reward_free.end_labels) == 0
    np.testing.assert_array_equal(reward_free.bootstrap_rows, reward_free.next_action_rows)


def test_sampling_is_uniform_over_transitions():
    dataset = tiny.make_dataset(numbered([4, 8]))
    rows = np.asarray(datasets.sample_rows(dataset, jax.random.key(0), 20_000))
    counts = np.bincount(rows, minlength=12)
    assert counts[3] == counts[11] == 0
    np.testing.assert_allclose(counts[counts > 0] / 20_000, 1 / 10, atol=0.01)


def test_reward_free_batches_hold_no_reward_and_masks_of_one():
    dataset = tiny.make_dataset(tiny.random_walks())
    batch = datasets.sample(dataset, jax.random.key(0), 16, NEXT)
    assert set(batch) == {'observations', 'actions', 'next_observations', 'next_actions', 'masks'}
    np.testing.assert_array_equal(batch['masks'], 1)


@pytest.mark.parametrize('reward_at', ['observations', 'next_observations'])
def test_the_reward_belongs_to_the_state_that_the_suite_says(reward_at):
    dataset = tiny.make_dataset(tiny.random_walks(labelled=True), reward_at=reward_at)
    batch = datasets.sample(dataset, jax.random.key(0), 16)
    np.testing.assert_array_equal(batch['reward_observations'], batch[reward_at])
    # The walks label a row by its own state.
    np.testing.assert_allclose(batch['rewards'], batch['observations'][:, 0] - 1, atol=1e-6)


def test_actions_are_clipped_inside_the_bounds():
    raw = tiny.random_walks()
    raw['actions'][:2] = [[1, -1, 1], [-1, 1, -1]]
    assert np.abs(Dataset.create(raw, IDENTITY).actions).max() == np.float32(1 - 1e-5)


def image_dataset(lengths, frame_stack, p_aug=0.0):
    """8×8 images whose every pixel is the row's number."""
    raw = numbered(lengths)
    raw['observations'] = np.broadcast_to(
        np.arange(sum(lengths), dtype=np.uint8)[:, None, None, None], (sum(lengths), 8, 8, 1)
    ).copy()
    return tiny.make_dataset(raw, frame_stack=frame_stack, p_aug=p_aug)


def test_frame_stacks_run_oldest_first_and_repeat_the_first_frame():
    dataset = image_dataset([4, 5], frame_stack=3)
    stacks = datasets.gather_observations(dataset, jnp.arange(9, dtype=jnp.int32))[:, 0, 0]
    expected = [
        [0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3],
        [4, 4, 4], [4, 4, 5], [4, 5, 6], [5, 6, 7], [6, 7, 8],
    ]  # fmt: skip
    np.testing.assert_array_equal(stacks, expected)
    assert stacks.dtype == np.uint8


def gradient_images(lengths, p_aug):
    """Images whose pixels tell their position, plus the row's number in a second channel."""
    rows = sum(lengths)
    position = np.arange(64, dtype=np.uint8).reshape(8, 8)
    images = np.stack([np.broadcast_to(position, (rows, 8, 8)), np.zeros((rows, 8, 8), np.uint8)], axis=-1)
    images[..., 1] += np.arange(rows, dtype=np.uint8)[:, None, None]
    raw = {**numbered(lengths), 'observations': images}
    return tiny.make_dataset(raw, frame_stack=2, p_aug=p_aug)


def test_a_row_is_cropped_alike_in_s_next_s_and_all_frames():
    batch = datasets.sample(gradient_images([6, 6], p_aug=1.0), jax.random.key(2), 32)
    s, next_s = batch['observations'], batch['next_observations']
    assert s.shape == (32, 8, 8, 4) and s.dtype == np.uint8
    for images in (s[..., 2], next_s[..., 0], next_s[..., 2]):
        np.testing.assert_array_equal(images, s[..., 0])
    assert len({image.tobytes() for image in np.asarray(s[..., 0])}) > 10, 'offsets differ from row to row'
    np.testing.assert_array_equal(next_s[:, 0, 0, 1], s[:, 0, 0, 3])


@pytest.mark.parametrize('reward_at', ['observations', 'next_observations'])
def test_the_state_of_the_reward_is_cropped_with_its_row(reward_at):
    raw = numbered([6, 6]) | {'rewards': np.zeros(12, np.float32), 'masks': np.ones(12, np.float32)}
    images = gradient_images([6, 6], p_aug=1.0).observations
    dataset = tiny.make_dataset({**raw, 'observations': np.asarray(images)}, p_aug=1.0, reward_at=reward_at)
    batch = datasets.sample(dataset, jax.random.key(2), 32)
    np.testing.assert_array_equal(batch['reward_observations'], batch[reward_at])
    assert not np.array_equal(batch['observations'], batch['next_observations'])


def test_cropping_shifts_by_its_offset_and_replicates_edges():
    image = jnp.arange(64, dtype=jnp.uint8).reshape(1, 8, 8, 1)
    padded = np.pad(np.asarray(image)[0, :, :, 0], 3, mode='edge')
    for offset in ([0, 0], [3, 3], [6, 1]):
        cropped = datasets.random_crop(image, jnp.array([offset]))[0, :, :, 0]
        np.testing.assert_array_equal(cropped, padded[offset[0] : offset[0] + 8, offset[1] : offset[1] + 8])


def test_rows_goals_and_crops_have_keys_of_their_own(monkeypatch):
    keys = []

    def recorded(draw):
        return lambda *arguments: keys.append(tuple(jax.random.key_data(arguments[1]).tolist())) or draw(*arguments)

    for name in ('sample_rows', 'sample_goals', 'augment'):
        monkeypatch.setattr(datasets, name, recorded(getattr(datasets, name)))
    datasets.sample(gradient_images([6, 6], p_aug=1.0), jax.random.key(2), 4)
    assert len(keys) == len(set(keys)) == 3


def test_crops_have_every_offset_alike_often():
    pixels = np.asarray(datasets.sample(gradient_images([6, 6], p_aug=1.0), jax.random.key(2), 2000)['observations'])
    row, column = np.divmod(pixels[:, 4, 4, 0], 8)  # What came to a place that no offset reaches from beyond an edge.
    for place in (row, column):
        np.testing.assert_allclose(np.bincount(place, minlength=8) / 2000, [0, *[1 / 7] * 7], atol=0.03)


@pytest.mark.parametrize('p_aug', [0.0, 0.3])
def test_augmentation_has_its_probability_per_batch(p_aug):
    dataset = gradient_images([6, 6], p_aug=p_aug)
    sample = jax.jit(lambda key: datasets.sample(dataset, key, 8)['observations'][..., 0])
    plain = np.arange(64, dtype=np.uint8).reshape(8, 8)
    shares = np.mean([(np.asarray(sample(key)) != plain).any() for key in jax.random.split(jax.random.key(0), 200)])
    assert shares == 0 if p_aug == 0 else abs(shares - p_aug) < 0.1


def test_the_example_batch_has_the_range_of_all_rows():
    raw = tiny.random_walks()
    raw['observations'][-1] = 7 * (-1.0) ** np.arange(tiny.STATE_DIM)  # A final state, which no transition leaves.
    example = datasets.example_batch(tiny.make_dataset(raw))
    np.testing.assert_array_equal(example['observation_min'], raw['observations'].min(axis=0))
    np.testing.assert_array_equal(example['observation_max'], raw['observations'].max(axis=0))


def test_bad_rows_are_refused():
    raw = tiny.random_walks()
    with pytest.raises(UserError, match='end of an episode'):
        Dataset.create({**raw, 'terminals': np.zeros_like(raw['terminals'])}, IDENTITY)
    with pytest.raises(UserError, match='both rewards and masks'):
        Dataset.create({**raw, 'rewards': np.zeros(len(raw['terminals']), np.float32)}, IDENTITY)


# ------------------------------------------------------------------------------------------------------- normalisers


def test_normal_and_bounded_against_numpy():
    observations = (np.random.default_rng(0).normal(size=(250_000, 3)) * [1, 50, 1e-3] + [0, 1e4, 5]).astype(np.float32)
    exact = observations.astype(np.float64)
    normalizer = Normalizer.fit(observations, 'normal')
    np.testing.assert_allclose(normalizer.shift, exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(normalizer.scale, exact.std(axis=0), rtol=1e-5)
    np.testing.assert_allclose(Normalizer.fit(observations[:5], 'normal').scale, exact[:5].std(axis=0), rtol=1e-5)
    bounded = Normalizer.fit(observations, 'bounded')(observations)
    np.testing.assert_allclose([bounded.min(axis=0), bounded.max(axis=0)], [[-1] * 3, [1] * 3], atol=1e-5)


def test_constant_features_are_left_unscaled():
    observations = np.tile(np.array([[2.0, 0.0]], np.float32), (10, 1))
    observations[:, 1] = np.arange(10)
    for kind in ('normal', 'bounded'):
        assert Normalizer.fit(observations, kind).scale[0] == 1


def test_a_normalizer_survives_json_exactly():
    import json

    normalizer = Normalizer.fit(tiny.random_walks()['observations'], 'normal')
    again = Normalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
    np.testing.assert_array_equal(again.shift, normalizer.shift)
    np.testing.assert_array_equal(again.scale, normalizer.scale)
    assert Normalizer.from_dict(Normalizer('none').to_dict()) == Normalizer('none')


def test_images_and_unknown_kinds_are_refused():
    with pytest.raises(UserError, match='on images'):
        Normalizer.fit(np.zeros((2, 4, 4, 3), np.uint8), 'normal')
    with pytest.raises(UserError, match='none, normal or bounded'):
        Normalizer.fit(np.zeros((2, 4), np.float32), 'standard')
