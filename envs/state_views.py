"""What a person sees in a state: observation columns as named coordinates, what is done next, and pictures of states.

For figures only; nothing is trained on it. Observations are the simulators' own, not normalised. Pictures are of states
that the data files store, since an observation alone does not say where everything is.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from envs import TaskSpec, custom, data, make_env
from utils.errors import UNREADABLE_NPZ, UserError

# OGBench's observations (`compute_observation` of its environments): 19 numbers of the arm, then the objects.
CENTER_X, POSITION_SCALE, GRIPPER_SCALE, DRAWER_SCALE, WINDOW_SCALE = 0.425, 10.0, 3.0, 18.0, 15.0
EFFECTOR, GRIPPER, OBJECTS = 12, 17, 19
CUBE_SIZE, BUTTON_SIZE = 9, 4  # Numbers an object: position 3, quaternion 4, yaw 2; state one-hot 2, position, speed.
CUBES = {'cube-single': 1, 'cube-double': 2, 'scene': 1, 'puzzle-4x4': 0}
BUTTONS = {'cube-single': 0, 'cube-double': 0, 'scene': 2, 'puzzle-4x4': 16}
# Moves of one step, in metres, above which somebody moves the object: it does not just settle.
CUBE_STEP, SLIDE_STEP = 0.002, 0.001
LOOKAHEAD = 25  # Steps over which a coordinate to come is averaged.


class Coordinate(NamedTuple):
    """A number with a meaning: `of` maps observations (…, d) to (…)."""

    label: str
    of: Callable[[np.ndarray], np.ndarray]


class Panel(NamedTuple):
    """Two coordinates that make one plot."""

    title: str
    x: Coordinate
    y: Coordinate


class Behaviour(NamedTuple):
    """What is done from each row on: `values` (rows,) are numbers, or indices into `names`; −1 is nothing."""

    title: str
    values: np.ndarray
    names: tuple[str, ...] | None


# ----------------------------------------------------------------------------------------------------- coordinates


def _column(label: str, index: int, scale: float = 1.0, offset: float = 0.0) -> Coordinate:
    return Coordinate(label, lambda observations: observations[..., index] / scale + offset)


def _position(what: str, first: int) -> tuple[Coordinate, Coordinate, Coordinate]:
    return (
        _column(f'{what} x (m)', first, POSITION_SCALE, CENTER_X),
        _column(f'{what} y (m)', first + 1, POSITION_SCALE),
        _column(f'{what} z (m)', first + 2, POSITION_SCALE),
    )


def _cube(index: int) -> tuple[Coordinate, Coordinate, Coordinate]:
    return _position('cube' if index == 0 else f'cube {index + 1}', OBJECTS + CUBE_SIZE * index)


def _button_columns(domain: str) -> list[int]:
    """Columns that are 1 where a button's state is 1."""
    first = OBJECTS + CUBE_SIZE * CUBES[domain]
    return [first + BUTTON_SIZE * index + 1 for index in range(BUTTONS[domain])]


def _slides(domain: str) -> tuple[Coordinate, ...]:
    """Drawer and window of the scene."""
    if domain != 'scene':
        return ()
    first = OBJECTS + CUBE_SIZE * CUBES[domain] + BUTTON_SIZE * BUTTONS[domain]
    return (
        _column('drawer (m)', first, DRAWER_SCALE),
        _column('window (m)', first + 2, WINDOW_SCALE),
    )


def _ogbench_panels(domain: str) -> tuple[Panel, ...]:
    x, y, z = _position('gripper', EFFECTOR)
    panels = [Panel('gripper from above', x, y)]
    for index in range(CUBES[domain]):
        cube = _cube(index)
        panels.append(Panel(f'{cube[0].label.removesuffix(" x (m)")} from above', cube[0], cube[1]))
    if _slides(domain):
        panels.append(Panel('drawer and window', *_slides(domain)))
    columns = _button_columns(domain)
    if len(columns) == 2:
        first, second = (_column(f'button {i + 1} (state)', column) for i, column in enumerate(columns))
        panels.append(Panel('buttons', first, second))
    elif columns:
        lit = Coordinate('buttons in state 1', lambda observations: observations[..., columns].sum(axis=-1))
        panels.append(Panel('buttons', lit, z))
    else:
        panels.append(Panel('gripper', _column('gripper opening (0 open, 1 closed)', GRIPPER, GRIPPER_SCALE), z))
    return tuple(panels)


def _walker_angle(observations):
    """From the torso's x axis in the world, (cos, sin) up to its sense."""
    return np.arctan2(observations[..., 1], observations[..., 0])


EXORL_PANELS = {
    'cheetah': (
        Panel('speed and pitch', _column('forward speed (m/s)', 8), _column('torso angle (rad)', 1)),
        Panel('height', _column('height over the start (m)', 0), _column('vertical speed (m/s)', 9)),
    ),
    'walker': (
        Panel('speed and pitch', _column('forward speed (m/s)', 16), Coordinate('torso angle (rad)', _walker_angle)),
        Panel('height', _column('torso height (m)', 14), _column('spin (rad/s)', 17)),
    ),
    'quadruped': (
        Panel('speed', _column('forward speed (m/s)', 44), _column('sideways speed (m/s)', 45)),
        Panel('uprightness', _column('forward speed (m/s)', 44), _column('torso upright (cosine)', 47)),
    ),
    'jaco': (
        Panel('hand from above', _column('hand x (m)', 30), _column('hand y (m)', 31)),
        Panel('hand from the front', _column('hand x (m)', 30), _column('hand z (m)', 32)),
    ),
}  # fmt: skip


