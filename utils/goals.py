"""Goals of a batch: how an agent says which it wants, and how their rows are drawn.

An agent puts a `Goals` for each kind of goal into its `needs`; `datasets.sample` adds the states to the batch. Only
rows are drawn here; turning them into observations is `utils/datasets.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Goals:
    """A goal for each row t of a batch, from one of three sources; their probabilities sum to 1.

    Hashable, so that it is a static argument of compiled functions.

    Attributes:
        name: the batch gets `<name>s`, the goals' observations, and `<name>_masks` (B,), 1 where the goal is not row t
            itself and 0 where it is: equality of rows, not of observations.
        future: probability of a state that the discounted occupancy of the episode gives: row min(t + k, end) with
            k = first_offset − 1 + Geom(1 − discount), Geom counted from 1.
        trajectory: probability of a state drawn uniformly from the later ones of the episode, t < row ≤ end.
        marginal: probability of a state drawn uniformly from the whole data set, final states included.
        discount: of the offsets of `future`.
        first_offset: smallest offset of `future`; 0 admits row t itself.
    """

    name: str
    _: dataclasses.KW_ONLY
    future: float = 0.0
    trajectory: float = 0.0
    marginal: float = 0.0
    discount: float | None = None
    first_offset: int = 1

    def __post_init__(self):
        probabilities = (self.future, self.trajectory, self.marginal)
        if min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-6:
            raise UserError(f'goals {self.name!r}: the probabilities {probabilities} are no distribution')
        if self.future and not (self.discount is not None and 0 <= self.discount < 1):
            raise UserError(f'goals {self.name!r}: discount {self.discount}: expected a number from 0, below 1')
        if self.first_offset < 0:
            raise UserError(f'goals {self.name!r}: first offset {self.first_offset}: expected 0 or more')


def sample_goal_rows(goals: Goals, key, rows, ends, num_rows: int):
    """Rows (B,) of the goals of `rows` (B,), which all have a later row in their episode.

    ends (B,): last rows of their episodes. num_rows: of the data set.
    """
    future_key, trajectory_key, marginal_key, choice_key = jax.random.split(key, 4)
    candidates = []  # (probability, rows)
    if goals.future:
        offsets = jax.random.geometric(future_key, 1.0 - goals.discount, rows.shape, dtype=rows.dtype)
        candidates.append((goals.future, jnp.minimum(rows + goals.first_offset - 1 + offsets, ends)))
    if goals.trajectory:
        candidates.append((goals.trajectory, jax.random.randint(trajectory_key, rows.shape, rows + 1, ends + 1)))
    if goals.marginal:
        candidates.append((goals.marginal, jax.random.randint(marginal_key, rows.shape, 0, num_rows)))
    probability, goal_rows = candidates[0]
    for more, others in candidates[1:]:
        choice_key, key = jax.random.split(choice_key)
        # Pairwise: the rows so far stay with their share of the probability up to here.
        keep = jax.random.uniform(key, rows.shape) < probability / (probability + more)
        probability, goal_rows = probability + more, jnp.where(keep, goal_rows, others)
    return goal_rows
