"""Checks the labels of a task's fine-tuning data against the simulator, by another way than the one that made them.

    python -m envs.check_labels --env_name=cheetah_run

OGBench: the sub-goals are counted from the stored `qpos` and `button_states` with the simulator's goals and the
tolerance written here; half of the rows have the goal put in, for play seldom reaches it. ExORL: the simulator is put
into every stored state, takes the stored action live, and its reward is compared with the label; the validation file
stores the states.
"""

import numpy as np
from absl import flags

from envs import TaskSpec, data, make_env, task_spec
from utils import cli
from utils.errors import UserError

TOLERANCE = 0.04  # Of OGBench's sub-goals: metres.
# Of ExORL's rewards, which lie in [0, 1]: contact forces are iterated from another start than in the episode.
REWARD_TOLERANCE = 1e-3

FLAGS = flags.FLAGS


def check(env_name: str, dataset_dir: str) -> str:
    """Compares all labels of a task's validation file; returns what was compared, in one line.

    Raises:
        UserError: a label is wrong; the message names the file, and how many are. Also: no data.
    """
    spec = task_spec(env_name)
    raw = data.load_raw(env_name, 'finetuning', 'val', dataset_dir)
    path = data.task_path(spec, 'finetuning', 'val', dataset_dir)
    return (_check_exorl if spec.suite == 'exorl' else _check_ogbench)(spec, raw, path)


def _require_equal(path, name: str, labels, expected, tolerance: float = 0.0) -> None:
    wrong = ~(np.abs(labels - expected) <= tolerance)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(
            f'{path}: {wrong.sum()} of {len(wrong)} {name} are wrong, first number {row}: {labels[row]:.6g}, not '
            f'{expected[row]:.6g}'
        )


def _check_ogbench(spec: TaskSpec, raw: dict, path) -> str:
    env = make_env(spec.name.removeprefix('visual-'))
    env.reset(seed=0)
    goal = _goal_columns(spec.domain.removeprefix('visual-'), env.unwrapped.cur_task_info)
    env.close()

    with np.load(path) as archive:
        states = {name: archive[name] for name in goal}
    satisfied = _satisfied(states, goal)
    _require_equal(path, 'rewards', raw['rewards'], satisfied.sum(1) - satisfied.shape[1])
    _require_equal(path, 'masks', raw['masks'], 1.0 - satisfied.all(1))

    for name, parts in goal.items():
        for columns, value, _ in parts:
            states[name][::2, columns] = value
    satisfied = _satisfied(states, goal)
    rewards, masks = data.label_states(spec.name, states)
    _require_equal(path, 'rewards, with the goal put in,', rewards, satisfied.sum(1) - satisfied.shape[1])
    _require_equal(path, 'masks, with the goal put in,', masks, 1.0 - satisfied.all(1))
    if not (masks[::2] == 0).all():
        raise UserError(f'{path}: the goal of {spec.name} is not recognised where it is put in')
    return (
        f'{len(rewards)} labels are those of the stored states, and of {len(rewards)} in half of which the goal is met'
    )


def _goal_columns(domain: str, info: dict) -> dict[str, list]:
    """Of each stored array the parts that a sub-goal is about: (columns, wanted value, tolerance)."""
    if domain.startswith('cube'):
        return {
            'qpos': [
                (slice(14 + 7 * cube, 17 + 7 * cube), position, TOLERANCE)
                for cube, position in enumerate(info['goal_xyzs'])
            ]
        }
    if domain == 'scene':
        goal = info['goal']
        return {
            'qpos': [
                (slice(14, 17), goal['block_xyzs'][0], TOLERANCE),
                (slice(23, 24), goal['drawer_pos'], TOLERANCE),
                (slice(24, 25), goal['window_pos'], TOLERANCE),
            ],
            'button_states': _buttons(goal['button_states']),
        }
    return {'button_states': _buttons(info['goal_button_states'])}


def _buttons(wanted) -> list:
    return [(slice(button, button + 1), state, 0) for button, state in enumerate(wanted)]


def _satisfied(states: dict[str, np.ndarray], goal: dict[str, list]) -> np.ndarray:
    """(rows, sub-goals) bool."""
    return np.column_stack(
        [
            np.linalg.norm(states[name][:, columns].astype(np.float64) - value, axis=1) <= tolerance
            for name, parts in goal.items()
            for columns, value, tolerance in parts
        ]
    )


def _check_exorl(spec: TaskSpec, raw: dict, path) -> str:
    with np.load(path) as archive:
        if 'physics' not in archive:
            raise UserError(
                f'{path}: it stores no states to take a step from; python -m envs.convert_exorl stores them'
            )
        physics = archive['physics']
    env = make_env(spec.name)
    env.reset(seed=0)
    rows = np.flatnonzero(~raw['terminals'])
    live = []
    for row in rows:
        if row == 0 or raw['terminals'][row - 1]:
            env.reset(seed=0)  # An episode of the simulator is no longer than one of the data.
        with env.physics.reset_context():
            env.physics.set_state(physics[row])
        live.append(env.step(raw['actions'][row])[1])
    env.close()
    _require_equal(path, 'rewards', raw['rewards'][rows], np.array(live), REWARD_TOLERANCE)
    largest = np.abs(raw['rewards'][rows] - live).max()
    return f'{len(rows)} labels are the live rewards, within {largest:.1g}'


def main(_):
    print(check(FLAGS.env_name, FLAGS.dataset_dir))


if __name__ == '__main__':
    flags.DEFINE_string('env_name', 'cube-single-play-singletask-task1-v0', 'The task; envs.TASKS lists them.')
    flags.DEFINE_string('dataset_dir', data.DEFAULT_DATASET_DIR, 'Folder of the data files.')
    cli.run(main)
