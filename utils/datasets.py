"""Trajectories as arrays, and batches drawn from them by pure functions of a key.

A `Dataset` keeps every row of every episode once, the final state included; next observations, next actions and frame
stacks are indices into it. `sample` runs on the device inside the compiled training chunk. Reading files and labelling
rewards happen in `envs/`.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np

from utils.errors import UserError
from utils.goals import Goals, sample_goal_rows

ACTION_LIMIT = 1.0 - 1e-5  # Data set actions are clipped to ±this, so that a squashed policy can reach them.
CROP_PADDING = 3  # Pixels of edge replication around an image before its random crop.


class Dataset(flax.struct.PyTreeNode):
    """Rows of all episodes and the indices that give them structure.

    observations (rows, D) float32, normalised, or (rows, H, W, C) uint8; actions (rows, A) float32; starts, ends
    (rows,) int32: first and last row of the row's episode; transition_rows (T,) int32: rows that have a next state;
    next_action_rows: those whose next row has an action too; bootstrap_rows: those, and the ones that end the task
    (mask 0), after which no action is asked for. rewards and masks (rows,) float32 exist in labelled sets
    only. reward_at says which state a row's reward belongs to. next_actions_across_episodes: the last transition of an
    episode takes its next action from the first row of the following one, and is not left out for want of one.
    """

    observations: jax.Array
    actions: jax.Array
    starts: jax.Array
    ends: jax.Array
    transition_rows: jax.Array
    next_action_rows: jax.Array
    bootstrap_rows: jax.Array
    rewards: jax.Array | None
    masks: jax.Array | None
    reward_at: str = flax.struct.field(pytree_node=False)
    frame_stack: int = flax.struct.field(pytree_node=False)
    p_aug: float = flax.struct.field(pytree_node=False)
    next_actions_across_episodes: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        raw,
        normalizer,
        *,
        reward_at='observations',
        frame_stack=1,
        p_aug=0.0,
        next_actions_across_episodes=False,
    ) -> 'Dataset':
        """From the row arrays of `envs.data.load_raw` (numpy); arrays stay on the host until `jax.device_put`.

        Raises UserError where no episode is long enough for a next action, or rewards and masks do not come together.
        """
        terminals = raw['terminals'].astype(bool)
        last_rows = np.flatnonzero(terminals)
        if len(terminals) == 0 or not terminals[-1]:
            raise UserError('the last row of a data set must be the end of an episode (terminals=1)')
        lengths = np.diff(last_rows, prepend=-1)
        ends = np.repeat(last_rows, lengths).astype(np.int32)
        starts = np.repeat(last_rows - lengths + 1, lengths).astype(np.int32)
        rows = np.arange(len(terminals), dtype=np.int32)
        # The final row of an episode holds no action, so the transition into it has no next action.
        has_next_action = rows + 1 < ends
        next_action_rows = rows[has_next_action]
        if len(next_action_rows) == 0:
            raise UserError('no episode of the data set has two transitions: there is no next action to learn from')
        if ('rewards' in raw) != ('masks' in raw):
            raise UserError('a labelled data set needs both rewards and masks')
        ends_task = raw['masks'] == 0 if 'masks' in raw else np.zeros(len(rows), bool)
        return cls(
            observations=normalizer(raw['observations']),
            actions=np.clip(raw['actions'], -ACTION_LIMIT, ACTION_LIMIT),
            starts=starts,
            ends=ends,
            transition_rows=rows[rows < ends],
            next_action_rows=next_action_rows,
            bootstrap_rows=rows[has_next_action | (ends_task & (rows < ends))],
            rewards=raw.get('rewards'),
            masks=raw.get('masks'),
            reward_at=reward_at,
            frame_stack=frame_stack,
            p_aug=p_aug,
            next_actions_across_episodes=next_actions_across_episodes,
        )

    @property
    def num_transitions(self) -> int:
        return len(self.transition_rows)

    @property
    def end_labels(self):
        """Labels of the transitions that end the task (mask 0): (K,), none without labels."""
        if self.masks is None:
            return np.zeros(0, np.float32)
        return self.rewards[self.transition_rows][self.masks[self.transition_rows] == 0]


def gather_observations(dataset: Dataset, rows):
    """Observations of `rows` (B,): (B, D), or images with `frame_stack` frames on the channel axis, oldest first: (B,
    H, W, F·C).

    Frames before the start of the episode repeat its first one.
    """
    if dataset.frame_stack == 1:
        return dataset.observations[rows]
    offsets = jnp.arange(dataset.frame_stack - 1, -1, -1, dtype=rows.dtype)
    stacked_rows = jnp.maximum(rows[:, None] - offsets, dataset.starts[rows][:, None])  # (B, F)
    frames = jnp.moveaxis(dataset.observations[stacked_rows], 1, -2)  # (B, H, W, F, C)
    return frames.reshape(*frames.shape[:-2], -1)


def sample_rows(dataset: Dataset, key, batch_size: int, needs=frozenset()):
    """Rows (B,) uniform over transitions; over those with a next action where `needs` has `next_actions`, and where it
    has `task_ends` over those that end the task as well."""
    pool = dataset.transition_rows
    if 'next_actions' in needs and not dataset.next_actions_across_episodes:
        pool = dataset.bootstrap_rows if 'task_ends' in needs else dataset.next_action_rows
    return pool[jax.random.randint(key, (batch_size,), 0, len(pool))]


def gather_batch(dataset: Dataset, rows, needs=frozenset()):
    """The batch of transitions at `rows`: observations, actions, next_observations, masks, and what `needs` and labels
    add.

    Labelled sets give rewards, masks and reward_observations (the state s̃ that the reward belongs to); reward-free
    ones give masks of 1 and nothing of the reward. The next action of a transition that has none, which only
    `task_ends` asks for, is its own action: a placeholder that its mask of 0 keeps out of every target.
    """
    batch = {
        'observations': gather_observations(dataset, rows),
        'actions': dataset.actions[rows],
        'next_observations': gather_observations(dataset, rows + 1),
    }
    if 'next_actions' in needs:
        next_rows = rows + 1
        if dataset.next_actions_across_episodes:  # A final state has no action: on to the next row that has one.
            next_rows = jnp.where(next_rows == dataset.ends[rows], next_rows + 1, next_rows) % len(dataset.actions)
        elif 'task_ends' in needs and len(dataset.bootstrap_rows) > len(dataset.next_action_rows):
            next_rows = jnp.minimum(next_rows, dataset.ends[rows] - 1)
        batch['next_actions'] = dataset.actions[next_rows]
    if dataset.rewards is None:
        batch['masks'] = jnp.ones(rows.shape, jnp.float32)
    else:
        batch.update(rewards=dataset.rewards[rows], masks=dataset.masks[rows])
        # The very same array, so that XLA encodes an image once.
        batch['reward_observations'] = batch[dataset.reward_at]
    return batch


def random_crop(images, offsets):
    """Pads images (B, H, W, C) by edge replication and crops them back to H × W at `offsets` (B, 2) in [0,
    2·CROP_PADDING]."""
    padding = ((0, 0), (CROP_PADDING, CROP_PADDING), (CROP_PADDING, CROP_PADDING), (0, 0))
    padded = jnp.pad(images, padding, mode='edge')

    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def sample_goals(dataset: Dataset, key, rows, needs=frozenset()):
    """What the `Goals` among `needs` ask for, for the transitions at `rows`; `utils.goals.Goals` lists the entries."""
    batch = {}
    # A set has no order of its own that two processes would agree on.
    kinds = sorted((need for need in needs if isinstance(need, Goals)), key=lambda goals: goals.name)
    for index, goals in enumerate(kinds):
        goal_rows = sample_goal_rows(
            goals, jax.random.fold_in(key, index), rows, dataset.ends[rows], len(dataset.observations)
        )
        batch[f'{goals.name}s'] = gather_observations(dataset, goal_rows)
        batch[f'{goals.name}_masks'] = (goal_rows != rows).astype(jnp.float32)
    return batch


def augment(batch, key, p_aug: float, reward_at: str):
    """With probability `p_aug` for the whole batch, crops each row's images at a random offset, the same for s, s',
    goals and stacked frames."""
    gate_key, offset_key = jax.random.split(key)
    batch_size = batch['actions'].shape[0]
    offsets = jax.random.randint(offset_key, (batch_size, 2), 0, 2 * CROP_PADDING + 1)
    # The centre offset is the identity, which spares a branch on the gate.
    offsets = jnp.where(jax.random.uniform(gate_key) < p_aug, offsets, CROP_PADDING)
    images = [k for k in batch if batch[k].ndim == 4 and k != 'reward_observations']
    batch = {**batch, **{k: random_crop(batch[k], offsets) for k in images}}
    if 'reward_observations' in batch:
        batch['reward_observations'] = batch[reward_at]
    return batch


def sample(dataset: Dataset, key, batch_size: int, needs=frozenset()):
    """A batch of `batch_size` transitions: a pure, jit-able function of (dataset, key). See `gather_batch` and
    `sample_goals` for its entries."""
    rows_key, augmentation_key, goals_key = jax.random.split(key, 3)
    rows = sample_rows(dataset, rows_key, batch_size, needs)
    batch = gather_batch(dataset, rows, needs) | sample_goals(dataset, goals_key, rows, needs)
    if dataset.p_aug > 0 and dataset.observations.dtype == jnp.uint8:
        batch = augment(batch, augmentation_key, dataset.p_aug, dataset.reward_at)
    return batch


def observation_range(dataset: Dataset):
    """(lowest, highest) value of each feature over all rows, final states included, each (D,); None for images."""
    if dataset.observations.dtype == np.uint8:
        return None
    return dataset.observations.min(axis=0), dataset.observations.max(axis=0)


def example_batch(dataset: Dataset):
    """One row in the form that agents are created from, with the observed range of each feature for states.

    observations (1, …), actions (1, A), and observation_min, observation_max (D,) of all rows, final states included.
    """
    batch = gather_batch(dataset, np.zeros(1, np.int32), frozenset({'next_actions'}))
    if (observed := observation_range(dataset)) is not None:
        batch['observation_min'], batch['observation_max'] = observed
    return jax.tree.map(jnp.asarray, batch)
