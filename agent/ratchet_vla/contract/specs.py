"""What a contract says of a robot, part by part: cameras, state, actions, limits, watchdog times, simulator.

Knows fields with their units and frames. Knows no file and no rule that ties one field to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ratchet_vla.contract.topics import TopicMapping
from ratchet_vla.errors import RatchetError

ControlMode = Literal["ee_delta", "ee_absolute", "joint_delta", "joint_absolute", "joint_velocity"]
"""What the action vector commands: a pose or joints, as a step from where the arm is or absolute, or joint speeds."""
RotationRepr = Literal["none", "axis_angle", "euler_xyz", "quaternion_xyzw"]
"""How a rotation is written in the action vector."""
SCHEMA = 1
"""Version of the contract's file format."""


@dataclass(frozen=True)
class CameraSpec:
    """One camera. Pixels reach the policy upright, RGB, at (height, width); the driver applies `rotate` and `mirror`.

    rotate: degrees counter-clockwise that turn the raw image upright: 0, 90, 180 or 270.
    mirror: True where the raw image must be flipped left-right after the rotation.
    source: the simulator's camera name or the device's serial; empty where the topic says it all.
    position: (3,) m, world frame, where a simulated camera is moved to; empty leaves it where the model has it.
    """

    name: str
    width: int
    height: int
    topic: str = ""
    source: str = ""
    encoding: Literal["rgb8", "bgr8"] = "rgb8"
    rotate: Literal[0, 90, 180, 270] = 0
    mirror: bool = False
    position: tuple[float, ...] = ()
    calibration_id: str = ""


@dataclass(frozen=True)
class StateField:
    """One proprioceptive quantity: `size` numbers in `unit`, expressed in `frame`."""

    name: str
    size: int
    unit: str
    frame: str = ""
    topic: str = ""


@dataclass(frozen=True)
class ActionDim:
    """One action dimension in physical units.

    low, high: the range the controller accepts for one control step.
    command_scale: physical units per unit of the driver's own command (0.05 where command 1.0 moves 0.05 m).
    """

    name: str
    unit: str
    low: float
    high: float
    command_scale: float = 1.0


@dataclass(frozen=True)
class GripperSpec:
    """Which action dimension is the gripper and what its numbers mean, in the contract's own units.

    binary: True where the hardware knows only open and closed, so that the sign against the middle decides.
    """

    dim: str
    open: float
    closed: float
    binary: bool = False


@dataclass(frozen=True)
class ActionSpace:
    """The action vector: order of `dims` is the order of every action array."""

    control_mode: ControlMode
    rotation: RotationRepr
    frame: str
    dims: tuple[ActionDim, ...]
    gripper: GripperSpec | None = None

    @property
    def size(self) -> int:
        """D, the length of every action vector."""
        return len(self.dims)


@dataclass(frozen=True)
class Limits:
    """Bounds that the safety filter enforces, per action dimension unless said otherwise.

    velocity: units/s; acceleration: units/s^2; one value per action dimension (gripper included, inf to exempt).
    workspace_low, workspace_high: (3,) m in the action frame, box for the end effector; empty for joint modes.
    position_low, position_high: joint limits in the dimension's unit for joint modes, one value per dimension that is
        not the gripper; empty otherwise.
    jerk: units/s^3, one value per action dimension (inf to exempt one); empty where the arm needs none.
    ramp_time: seconds over which the permitted speed grows from zero to the limit at a start, after a hold and after an
        intervention; 0 leaves the start to the acceleration limit alone.
    position_state, rotation_state: names of the state fields that measure what the actions move: the end effector's
        position and orientation, or the joints (`position_state`). Empty takes the only field that fits.
    """

    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]
    workspace_low: tuple[float, ...] = ()
    workspace_high: tuple[float, ...] = ()
    position_low: tuple[float, ...] = ()
    position_high: tuple[float, ...] = ()
    jerk: tuple[float, ...] = ()
    ramp_time: float = 1.0
    position_state: str = ""
    rotation_state: str = ""


@dataclass(frozen=True)
class Watchdog:
    """Ages in seconds beyond which the robot holds, and how long a controlled stop may take.

    observation_max_age: age of the measured state, and of the frames a decision is made on.
    action_max_age: how long after the moment it was predicted for an action may still be sent.
    policy_timeout: how long an answer of the policy may take. stop_time: from full speed to standstill.
    """

    observation_max_age: float
    action_max_age: float
    policy_timeout: float
    stop_time: float


@dataclass(frozen=True)
class SimulatorSpec:
    """How the simulator realises this contract: which package, and simulator steps per control step."""

    kind: Literal["libero", "metaworld"]
    steps_per_control: int = 1
    settle_steps: int = 0


@dataclass(frozen=True)
class VerifiedFact:
    """Something that was measured on this robot: what, how much in which unit, and when (ISO 8601, UTC)."""

    name: str
    value: float
    unit: str
    date: str


@dataclass(frozen=True)
class ContractSpec:
    """The fields of a contract, as `robots/*.yaml` names them; `RobotContract` adds how they are read and checked."""

    schema: int
    name: str
    control_hz: float
    cameras: tuple[CameraSpec, ...]
    state: tuple[StateField, ...]
    action: ActionSpace
    limits: Limits
    watchdog: Watchdog
    simulator: SimulatorSpec | None = None
    description: str = ""
    ros: TopicMapping | None = None
    verified: tuple[VerifiedFact, ...] = ()

    def camera(self, name: str) -> CameraSpec:
        """The camera called so.

        Raises:
            RatchetError: contract.unknown_camera.
        """
        for camera in self.cameras:
            if camera.name == name:
                return camera
        raise RatchetError(
            "contract.unknown_camera",
            f"no camera '{name}'",
            where=self.name,
            fix=f"cameras: {', '.join(camera.name for camera in self.cameras)}",
        )
