"""Statistics of scores over seeds and tasks: robust aggregates and their stratified bootstrap intervals, after
"Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2108.13264). NumPy only.

Scores are a list over tasks of arrays (..., seeds): tasks may have unequal numbers of seeds, leading axes are
replicates. With equal numbers the aggregates are those of the library `rliable`.
"""

from collections.abc import Callable, Sequence

import numpy as np

Scores = Sequence[np.ndarray]

REPLICATES = 2_000
CONFIDENCE = 0.95


def interquartile_mean(scores: Scores) -> np.ndarray:
    """Mean of the middle half of all runs, pooled over tasks: the lowest and the highest floor(n / 4) are left out."""
    pooled = np.sort(np.concatenate(scores, axis=-1), axis=-1)
    count = pooled.shape[-1]
    return pooled[..., count // 4 : count - count // 4].mean(axis=-1)


def median(scores: Scores) -> np.ndarray:
    """Median over tasks of the means over seeds."""
    return np.median([np.mean(task, axis=-1) for task in scores], axis=0)


def mean(scores: Scores) -> np.ndarray:
    """Mean over tasks of the means over seeds."""
    return np.mean([np.mean(task, axis=-1) for task in scores], axis=0)


def probability_of_improvement(x: Scores, y: Scores) -> np.ndarray:
    """P(X > Y) for one seed of each method on the same task, ties counted half, averaged over tasks.

    x, y: the scores of two methods on the same tasks in the same order.
    """
    wins = []
    for ours, theirs in zip(x, y, strict=True):
        difference = np.asarray(ours)[..., :, None] - np.asarray(theirs)[..., None, :]
        wins.append(np.mean((difference > 0) + 0.5 * (difference == 0), axis=(-2, -1)))
    return np.mean(wins, axis=0)


def bootstrap_interval(
    statistic: Callable[..., np.ndarray], *methods: Scores, replicates: int = REPLICATES, seed: int = 0
) -> tuple[float, float] | None:
    """The percentile interval of `statistic(*methods)` when seeds are drawn again with replacement within each task.

    methods: for each, one array (seeds,) a task.

    Returns:
        (low, high) at confidence `CONFIDENCE`; None where no task has two seeds: there is nothing to draw from.
    """
    if not any(len(task) > 1 for scores in methods for task in scores):
        return None
    rng = np.random.default_rng(seed)
    drawn = [[rng.choice(task, (replicates, len(task))) for task in scores] for scores in methods]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(*drawn), [tail, 1 - tail])
    return float(low), float(high)


def standard_deviation(values: Sequence[float]) -> float | None:
    """With n − 1; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
