"""Aggregates and intervals against hand-computed values, and against what the library rliable 1.2.0 gave."""

import numpy as np
import pytest

from utils import statistics

# (seeds, tasks), as rliable takes them.
X = np.arange(1, 13).reshape(4, 3) ** 1.5
Y = np.array([[1.0, 20.0, 22.0], [12.0, X[2, 1], 16.0], [6.0, 8.0, 10.0], [0.0, 2.0, 4.0]])


def test_interquartile_mean_by_hand():
    # Pooled and sorted: 0 1 2 | 3 4 5 6 7 | 8 9 100, of which 11 // 4 = 2 go on either side.
    scores = [np.array([9.0, 0.0, 3.0]), np.array([100.0, 1.0, 8.0, 7.0]), np.array([2.0, 4.0, 5.0, 6.0])]
    assert statistics.interquartile_mean(scores) == pytest.approx((2 + 3 + 4 + 5 + 6 + 7 + 8) / 7)
    assert statistics.interquartile_mean([np.array([3.0])]) == 3.0


def test_median_and_mean_weigh_tasks_alike_whatever_their_seeds():
    scores = [np.array([0.0]), np.array([10.0, 20.0, 30.0]), np.array([1.0, 3.0])]
    assert statistics.median(scores) == 2.0
    assert statistics.mean(scores) == pytest.approx((0 + 20 + 2) / 3)


def test_probability_of_improvement_by_hand():
    # Task 1: 2 beats 1, ties with 2, loses to 3; 4 beats all three: 4.5 of 6. Task 2: 0 of 1.
    x, y = [np.array([2.0, 4.0]), np.array([0.0])], [np.array([1.0, 2.0, 3.0]), np.array([5.0])]
    assert statistics.probability_of_improvement(x, y) == pytest.approx((4.5 / 6 + 0) / 2)
    assert statistics.probability_of_improvement(x, x) == 0.5


def test_the_aggregates_are_those_of_rliable():
    x, y = list(X.T), list(Y.T)
    assert statistics.interquartile_mean(x) == pytest.approx(17.004159086603277, rel=1e-12)
    assert statistics.median(x) == pytest.approx(18.279764176031016, rel=1e-12)
    assert statistics.mean(x) == pytest.approx(18.39370022869323, rel=1e-12)
    assert statistics.probability_of_improvement(x, y) == pytest.approx(0.7083333333333334, rel=1e-12)
    assert statistics.probability_of_improvement(y, x) == pytest.approx(0.2916666666666667, rel=1e-12)
    # Numbers of runs that four does not divide.
    assert statistics.interquartile_mean(list((np.arange(10.0).reshape(5, 2) ** 2).T)) == pytest.approx(139 / 6)
    assert statistics.interquartile_mean(list((np.arange(9.0).reshape(3, 3) ** 2).T)) == pytest.approx(18.0)


def test_a_bootstrap_interval_by_enumeration():
    """Of two seeds 0 and 1, the mean of a replicate is 0, ½ or 1 with chances ¼, ½, ¼."""
    assert statistics.bootstrap_interval(statistics.mean, [np.array([0.0, 1.0])]) == (0.0, 1.0)
    # Four of 0 and 1 each: binomial(8, ½) / 8, whose 2.5 % quantile is 1/8 and 97.5 % quantile 7/8.
    scores = [np.array([0.0] * 4 + [1.0] * 4)]
    assert statistics.bootstrap_interval(statistics.mean, scores, replicates=20_000) == (0.125, 0.875)


def test_the_bootstrap_is_stratified():
    """Seeds are drawn within tasks: two tasks without any spread have none in the aggregate, however far apart."""
    scores = [np.array([0.0, 0.0]), np.array([100.0, 100.0])]
    assert statistics.bootstrap_interval(statistics.interquartile_mean, scores) == (50.0, 50.0)


def test_the_bootstrap_draws_methods_independently_and_repeatably():
    x, y = [np.array([0.0, 2.0])], [np.array([1.0])]
    assert statistics.bootstrap_interval(statistics.probability_of_improvement, x, y) == (0.0, 1.0)
    scores = [np.random.default_rng(0).normal(size=5) for _ in range(3)]
    first = statistics.bootstrap_interval(statistics.median, scores)
    assert statistics.bootstrap_interval(statistics.median, scores) == first
    assert first[0] < statistics.median(scores) < first[1]


def test_one_seed_has_neither_interval_nor_standard_deviation():
    assert statistics.bootstrap_interval(statistics.mean, [np.array([1.0]), np.array([2.0])]) is None
    assert statistics.standard_deviation([1.0]) is None
    assert statistics.standard_deviation([1.0, 3.0]) == pytest.approx(2**0.5)
