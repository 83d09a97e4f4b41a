"""robosuite's operational-space controller and the benchmark's sampling clock, without their per-step overhead.

Knows the arithmetic of robosuite 1.4's OSC_POSE and of its two-finger gripper, operation by operation, so that torques
are bitwise those of the original. Knows no task and no rendering.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ratchet_sim.libero.simulator import mujoco

# isort: split
from robosuite.utils.control_utils import (
    nullspace_torques,
    opspace_matrices,
    orientation_error,
    set_goal_orientation,
    set_goal_position,
)

_MEASURED = (
    "ee_pos",
    "ee_ori_mat",
    "ee_pos_vel",
    "ee_ori_vel",
    "joint_pos",
    "joint_vel",
    "J_full",
    "J_pos",
    "J_ori",
    "mass_matrix",
)


class OscLayout:
    """What does not change within a task: indices, gains, limits and the controller's state right after a reset."""

    def __init__(self, model: mujoco.MjModel, robot: Any) -> None:
        controller = robot.controller
        self.model = model
        self.site: int = robot.eef_site_id
        self.qpos_index = list(controller.qpos_index)
        self.qvel_index = list(controller.qvel_index)
        self.actuators = list(robot._ref_joint_actuator_indexes)
        self.torque_low, self.torque_high = (np.array(limits) for limits in robot.torque_limits)
        self.kp = np.array(controller.kp)
        self.kd = np.array(controller.kd)
        self.initial_joint = np.array(controller.initial_joint)
        self.command_low = np.array(controller.input_min)
        self.command_high = np.array(controller.input_max)
        self.scale = abs(controller.output_max - controller.output_min) / abs(self.command_high - self.command_low)
        self.scale_out = (controller.output_max + controller.output_min) / 2.0
        self.scale_in = (self.command_high + self.command_low) / 2.0
        # Right after a reset the controller still holds what it measured before the initial state was written.
        self.measured = {name: getattr(controller, name) for name in _MEASURED}
        self.goal_ori = np.array(controller.goal_ori)
        self.goal_pos = np.array(controller.goal_pos)
        fingers = [robot.sim.model.actuator_name2id(name) for name in robot.gripper.actuators]
        self.finger_actuators = fingers
        control_ranges = model.actuator_ctrlrange[fingers]
        self.finger_bias = 0.5 * (control_ranges[:, 1] + control_ranges[:, 0])
        self.finger_weight = 0.5 * (control_ranges[:, 1] - control_ranges[:, 0])
        self.finger_speed = np.array([-1.0, 1.0]) * robot.gripper.speed


