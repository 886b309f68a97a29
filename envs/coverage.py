"""How much of a domain's state space data have visited: occupied cells of a fixed grid of three coordinates.

The coordinates are those that a person would look at; the grid never changes, so numbers compare between policies,
seeds and amounts of data of one domain, not between domains. Which data, is for others to say.
"""

import numpy as np

# Name, lowest and highest value, number of cells. What lies outside counts as the outermost cell.
GRIDS = {
    'cheetah': (
        ('forward speed, m/s', -10.0, 10.0, 20),
        ('torso angle, rad', -np.pi, np.pi, 16),
        ('height, m', -0.6, 0.8, 14),  # Above where the model has it.
    ),
    'walker': (
        ('forward speed, m/s', -8.0, 8.0, 16),
        ('torso angle, rad', -np.pi, np.pi, 16),
        ('height, m', 0.0, 1.6, 16),
    ),
    'quadruped': (
        ('horizontal speed, m/s', 0.0, 6.0, 12),
        ('uprightness', -1.0, 1.0, 10),
        ('height, m', 0.0, 1.5, 15),
    ),
    'jaco': (
        ('pinch site x, m', -0.8, 0.8, 16),
        ('pinch site y, m', -0.4, 1.2, 16),
        ('pinch site z, m', 0.0, 1.2, 12),
    ),
}


def grid_size(domain: str) -> int:
    """Number of cells in the domain's grid."""
    return int(np.prod([cells for *_, cells in GRIDS[domain]]))


def coordinates(domain: str, observations: np.ndarray, physics: np.ndarray) -> np.ndarray:
    """The grid's coordinates (rows, 3) of observations (rows, d) and simulator states (rows, n)."""
    if domain == 'cheetah':
        angle = (observations[:, 1] + np.pi) % (2 * np.pi) - np.pi
        return np.stack([observations[:, 8], angle, observations[:, 0]], axis=1)
    if domain == 'walker':
        angle = np.arctan2(observations[:, 1], observations[:, 0])
        return np.stack([observations[:, 16], angle, observations[:, 14]], axis=1)
    if domain == 'quadruped':
        speed = np.linalg.norm(physics[:, 23:25], axis=1)  # The free joint's, behind 23 positions.
        return np.stack([speed, observations[:, 47], physics[:, 2]], axis=1)
    return observations[:, 30:33]


def visited_cells(domain: str, observations: np.ndarray, physics: np.ndarray) -> np.ndarray:
    """Sorted numbers of the cells that the rows lie in, each once."""
    cells = np.zeros(len(observations), np.int64)
    for values, (_, low, high, count) in zip(coordinates(domain, observations, physics).T, GRIDS[domain], strict=True):
        number = np.floor((values - low) / (high - low) * count).astype(np.int64)
        cells = cells * count + np.clip(number, 0, count - 1)
    return np.unique(cells)