def panels(spec: TaskSpec) -> tuple[Panel, ...]:
    """The plots that show a task's states; none for images. What a user's own observations mean is not known: the first
    four are shown by number."""
    if spec.visual:
        return ()
    if spec.suite == custom.SUITE:
        columns = [_column(f'observation {index}', index) for index in range(min(4, spec.observation_shape[0]))]
        if len(columns) % 2:  # The last of an odd number is drawn against the first.
            columns.append(columns[0])
        pairs = zip(columns[::2], columns[1::2], strict=True)
        return tuple(Panel(f'{x.label} and {y.label}', x, y) for x, y in pairs)
    return EXORL_PANELS[spec.domain] if spec.suite == 'exorl' else _ogbench_panels(spec.domain)


# ------------------------------------------------------------------------------------------------------- behaviour


def behaviour(spec: TaskSpec, observations: np.ndarray, ends: np.ndarray) -> Behaviour | None:
    """What is done from each row on, to colour intentions by; None for images.

    OGBench: which object is the next to be moved, to the end of the episode. Elsewhere: the first coordinate of
    `panels`, averaged over the `LOOKAHEAD` steps to come. observations (rows, d), ends (rows,): last row of each row's
    episode.
    """
    if spec.visual:
        return None
    if spec.suite != 'ogbench':
        coordinate = panels(spec)[0].x
        rows = np.minimum(np.arange(len(ends))[:, None] + np.arange(LOOKAHEAD), ends[:, None])
        values = coordinate.of(observations)[rows].mean(axis=1)
        return Behaviour(f'{coordinate.label}, mean of the next {LOOKAHEAD} steps', values, None)
    moves = _object_moves(spec.domain, observations)
    names, moved = tuple(moves), np.stack(list(moves.values()), axis=1)  # (rows, objects)
    moved[ends == np.arange(len(ends))] = False  # From one episode's end to the next one's beginning.
    return Behaviour('object moved next', _first_true(moved, ends), names)


def _object_moves(domain: str, observations: np.ndarray) -> dict[str, np.ndarray]:
    """{object: whether it is moved between a row and the next (rows,)}; of objects moved at once the first counts, so
    that the drawer comes before the cube that lies in it."""

    def steps(*coordinates):
        values = np.stack([coordinate.of(observations) for coordinate in coordinates], axis=-1)
        return np.append(np.linalg.norm(np.diff(values, axis=0), axis=-1), 0.0)

    moves = {}
    for number, column in enumerate(_button_columns(domain), start=1):
        moves[f'button {number}'] = steps(_column('', column)) > 0.5
    for slide in _slides(domain):
        moves[slide.label.removesuffix(' (m)')] = steps(slide) > SLIDE_STEP
    for index in range(CUBES[domain]):
        cube = _cube(index)
        moves[cube[0].label.removesuffix(' x (m)')] = steps(*cube) > CUBE_STEP
    return moves


def _first_true(events: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """For each row the column of `events` (rows, columns) that is next true, from the row to its end; −1 if none is."""
    rows = len(events)
    when = np.where(events, np.arange(rows)[:, None], rows)
    when = np.minimum.accumulate(when[::-1], axis=0)[::-1]
    first = when.argmin(axis=1)
    return np.where(when[np.arange(rows), first] <= ends, first, -1)


# -------------------------------------------------------------------------------------------------------- pictures


def load_states(spec: TaskSpec, phase: str, split: str, dataset_dir, rows: int) -> dict[str, np.ndarray] | None:
    """The simulator's states that a data file stores for its first `rows` rows; None if it stores none, as a user's own
    file, of which nobody knows the simulator."""
    if spec.suite == custom.SUITE:
        return None
    needed = ('physics',) if spec.suite == 'exorl' else ('qpos', 'qvel')
    path = data.task_path(spec, phase, split, dataset_dir)
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not set(needed) <= set(archive.files):
                return None
            names = [name for name in (*needed, 'button_states') if name in archive.files]
            return {name: archive[name][:rows] for name in names}
    except UNREADABLE_NPZ as error:
        raise UserError(f'{path} cannot be read: {error}. Make it anew.') from error


class StateRenderer:
    """Draws stored states of one task by putting them into its simulator; in OGBench the task's goal shows through."""

    def __init__(self, spec: TaskSpec):
        self._spec = spec
        self._env = make_env(spec.name, render_mode='rgb_array')
        self._env.reset(seed=0)

    def __call__(self, states: dict[str, np.ndarray], row: int) -> np.ndarray:
        """(H, W, 3) uint8 of the state at `row` of what `load_states` gave."""
        if self._spec.suite == 'exorl':
            physics = self._env.physics
            with physics.reset_context():
                physics.set_state(np.asarray(states['physics'][row], np.float64))
        else:
            arguments = [np.asarray(states[name][row], np.float64) for name in ('qpos', 'qvel')]
            if 'button_states' in states:
                arguments.append(states['button_states'][row])
            self._env.unwrapped.set_state(*arguments)
        return self._env.render()

    def close(self) -> None:
        """Frees the simulator and its OpenGL context."""
        self._env.close()
