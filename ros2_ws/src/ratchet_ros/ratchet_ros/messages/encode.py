"""From an action to the arm's messages: twists, poses, trajectories, joint arrays, gripper commands; and a hold.

Knows message types and the contract's topic mapping. Knows no node; publishing is an argument. Limits are not enforced
here: that is the safety filter's work, before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import PoseStamped, TwistStamped
from std_msgs.msg import Float64MultiArray, MultiArrayDimension
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from ratchet_vla.contract import RobotContract
from ratchet_vla.contract.topics import CommandSink
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32
from ratchet_vla.runtime import rotation

COMMAND_TYPES = {
    "twist_stamped": TwistStamped,
    "pose_stamped": PoseStamped,
    "joint_trajectory": JointTrajectory,
    "float64_multi_array": Float64MultiArray,
}
HORIZON = 2.0  # periods ahead of a trajectory's point


class Encoder(Protocol):
    """One command sink. State that it keeps (a target that deltas are added to) starts anew after `hold`."""

    def action(self, values: Any, state: Mapping[str, Float32], stamp: Time) -> Any:
        """values: (len(dims),) float64, physical units. The message to publish."""
        ...

    def hold(self, state: Mapping[str, Float32], stamp: Time) -> Any | None:
        """The message that keeps the pose; None where silence does."""
        ...


class Twist:
    """MoveIt Servo's delta_twist_cmds: displacement per control step as a velocity. Hold: zero."""

    def __init__(self, contract: RobotContract, sink: CommandSink) -> None:
        self.sink, self._hz, self._form = sink, contract.control_hz, contract.action.rotation

    def action(self, values: Any, state: Mapping[str, Float32], stamp: Time) -> TwistStamped:
        message = TwistStamped()
        message.header.stamp, message.header.frame_id = stamp, self.sink.frame
        linear, angular = message.twist.linear, message.twist.angular
        linear.x, linear.y, linear.z = (float(v) * self._hz for v in values[:3])
        if len(values) > 3:
            turn = values[3:]
            if self._form != "axis_angle":
                turn = rotation.to_vector(rotation.to_quaternion(np.asarray(turn, np.float64), self._form))
            angular.x, angular.y, angular.z = (float(v) * self._hz for v in turn)
        return message

    def hold(self, state: Mapping[str, Float32], stamp: Time) -> TwistStamped:
        message = TwistStamped()
        message.header.stamp, message.header.frame_id = stamp, self.sink.frame
        return message


class Pose:
    """A Cartesian target (Servo's pose_target_cmds, CRISP's target_pose). Deltas are added to the last target, turned
    about the action frame's axes (about the tool's own in the frame "tool"). Hold: the last target once more."""

    def __init__(self, contract: RobotContract, sink: CommandSink, position: str, orientation: str) -> None:
        self.sink, self._delta = sink, contract.action.control_mode == "ee_delta"
        self._form, self._tool = contract.action.rotation, contract.action.frame == "tool"
        self._position, self._orientation = position, orientation
        self._target: tuple[Any, Any] | None = None

    def action(self, values: Any, state: Mapping[str, Float32], stamp: Time) -> PoseStamped:
        values = np.asarray(values, np.float64)
        place, turn = self._target or self._measured(state)
        if not self._delta:
            place = values[:3].copy()
            turn = rotation.to_quaternion(values[3:], self._form) if len(values) > 3 else turn
        else:
            step = rotation.to_quaternion(values[3:], self._form) if len(values) > 3 else np.array([0.0, 0, 0, 1])
            if self._tool:
                place = place + _turned(turn, values[:3])
                turn = rotation.product(turn, step)
            else:
                place, turn = place + values[:3], rotation.product(step, turn)
            turn = turn / np.linalg.norm(turn)
        self._target = (place, turn)
        return self._message(place, turn, stamp)

    def hold(self, state: Mapping[str, Float32], stamp: Time) -> PoseStamped | None:
        target, self._target = self._target, None
        return None if target is None else self._message(*target, stamp)

    def _measured(self, state: Mapping[str, Float32]) -> tuple[Any, Any]:
        turn = np.array([0.0, 0.0, 0.0, 1.0])
        if self._orientation:
            values = np.asarray(state[self._orientation], np.float64)
            form = "quaternion_xyzw" if len(values) == 4 else "euler_xyz" if self._form == "euler_xyz" else "axis_angle"
            turn = rotation.to_quaternion(values, form)
        return np.asarray(state[self._position], np.float64), turn

    def _message(self, place: Any, turn: Any, stamp: Time) -> PoseStamped:
        message = PoseStamped()
        message.header.stamp, message.header.frame_id = stamp, self.sink.frame
        p, o = message.pose.position, message.pose.orientation
        p.x, p.y, p.z = (float(v) for v in place)
        o.x, o.y, o.z, o.w = (float(v) for v in turn)
        return message


