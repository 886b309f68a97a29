"""What an agent's critics say along a trajectory, what really came, and what values are possible: pure functions, no
files and no figures."""

import jax
import jax.numpy as jnp
import numpy as np


def discounted_returns(rewards, discount: float, masks=None) -> np.ndarray:
    """G_t = r_t + γ·m_t·G_{t+1} (T,) of an episode's rewards (T,), in float64; masks None counts past every goal.

    What follows the last reward is not known. It is taken to go on as it ended, G_{T−1} = r_{T−1}/(1 − γ·m_{T−1}):
    the discounted future states of `utils.occupancy.geometric_futures`, too, stay at the end of the episode.
    """
    rewards = np.asarray(rewards, np.float64)
    factors = discount * (np.ones_like(rewards) if masks is None else np.asarray(masks, np.float64))
    returns = np.empty_like(rewards)
    returns[-1] = rewards[-1] / (1 - factors[-1])
    for t in range(len(rewards) - 2, -1, -1):
        returns[t] = rewards[t] + factors[t] * returns[t + 1]
    return returns


def value_range(rewards, discount: float):
    """(lowest, highest) Q that rewards within `rewards` allow, for episodes that end and episodes that do not."""
    lowest, highest = rewards
    horizon = 1 / (1 - discount)
    return jnp.minimum(lowest, lowest * horizon), jnp.maximum(highest, highest * horizon)


def intention_values(agent, batch, key, num_intentions: int):
    """Q̂_z(s, a) (K, B) under K intentions for each row, as the critic draws them: mean R of futures over 1 − γ."""
    keys = jax.random.split(key, num_intentions)
    return jax.lax.map(lambda key: agent.intention_returns(agent.params, batch, key), keys)
