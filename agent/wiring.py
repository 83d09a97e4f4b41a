"""How a contract's fields travel as ROS messages: which topic, which message, which joints, in which order.

Knows words and checks them against the rest of the contract. Imports no ROS: the nodes do the translation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

StateKind = Literal["joint_state", "pose_stamped", "float64_multi_array"]
CommandKind = Literal["twist_stamped", "pose_stamped", "joint_trajectory", "float64_multi_array", "gripper_command"]

Problem = tuple[str, str, str]  # field, what, fix


@dataclass(frozen=True)
class StateSource:
    """Where a state field's numbers stand in a message. The topic is the state field's own.

    kind: sensor_msgs/JointState (matched by joint name, never by index), geometry_msgs/PoseStamped or
        std_msgs/Float64MultiArray (no stamp: taken as measured when it arrives; the first numbers, in order).
    part: position, velocity or effort of a JointState; position or orientation of a PoseStamped.
    names: joints of a JointState in the order of the field's numbers.
    scale: physical units of the contract per unit on the wire.
    signed: the sign of a quaternion carries meaning (a simulator's own convention); else it is chosen to stay near the
        last one, and at first so that the largest component is positive.
    """

    field: str
    kind: StateKind
    part: Literal["position", "velocity", "effort", "orientation"] = "position"
    names: tuple[str, ...] = ()
    scale: float = 1.0
    signed: bool = False


@dataclass(frozen=True)
class CommandSink:
    """One topic (or action) that takes some of the action dimensions.

    kind: twist_stamped (MoveIt Servo: velocities), pose_stamped (a Cartesian target), joint_trajectory (one point of a
        trajectory controller), float64_multi_array (a forward controller: no names on the wire, `names` is the order),
        gripper_command (control_msgs/action/GripperCommand).
    dims: action dimensions in the order of the message: x y z and then the rotation, or the joints.
    names: joints, one per dimension; needed by joint_trajectory.
    frame: frame_id of a stamped message.
    scale, offset: number on the wire = scale * physical value + offset; for a gripper whose driver counts otherwise.
    horizon: seconds ahead of the point in a joint_trajectory, 0 for two control periods.
    max_effort: N, of a gripper_command.
    """

    kind: CommandKind
    topic: str
    dims: tuple[str, ...]
    names: tuple[str, ...] = ()
    frame: str = ""
    scale: float = 1.0
    offset: float = 0.0
    horizon: float = 0.0
    max_effort: float = 0.0


@dataclass(frozen=True)
class RosWiring:
    """The ROS side of a contract.

    driver: what brings the arm's own topics up, told to whoever has to start it.
    """

    state: tuple[StateSource, ...]
    commands: tuple[CommandSink, ...]
    driver: str = ""


def problems(
    wiring: RosWiring,
    cameras: Sequence[tuple[str, str]],
    states: Sequence[tuple[str, int, str]],
    mode: str,
    rotation: str,
    dims: Sequence[str],
    gripper: str,
) -> list[Problem]:
    """Everything that does not fit the contract. cameras: (name, topic); states: (name, size, topic)."""
    found: list[Problem] = []
    for name, topic in cameras:
        if not topic:
            found.append((f"cameras.{name}", "has no topic", "name the topic its images arrive on"))
    sources = {s.field: s for s in wiring.state}
    for name, size, topic in states:
        if not topic or name not in sources:
            found.append((f"state.{name}", "has no topic or no line in ros.state", "say where it comes from"))
            continue
        found += _state_problems(sources[name], size)
    for extra in sorted(set(sources) - {name for name, _, _ in states}):
        found.append((f"ros.state.{extra}", "no such state field", f"fields: {', '.join(n for n, _, _ in states)}"))
    told = [d for sink in wiring.commands for d in sink.dims]
    if sorted(told) != sorted(dims):
        odd = sorted(set(told) ^ set(dims)) or sorted({d for d in told if told.count(d) > 1})
        found.append(("ros.commands", f"{', '.join(odd)}: not commanded exactly once", "list each dimension once"))
    for sink in wiring.commands:
        found += _command_problems(sink, mode, rotation, gripper)
    return found


def _state_problems(source: StateSource, size: int) -> list[Problem]:
    where, found = f"ros.state.{source.field}", []
    if source.kind == "joint_state":
        if len(source.names) != size or len(set(source.names)) != size:
            found.append((where, f"{len(source.names)} joint names for {size} values", "name each joint once"))
        if source.part == "orientation":
            found.append((where, "a JointState has no orientation", "position, velocity or effort"))
    elif source.kind == "pose_stamped":
        wanted = {"position": (3,), "orientation": (3, 4)}.get(source.part, ())
        if size not in wanted:
            found.append(
                (where, f"{size} values cannot be the {source.part} of a pose", "position 3, orientation 3 or 4")
            )
    if not (math.isfinite(source.scale) and source.scale != 0.0):
        found.append((where, "scale must be finite and not zero", "physical units per unit on the wire"))
    return found


def _command_problems(sink: CommandSink, mode: str, rotation: str, gripper: str) -> list[Problem]:
    where, found = f"ros.commands.{sink.topic}", []
    if not sink.topic:
        found.append(("ros.commands", f"a {sink.kind} without topic", "name it"))
    moving = [d for d in sink.dims if d != gripper]
    turning = {"none": 0, "quaternion_xyzw": 4}.get(rotation, 3)
    if sink.kind in ("twist_stamped", "pose_stamped"):
        allowed = ("ee_delta",) if sink.kind == "twist_stamped" else ("ee_delta", "ee_absolute")
        if mode not in allowed:
            found.append((where, f"{sink.kind} does not carry {mode}", f"modes: {', '.join(allowed)}"))
        if len(moving) != len(sink.dims) or len(sink.dims) != 3 + turning:
            found.append((where, f"{len(sink.dims)} dimensions", f"x, y, z and {turning} of rotation, no gripper"))
    if sink.kind in ("joint_trajectory", "float64_multi_array") and moving and not mode.startswith("joint"):
        found.append((where, f"{sink.kind} does not carry {mode}", "a joint mode"))
    if sink.kind == "joint_trajectory" and mode == "joint_velocity" and moving:
        found.append((where, "a trajectory needs positions", "joint_absolute or joint_delta"))
    if sink.kind == "joint_trajectory" and len(sink.names) != len(sink.dims):
        found.append((where, f"{len(sink.names)} joint names for {len(sink.dims)} dimensions", "one each"))
    if sink.names and len(sink.names) != len(sink.dims):
        found.append((where, "names and dims differ in number", "one joint per dimension, or no names"))
    if sink.kind == "gripper_command" and sink.dims != (gripper,):
        found.append((where, "takes the gripper alone", f"dims: [{gripper}]"))
    if not (math.isfinite(sink.scale) and sink.scale != 0.0 and math.isfinite(sink.offset)):
        found.append((where, "scale and offset must be finite, scale not zero", "correct them"))
    if sink.horizon < 0.0 or sink.max_effort < 0.0:
        found.append((where, "horizon and max_effort are not negative", "correct them"))
    return found
