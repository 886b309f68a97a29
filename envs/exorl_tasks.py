"""ExORL's sixteen tasks on dm_control's own models: the suite's where it has them, subclasses of its tasks where not.

A task here is what dm_control calls an environment: physics and task, stepped in native units. The gymnasium interface
around it, with scaled actions, is in `exorl_env.py`; task names and sizes in `envs/__init__.py`.
"""

import collections
import types

import numpy as np
from dm_control import composer, mjcf
from dm_control.manipulation import reach
from dm_control.manipulation.shared import arenas, constants, observations, robots, workspaces
from dm_control.rl import control
from dm_control.suite import base, cheetah, common, quadruped, walker
from dm_control.utils import rewards

CONTROL_TIMESTEPS = {
    'cheetah': 0.01,
    'walker': 0.025,
    'quadruped': 0.02,
    'jaco': constants.CONTROL_TIMESTEP,
}  # Seconds.

# Target speeds, in metres a second; a backward task's is negative.
CHEETAH_SPEEDS = {'run': 10.0, 'run_backward': -10.0, 'walk': 2.0, 'walk_backward': -2.0}
WALKER_SPEEDS = {'stand': 0.0, 'walk': 1.0, 'run': 8.0}
WALKER_SPIN = 5.0  # Angular momentum of a flip, in kg·m²/s.
QUADRUPED_SPEEDS = {'walk': 0.5, 'run': 5.0}
QUADRUPED_JUMP_HEIGHT = 1.0  # Of the centre of mass, in metres.
QUADRUPED_FLOOR_SIZE = 100.0  # Half a side of what is drawn, in metres; to the physics every floor is infinite.

# Where the tool centre point should be: left is −x, right +x, bottom −y, top +y. Metres.
JACO_GOALS = {
    'reach_top_left': (-0.09, 0.09, 0.001),
    'reach_top_right': (0.09, 0.09, 0.001),
    'reach_bottom_left': (-0.09, -0.09, 0.001),
    'reach_bottom_right': (0.09, -0.09, 0.001),
}
# Where the tool centre point may start: the box above the table that dm_control's own reach-a-brick task uses.
JACO_START = workspaces.BoundingBox(lower=(-0.1, -0.1, 0.2), upper=(0.1, 0.1, 0.4))
JACO_RESET_ATTEMPTS = 100  # One in some thousands of starting poses has no inverse kinematics without a collision.


class CheetahAtSpeed(cheetah.Cheetah):
    """Moves at a speed, forward or, if it is negative, backward: reward clip(v_x / speed, 0, 1)."""

    def __init__(self, speed: float, random=None):
        self._speed = speed
        super().__init__(random=random)

    def get_reward(self, physics):
        return _ramp(np.sign(self._speed) * physics.speed(), abs(self._speed), value_at_zero=0.0)


class WalkerFlip(walker.PlanarWalker):
    """Turns over forward, standing as far as that goes: the suite's standing reward times the spin's.

    The spin is the whole body's angular momentum about the y axis through its centre of mass.
    """

    def __init__(self, random=None):
        super().__init__(move_speed=0.0, random=random)  # Speed 0 makes the suite's reward that of standing.

    def get_reward(self, physics):
        spin = _ramp(physics.named.data.subtree_angmom['torso'][1], WALKER_SPIN, value_at_zero=0.0)
        return super().get_reward(physics) * (5 * spin + 1) / 6


class QuadrupedStand(quadruped.Move):
    """Is upright: reward (1 + torso's z axis · world's z axis) / 2."""

    def __init__(self, random=None):
        super().__init__(desired_speed=0.0, random=random)

    def get_reward(self, physics):
        return (1 + float(physics.torso_upright())) / 2


class QuadrupedJump(QuadrupedStand):
    """Is upright with its centre of mass high above the floor."""

    def get_reward(self, physics):
        height = physics.named.data.subtree_com['torso', 'z']
        return super().get_reward(physics) * _ramp(height, QUADRUPED_JUMP_HEIGHT, value_at_zero=0.5)


