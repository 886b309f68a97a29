"""Cross-validation of the learned reward: folds are whole episodes, and its scores tell a reward that the state
decides from one that it does not."""

import numpy as np
import pytest

from benchmarks import reward_fit
from tests import tiny
from utils.errors import UserError

CONFIG = tiny.make_config(lr=1e-2, clip_flow_goals=False)


def test_folds_are_whole_episodes_in_turn():
    dataset = tiny.make_dataset(tiny.random_walks(num_episodes=7, labelled=True))
    fold_of = reward_fit.folds(dataset, 3)
    np.testing.assert_array_equal(fold_of, np.repeat([0, 1, 2, 0, 1, 2, 0], 15))
    with pytest.raises(UserError, match='7 episodes cannot be parted into 8 folds'):
        reward_fit.folds(dataset, 8)


def test_a_reward_of_the_state_is_explained_on_other_episodes_and_noise_is_not():
    raw = tiny.random_walks(labelled=True)
    (first, last) = reward_fit.cross_validate(tiny.make_dataset(raw), CONFIG, (100, 500), num_folds=2, seed=0)
    assert last[0] < first[0]
    assert last[1] > 0.9 and last[2] > 0.8

    raw['rewards'] = np.random.default_rng(1).permutation(raw['rewards'])
    _, (_, correlation, explained) = reward_fit.cross_validate(
        tiny.make_dataset(raw), CONFIG, (100, 500), num_folds=2, seed=0
    )
    assert abs(correlation) < 0.3 and explained < 0.1
