"""Rings of states with a known answer: data of a random walk, its occupancies and its distances."""

import numpy as np


def observations_of(states, num_states):
    """States 0 … n−1 as points on a circle of radius √2, which makes each feature's variance 1."""
    angles = 2 * np.pi * np.asarray(states) / num_states
    return np.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def random_walk(num_states, forward=0.5, num_episodes=20, length=501, seed=0):
    """Row arrays of walks that a positive action moves one state on and any other one back; positive with probability
    `forward`, uniform in size. Returns (raw, states (rows,))."""
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.1, 1, (num_episodes, length, 1))
    signs = np.where(rng.random((num_episodes, length, 1)) < forward, 1, -1)
    steps = np.concatenate([rng.integers(0, num_states, (num_episodes, 1)), signs[:, :-1, 0]], axis=1)
    states = np.cumsum(steps, axis=1) % num_states
    terminals = np.zeros((num_episodes, length), bool)
    terminals[:, -1] = True
    raw = {
        'observations': observations_of(states, num_states).reshape(-1, 2),
        'actions': (sizes * signs).astype(np.float32).reshape(-1, 1),
        'terminals': terminals.reshape(-1),
    }
    return raw, states.reshape(-1)


def labelled(raw, rewards):
    return {**raw, 'rewards': np.asarray(rewards, np.float32), 'masks': np.ones(len(rewards), np.float32)}


def occupancy(num_states, forward, discount):
    """(1−γ)·Σ_{k≥1} γ^(k−1)·P(s_k = g | s_0, sign of a_0) under the walk: (states, signs −1 and +1, goals)."""
    shift = np.roll(np.eye(num_states), 1, axis=1)  # s → s + 1.
    walk = forward * shift + (1 - forward) * shift.T
    from_next = (1 - discount) * np.linalg.inv(np.eye(num_states) - discount * walk)
    return np.stack([shift.T @ from_next, shift @ from_next], axis=1)


def distances(num_states):
    """Steps of the shortest way between two states: (states, states)."""
    gaps = np.abs(np.arange(num_states)[:, None] - np.arange(num_states))
    return np.minimum(gaps, num_states - gaps)