class ReachPoint(reach.Reach):
    """dm_control's reaching task with one fixed target."""

    def __init__(self, goal):
        settings = observations.PERFECT_FEATURES
        super().__init__(
            arena=arenas.Standard(),
            arm=robots.make_arm(settings),
            hand=robots.make_hand(settings),
            prop=None,
            obs_settings=settings,
            workspace=types.SimpleNamespace(
                target_bbox=workspaces.BoundingBox(lower=goal, upper=goal),
                tcp_bbox=JACO_START,
                arm_offset=robots.ARM_OFFSET,
            ),
            control_timestep=CONTROL_TIMESTEPS['jaco'],
        )
        self._target.pos = goal  # In the model itself, so that a reward needs no episode to have begun.

    def observe(self, physics) -> collections.OrderedDict:
        """The robot's 42 numbers, in ExORL's order; torques on dm_control's logarithmic scale."""
        arm, hand = self.arm.observables, self.hand.observables
        parts = {
            'arm_angles': arm.joints_pos,  # (6, 2): sine and cosine of each joint.
            'arm_torques': arm.joints_torque,
            'arm_velocities': arm.joints_vel,
            'finger_angles': hand.joints_pos,
            'finger_velocities': hand.joints_vel,
            'pinch_position': hand.pinch_site_pos,
            'pinch_rotation': hand.pinch_site_rmat,  # (9,)
        }
        return collections.OrderedDict((name, np.array(part(physics))) for name, part in parts.items())


class JacoReach(base.Task):
    """`ReachPoint` as a task of the suite's kind, which looks at the robot once a step; composer's loop, 20 times."""

    def __init__(self, goal, random=None):
        super().__init__(random=random)
        self._reach = ReachPoint(goal)

    def make_physics(self):
        return mjcf.Physics.from_mjcf_model(self._reach.root_entity.mjcf_model)

    def initialize_episode(self, physics):
        for attempt in range(JACO_RESET_ATTEMPTS):
            try:
                self._reach.initialize_episode(physics, self.random)
                break
            except composer.EpisodeInitializationError:
                if attempt == JACO_RESET_ATTEMPTS - 1:
                    raise
        super().initialize_episode(physics)

    def get_observation(self, physics):
        return self._reach.observe(physics)

    def get_reward(self, physics):
        return self._reach.get_reward(physics)


def _ramp(x, bound, value_at_zero):
    """1 from `bound` on, below it linear down to `value_at_zero` at x = 0, and on along the line until it meets 0."""
    return rewards.tolerance(
        x, bounds=(bound, float('inf')), margin=bound, value_at_margin=value_at_zero, sigmoid='linear'
    )


def make_task(domain: str, name: str) -> control.Environment:
    """The task `name` of a domain (as in `envs.EXORL_TASKS`) as a dm_control environment without a time limit."""
    if domain == 'cheetah':
        physics = cheetah.Physics.from_xml_string(*cheetah.get_model_and_assets())
        task = CheetahAtSpeed(CHEETAH_SPEEDS[name])
    elif domain == 'walker':
        physics = walker.Physics.from_xml_string(*walker.get_model_and_assets())
        task = WalkerFlip() if name == 'flip' else walker.PlanarWalker(WALKER_SPEEDS[name])
    elif domain == 'quadruped':
        model = quadruped.make_model(floor_size=QUADRUPED_FLOOR_SIZE)
        physics = quadruped.Physics.from_xml_string(model, common.ASSETS)
        own = {'stand': QuadrupedStand, 'jump': QuadrupedJump}
        task = own[name]() if name in own else quadruped.Move(QUADRUPED_SPEEDS[name])
    else:
        task = JacoReach(JACO_GOALS[name])
        physics = task.make_physics()
    return control.Environment(physics, task, control_timestep=CONTROL_TIMESTEPS[domain])