class Osc:
    """One arm's controller state. `control` computes and writes torques; call it once per physics step.

    The order of MuJoCo calls matters for the last bit: the constraint solver starts from its previous answer, and
    robosuite solves three times per physics step. Position and velocity stages depend on the state alone and run once.
    """

    ee_pos: np.ndarray
    ee_ori_mat: np.ndarray
    ee_pos_vel: np.ndarray
    ee_ori_vel: np.ndarray
    joint_pos: np.ndarray
    joint_vel: np.ndarray
    J_full: np.ndarray
    J_pos: np.ndarray
    J_ori: np.ndarray
    mass_matrix: np.ndarray

    def __init__(self, layout: OscLayout, data: mujoco.MjData) -> None:
        self.layout = layout
        self.data = data
        velocity_count = layout.model.nv
        self._jacp = np.zeros((3, velocity_count))
        self._jacr = np.zeros((3, velocity_count))
        self._mass = np.zeros((velocity_count, velocity_count))
        self.reset()

    def reset(self) -> None:
        """Forget the episode: goal, measurement and gripper command as after the benchmark's own reset."""
        for quantity, measured in self.layout.measured.items():
            setattr(self, quantity, measured)
        self.goal_ori = self.layout.goal_ori
        self.goal_pos = self.layout.goal_pos
        self.fingers = np.zeros(2)
        self._stale = False

    def set_goal(self, command: np.ndarray) -> None:
        """Take a new command: (6,) float64 in [-1, 1], position and axis-angle deltas; measures first."""
        self._measure()
        layout = self.layout
        clipped = np.clip(command, layout.command_low, layout.command_high)
        delta = (clipped - layout.scale_in) * layout.scale + layout.scale_out
        if any(not math.isclose(value, 0.0) for value in delta[3:]):
            self.goal_ori = set_goal_orientation(delta[3:], self.ee_ori_mat)
        self.goal_pos = set_goal_position(delta[:3], self.ee_pos)

    def control(self, gripper_sign: float) -> None:
        """Write the joint torques and the finger targets. gripper_sign: -1 opens, +1 closes, 0 keeps."""
        self._measure()
        layout = self.layout
        data = self.data
        task_force = (self.goal_pos - self.ee_pos) * layout.kp[0:3] + (-self.ee_pos_vel) * layout.kd[0:3]
        rotation_error = orientation_error(self.goal_ori, self.ee_ori_mat)
        task_torque = rotation_error * layout.kp[3:6] + (-self.ee_ori_vel) * layout.kd[3:6]
        # Task-space inertia, position and orientation decoupled, as OSC_POSE's default.
        _, lambda_pos, lambda_ori, nullspace = opspace_matrices(self.mass_matrix, self.J_full, self.J_pos, self.J_ori)
        wrench = np.concatenate([np.dot(lambda_pos, task_force), np.dot(lambda_ori, task_torque)])
        joint_torques = np.dot(self.J_full.T, wrench) + data.qfrc_bias[layout.qvel_index]
        joint_torques += nullspace_torques(
            self.mass_matrix, nullspace, layout.initial_joint, self.joint_pos, self.joint_vel
        )
        # The torques move the arm in the next physics step, so the measurement is taken anew then and not before.
        self._stale = True
        self.fingers = np.minimum(np.maximum(self.fingers + layout.finger_speed * gripper_sign, -1.0), 1.0)
        data.ctrl[layout.finger_actuators] = layout.finger_bias + layout.finger_weight * self.fingers
        data.ctrl[layout.actuators] = np.minimum(np.maximum(joint_torques, layout.torque_low), layout.torque_high)

    def _measure(self) -> None:
        # robosuite measures once per physics step; a second call in the same step returns what the first one saw.
        if not self._stale:
            return
        layout = self.layout
        data = self.data
        model = self.layout.model
        mujoco.mj_forwardSkip(model, data, mujoco.mjtStage.mjSTAGE_VEL, 1)
        grip_site = layout.site
        arm_columns = layout.qvel_index
        self.ee_pos = np.array(data.site_xpos[grip_site])
        self.ee_ori_mat = np.array(data.site_xmat[grip_site].reshape([3, 3]))
        mujoco.mj_jacSite(model, data, self._jacp, self._jacr, grip_site)
        velocities = data.qvel
        self.ee_pos_vel = np.dot(self._jacp, velocities)
        self.ee_ori_vel = np.dot(self._jacr, velocities)
        self.joint_pos = data.qpos[layout.qpos_index]
        self.joint_vel = velocities[arm_columns]
        self.J_pos = np.array(self._jacp[:, arm_columns])
        self.J_ori = np.array(self._jacr[:, arm_columns])
        self.J_full = np.array(np.vstack([self.J_pos, self.J_ori]))
        mujoco.mj_fullM(model, self._mass, data.qM)
        self.mass_matrix = self._mass[arm_columns, :][:, arm_columns]
        self._stale = False


class ObservationClock:
    """When the benchmark samples its observation within a control step.

    robosuite's observables count time in floating point and sample at the first physics step of their own period,
    which is out of phase with the control step. What a policy saw in the benchmark's data is that sample, up to a few
    milliseconds before the control step ends; this clock repeats the count exactly (`Observable.update`).
    """

    def __init__(self, period: float, timestep: float) -> None:
        self.period = period
        self.timestep = timestep
        self.reset()

    def reset(self) -> None:
        """State after the two forced samples of a reset and of writing the initial state."""
        self._elapsed = 2 * self.timestep
        self._sampled = True

    def tick(self) -> bool:
        """Advance by one physics step; True where the observation is taken after it."""
        self._elapsed += self.timestep
        # Same comparisons in the same order as `Observable.update`: rounding decides in which step it samples.
        samples_now = not self._sampled and self.period >= self._elapsed
        self._sampled = self._sampled or samples_now
        if self._elapsed >= self.period:
            samples_now = samples_now or not self._sampled
            self._elapsed %= self.period
            self._sampled = False
        return samples_now
