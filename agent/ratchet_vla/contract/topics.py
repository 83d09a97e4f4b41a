"""How a contract's fields travel as ROS messages: which topic, which message, which joints, in which order.

Knows words; `checking` holds them against the rest of the contract. Imports no ROS: the nodes do the translation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StateKind = Literal["joint_state", "pose_stamped", "float64_multi_array"]
CommandKind = Literal["twist_stamped", "pose_stamped", "joint_trajectory", "float64_multi_array", "gripper_command"]


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
class TopicMapping:
    """The ROS side of a contract.

    driver: what brings the arm's own topics up, told to whoever has to start it.
    """

    state: tuple[StateSource, ...]
    commands: tuple[CommandSink, ...]
    driver: str = ""