class _Joints:
    """What joint sinks share: deltas are added to the last target, which starts at the measured pose."""

    def __init__(self, contract: RobotContract, sink: CommandSink, position: str) -> None:
        self.sink, self._position, self._mode = sink, position, contract.action.control_mode
        self._hz = contract.control_hz
        gripper = contract.action.gripper
        moving = [d.name for d in contract.action.dims if gripper is None or d.name != gripper.dim]
        self._places = [moving.index(d) if d in moving else -1 for d in sink.dims]
        self._target: Any = None

    def targets(self, values: Any, state: Mapping[str, Float32]) -> Any:
        """(len(dims),) float64: what goes on the wire, in physical units."""
        values = np.asarray(values, np.float64)
        if self._mode == "joint_delta":
            before = self._target if self._target is not None else self._measured(values, state)
            values = np.where([p >= 0 for p in self._places], before + values, values)
        self._target = values
        return values

    def kept(self) -> Any:
        """The last target, and the memory of it gone; None where nothing was sent since the last hold."""
        target, self._target = self._target, None
        if target is not None and self._mode == "joint_velocity":
            return np.where([p >= 0 for p in self._places], 0.0, target)
        return target

    def wire(self, values: Any) -> list[float]:
        return [float(v) for v in values * self.sink.scale + self.sink.offset]

    def _measured(self, values: Any, state: Mapping[str, Float32]) -> Any:
        measured = np.asarray(state[self._position], np.float64)
        return np.array([measured[p] if p >= 0 else v for p, v in zip(self._places, values, strict=True)])


class Array(_Joints):
    """ros2_control's forward controllers: numbers without names. Hold: the last positions, or zero velocities."""

    def action(self, values: Any, state: Mapping[str, Float32], stamp: Time) -> Float64MultiArray:
        return self._message(self.targets(values, state))

    def hold(self, state: Mapping[str, Float32], stamp: Time) -> Float64MultiArray | None:
        kept = self.kept()
        return None if kept is None else self._message(kept)

    def _message(self, values: Any) -> Float64MultiArray:
        message = Float64MultiArray(data=self.wire(values))
        size = len(self.sink.dims)
        message.layout.dim = [MultiArrayDimension(label=",".join(self.sink.names), size=size, stride=size)]
        return message


class Trajectory(_Joints):
    """joint_trajectory_controller's topic: one point, positions only (newer controllers refuse a trajectory that ends
    in motion), two periods ahead: the controller is never out of points between two commands, and nothing beyond the
    checked target is ever asked for. Stamp 0: start now. Hold: the last target once more."""

    def action(self, values: Any, state: Mapping[str, Float32], stamp: Time) -> JointTrajectory:
        return self._message(self.targets(values, state))

    def hold(self, state: Mapping[str, Float32], stamp: Time) -> JointTrajectory | None:
        kept = self.kept()
        return None if kept is None else self._message(kept)

    def _message(self, target: Any) -> JointTrajectory:
        point = JointTrajectoryPoint(positions=self.wire(target))
        nanoseconds = round((self.sink.horizon or HORIZON / self._hz) * 1e9)
        point.time_from_start = Duration(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
        message = JointTrajectory(joint_names=list(self.sink.names), points=[point])
        message.header.frame_id = self.sink.frame
        return message


class Gripper:
    """control_msgs/action/GripperCommand goals; the caller sends them. None where the last goal was the same: drivers
    restart their motion with each goal. Hold: silence, a gripper that holds an object must go on holding it."""

    TOUCH = 1e-4

    def __init__(self, contract: RobotContract, sink: CommandSink) -> None:
        self.sink = sink
        self.kind = gripper_action()
        dim = next(d for d in contract.action.dims if d.name == sink.dims[0])
        self._least = self.TOUCH * abs((dim.high - dim.low) * sink.scale)
        self._last: float | None = None

    def action(self, values: Any, state: Mapping[str, Float32], stamp: Time) -> Any:
        position = float(values[0]) * self.sink.scale + self.sink.offset
        if self._last is not None and abs(position - self._last) <= self._least:
            return None
        self._last = position
        goal = self.kind.Goal()
        goal.command.position, goal.command.max_effort = position, self.sink.max_effort
        return goal

    def hold(self, state: Mapping[str, Float32], stamp: Time) -> None:
        return None


def gripper_action() -> Any:
    """control_msgs' GripperCommand. Raises RatchetError ros.no_control_msgs where the package is not installed."""
    try:
        from control_msgs.action import GripperCommand
    except ImportError:
        raise RatchetError(
            "ros.no_control_msgs",
            "the contract's gripper takes control_msgs/action/GripperCommand, which is not installed",
            fix="apt install ros-$ROS_DISTRO-control-msgs, or build control_msgs into the ROS environment",
        ) from None
    return GripperCommand


def make_encoder(contract: RobotContract, sink: CommandSink, position: str, orientation: str) -> Encoder:
    """position, orientation: names of the state fields that measure what the actions move."""
    if sink.kind == "twist_stamped":
        return Twist(contract, sink)
    if sink.kind == "pose_stamped":
        return Pose(contract, sink, position, orientation)
    if sink.kind == "joint_trajectory":
        return Trajectory(contract, sink, position)
    if sink.kind == "gripper_command":
        return Gripper(contract, sink)
    return Array(contract, sink, position)


def _turned(q: Any, v: Any) -> Any:
    return rotation.product(rotation.product(q, np.array([*v, 0.0])), rotation.inverse(q))[:3]
