"""Action checks: whether the arm does what the contract says an action does, by small, slow, announced motions.

Knows the contract's action dimensions and which state fields measure them. Knows no device: `Arm` is what a Robot is.
Motions stay within 5 cm or 0.25 rad and a tenth of a second's worth of the velocity limit per step, go out and come
back, and are refused where the workspace leaves no room.

Nothing is guessed from a name: by the contract's own rule the dimensions are x, y, z, then the rotation, then the
gripper, and the gripper's state field follows from its unit and from what measures the pose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from ratchet_calibration.arms.protocol import Arm
from ratchet_calibration.geometry import Float
from ratchet_calibration.signals import lag
from ratchet_vla.contract import RobotContract, StateField
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32

STROKE = {"m": 0.05, "rad": 0.25}  # at the most, out
STEPS = 6  # out, and as many back
SETTLE = 8  # steps without motion in between
# LIBERO's controller covers 0.25 of a position delta and 0.32 of a rotation within one control step of a stroke:
# deltas are goals that the arm lags behind, so only a tenth is demanded.
FIT = 0.25  # share by which an arm may move further than asked
LAZY = 0.1  # of what was asked; compliant controllers stay behind (an operational-space one by three quarters)
GRIPPER_MOVES = 1e-3  # in the state field's unit; a smaller difference counts as not moving


@dataclass(frozen=True)
class DimensionFact:
    """One action dimension, measured.

    Attributes:
        scale: measured over commanded motion, negative where the sign is wrong.
        across: the share of the motion that went elsewhere, in [0, 1].
        latency: s from command to motion, NaN where the two signals do not resemble each other.
    """

    name: str
    scale: float
    across: float
    latency: float


@dataclass(frozen=True)
class ActionFacts:
    """Result of an action check.

    Attributes:
        dims: of every dimension that moves the hand.
        frame: base, tool, or unknown, of positional deltas.
        gripper_open, gripper_closed: measured after each command, in the state field's unit; NaN where nothing measures
            the gripper.
        gripper_works: whether they differ as they should.
        problems: what contradicts the contract, in words.
    """

    dims: tuple[DimensionFact, ...]
    frame: str
    gripper_open: float
    gripper_closed: float
    gripper_works: bool
    problems: tuple[str, ...]


def check(
    arm: Arm,
    announce: Callable[[str], None],
    *,
    pace: Callable[[], None] = lambda: None,
    size: float = 0.25,
) -> ActionFacts:
    """Move every dimension out and back, and the gripper once; the arm ends where it began.

    Args:
        arm: the robot, connected and free to move by 5 cm around where it is.
        announce: called with a sentence before each motion; may wait for a person.
        pace: waits for the next control step; not needed where `act` advances simulated time.
        size: share of a dimension's range per step, in (0, 0.5].

    Returns:
        What was measured, and what of it contradicts the contract.

    Raises:
        RatchetError: check.unsupported for contracts without deltas; check.bad_size; check.no_room;
            check.did_not_move.
    """
    contract = arm.contract
    _require_deltas(contract)
    if not 0 < size <= 0.5:
        raise RatchetError("check.bad_size", f"{size} is no share of a range in (0, 0.5]", where="size")
    gripper = contract.action.gripper
    dim_names = [dim.name for dim in contract.action.dims]
    rest_action = np.zeros(len(dim_names), np.float32)
    measure = _Measure(arm)
    moves: list[tuple[Float, Float]] = []  # commanded and measured displacement, m
    dimension_facts: list[DimensionFact] = []
    if gripper is not None:
        rest_action[dim_names.index(gripper.dim)] = gripper.open
    for axis_index, index in enumerate(_moving_dimensions(contract)):
        dim = contract.action.dims[index]
        turning = dim.unit == "rad"
        axis = axis_index % 3
        step = size * min(dim.high, -dim.low if dim.low < 0 else dim.high)
        step = min(step, 0.1 * contract.limits.velocity[index], STROKE["rad" if turning else "m"] / STEPS)
        start_position, start_orientation = measure.settled(rest_action, pace)
        direction = 1.0 if turning else _direction(measure.position, step * STEPS, axis, contract)
        announce(f"{dim.name}: {direction * step * STEPS:+.3f} {dim.unit} and back")
        end_pose, commands_out, motion_out = _stroke(arm, measure, rest_action, index, direction * step, pace)
        _, commands_back, motion_back = _stroke(arm, measure, rest_action, index, -direction * step, pace)
        commanded = direction * step * STEPS
        if turning:
            # Rotation deltas act on the left, in the fixed frame: after @ before^-1.
            turn = Rotation.from_matrix(end_pose[1]) * Rotation.from_matrix(start_orientation).inv()
            displacement = turn.as_rotvec()
        else:
            displacement = end_pose[0] - start_position
            commanded_displacement = np.zeros(3)
            commanded_displacement[axis] = commanded
            moves.append((commanded_displacement, displacement))
        if np.linalg.norm(displacement) < 0.02 * abs(commanded):
            raise RatchetError(
                "check.did_not_move",
                f"{dim.name} was asked to move {commanded:+.4f} {dim.unit} and did not",
                where=contract.name,
                fix="check that the controller is active and takes this dimension",
            )
        scale = float(displacement[axis] / commanded)
        across = float(np.linalg.norm(np.delete(displacement, axis)) / (np.linalg.norm(displacement) + 1e-12))
        latency_s = _latency(commands_out + commands_back, motion_out + motion_back, axis, turning)
        dimension_facts.append(DimensionFact(dim.name, scale, across, latency_s))
    frame = _frame(moves, measure.orientation)
    problems = [*_scale_problems(dimension_facts, frame), *_frame_problems(frame, contract)]
    opened = float("nan")
    closed = float("nan")
    works = True
    if gripper is not None:
        opened, closed = _move_gripper(arm, measure, rest_action, announce, pace)
        problem = _gripper_problem(contract, measure.gripper_field, opened, closed)
        works = not problem
        problems += [problem] if problem else []
    arm.hold()
    return ActionFacts(tuple(dimension_facts), frame, opened, closed, works, tuple(problems))


def gripper_field(contract: RobotContract) -> StateField | None:
    """The state field that measures the gripper.

    It is the one field that measures no pose and no arm joints. Where several are left, it is the one in the unit of
    the gripper's action dimension.

    Returns:
        The field, or None where the robot has no gripper or the contract does not tell which field measures it.
    """
    gripper = contract.action.gripper
    if gripper is None:
        return None
    unit = next(dim.unit for dim in contract.action.dims if dim.name == gripper.dim)
    pose_fields = {_position_field(contract), _rotation_field(contract), contract.limits.position_state}
    candidates = [field for field in contract.state if field.name not in pose_fields]
    if len(candidates) > 1:
        candidates = [field for field in candidates if field.unit == unit]
    return candidates[0] if len(candidates) == 1 else None


def paced(hz: float) -> Callable[[], None]:
    """For an arm in real time: waits until the next control step is due.

    Args:
        hz: the contract's control rate.
    """
    due_s = [time.monotonic()]

    def wait() -> None:
        due_s[0] = max(due_s[0] + 1 / hz, time.monotonic())
        time.sleep(max(due_s[0] - time.monotonic(), 0.0))

    return wait


# -- inside --------------------------------------------------------------------------------------------------------


class _Measure:
    """Pose of the hand and opening of the gripper, from the state fields that the contract names."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        contract = arm.contract
        self._position_name = _position_field(contract)
        self._rotation_name = _rotation_field(contract)
        self.gripper_field = gripper_field(contract)
        if self._position_name not in [field.name for field in contract.state]:
            raise RatchetError(
                "check.unsupported",
                "no state field measures the hand's position",
                where=contract.name,
                fix="name it in limits.position_state",
            )
        self.position = np.zeros(3)  # m
        self.orientation = np.eye(3)
        self.opening = float("nan")  # in the unit of the gripper's state field
        self.stamp = 0.0  # s

    def read(self) -> tuple[Float, Float]:
        """Observe the arm; returns copies of position (3,) m and orientation (3, 3)."""
        observation = self.arm.observe(cameras=False)
        state: Mapping[str, Any] = observation.state
        self.position = np.asarray(state[self._position_name], float)[:3]
        if self._rotation_name in state:
            rotation_values = np.asarray(state[self._rotation_name], float)
            if len(rotation_values) == 4:
                self.orientation = Rotation.from_quat(rotation_values).as_matrix()
            else:
                self.orientation = Rotation.from_rotvec(rotation_values).as_matrix()
        if self.gripper_field is not None and self.gripper_field.name in state:
            fingers = np.asarray(state[self.gripper_field.name], float)
            # Two fingers move apart with opposite signs in some drivers, so that only magnitudes add up to a width.
            self.opening = float(fingers[0]) if len(fingers) == 1 else float(np.abs(fingers).sum())
        self.stamp = observation.stamp
        return self.position.copy(), self.orientation.copy()

    def settled(self, rest_action: Float32, pace: Callable[[], None]) -> tuple[Float, Float]:
        """Stand still for SETTLE steps, then read."""
        for _ in range(SETTLE):
            self.arm.act(rest_action)
            pace()
        return self.read()


CommandTrace = list[tuple[float, float]]  # (time in s, commanded delta)
MotionTrace = list[tuple[float, Float, Float]]  # (time in s, position (3,) m, orientation (3, 3))


def _require_deltas(contract: RobotContract) -> None:
    """Refuse what these checks do not know: anything but x, y, z deltas in m, and a rotation vector in rad or none."""
    if contract.action.control_mode != "ee_delta":
        raise RatchetError(
            "check.unsupported",
            f"actions of {contract.action.control_mode} are not checked yet",
            where=contract.name,
            fix="compare one small motion by eye",
        )
    units = [contract.action.dims[index].unit for index in _moving_dimensions(contract)]
    if units not in (["m"] * 3, ["m"] * 3 + ["rad"] * 3):
        raise RatchetError(
            "check.unsupported",
            f"expected deltas of x, y, z in m and three rotations in rad or none, got units {', '.join(units)}",
            where=contract.name,
            fix="compare one small motion by eye",
        )


def _moving_dimensions(contract: RobotContract) -> list[int]:
    """Indices of the action dimensions that move the hand, in the contract's order: x, y, z, then the rotation."""
    gripper = contract.action.gripper
    return [index for index, dim in enumerate(contract.action.dims) if gripper is None or dim.name != gripper.dim]


def _position_field(contract: RobotContract) -> str:
    """Name of the field with the hand's position; "" where there is none."""
    if contract.limits.position_state and contract.action.control_mode.startswith("ee"):
        return contract.limits.position_state
    return next((field.name for field in contract.state if field.unit == "m" and field.size == 3), "")


def _rotation_field(contract: RobotContract) -> str:
    """Name of the field with the hand's orientation; "" where there is none."""
    if contract.limits.rotation_state:
        return contract.limits.rotation_state
    rotation_units = ("quaternion", "quaternion_xyzw")
    for field in contract.state:
        if (field.unit == "rad" and field.size == 3) or field.unit in rotation_units:
            return field.name
    return ""


def _stroke(
    arm: Arm, measure: _Measure, rest_action: Float32, index: int, step: float, pace: Callable[[], None]
) -> tuple[tuple[Float, Float], CommandTrace, MotionTrace]:
    """Command STEPS deltas of `step`, then stillness.

    Returns:
        The pose at the end (position, orientation), what was commanded and what was measured, with times.
    """
    commands: CommandTrace = []
    motion: MotionTrace = []
    for count in range(STEPS + SETTLE):
        action = rest_action.copy()
        action[index] = step if count < STEPS else 0.0
        commands.append((measure.stamp, float(action[index])))
        arm.act(action)
        pace()
        position, orientation = measure.read()
        motion.append((measure.stamp, position, orientation))
    return (motion[-1][1], motion[-1][2]), commands, motion


def _latency(commands: CommandTrace, motion: MotionTrace, axis: int, turning: bool) -> float:
    """s from command to velocity; NaN where the two do not resemble each other."""
    times_s = np.array([stamp for stamp, _, _ in motion])
    if turning:
        start_inverse = Rotation.from_matrix(motion[0][2]).inv()
        values = np.array([(Rotation.from_matrix(turned) * start_inverse).as_rotvec()[axis] for _, _, turned in motion])
    else:
        values = np.array([position[axis] for _, position, _ in motion])
    try:
        # A difference is the mean speed between its two times, so it belongs to the middle between them.
        measured_lag = lag(
            [stamp for stamp, _ in commands],
            [delta for _, delta in commands],
            ((times_s[1:] + times_s[:-1]) / 2).tolist(),
            np.diff(values).tolist(),
        )
    except RatchetError:
        return float("nan")
    return measured_lag.seconds


def _direction(position: Float, length: float, axis: int, contract: RobotContract) -> float:
    """+1 or -1: towards where the workspace has room for `length` m along `axis`."""
    low = contract.limits.workspace_low
    high = contract.limits.workspace_high
    if not low:
        return 1.0
    if position[axis] + length <= high[axis]:
        return 1.0
    if position[axis] - length >= low[axis]:
        return -1.0
    raise RatchetError(
        "check.no_room",
        f"{length:.3f} m of room are needed along {'xyz'[axis]}",
        where=contract.name,
        fix="bring the hand to the middle of the workspace",
    )


def _frame(moves: list[tuple[Float, Float]], orientation: Float) -> str:
    """base or tool, whichever explains the measured motions; unknown where neither does."""
    if not moves:
        return "base"
    commanded = np.stack([move[0] for move in moves])  # (n, 3) m, contract's frame
    measured = np.stack([move[1] for move in moves])  # (n, 3) m, base frame
    lengths = np.linalg.norm(commanded, axis=1, keepdims=True)

    def misfit(expected: Float) -> float:
        # Sign and scale are checked per dimension, so only the line along which each went counts here.
        cosine = np.abs((expected * measured).sum(1)) / (lengths[:, 0] * np.linalg.norm(measured, axis=1) + 1e-12)
        return float(1 - cosine.min())

    base_misfit = misfit(commanded)
    tool_misfit = misfit(commanded @ orientation.T)
    # 0.2 is the cosine error of 37 degrees: neither frame's axes explain the motion.
    if min(base_misfit, tool_misfit) > 0.2:
        return "unknown"
    # A hand that is nearly aligned with the base fits both; base is then the contract's usual meaning.
    return "base" if base_misfit <= tool_misfit + 0.02 else "tool"


def _scale_problems(dimension_facts: list[DimensionFact], frame: str) -> list[str]:
    """Dimensions that move the wrong way, too far or too little, in words."""
    problems = []
    for fact in dimension_facts:
        # In another frame a dimension moves along other axes: its own scale says nothing then.
        if frame != "base" and fact.across >= 0.5:
            continue
        if fact.scale < 0:
            problems.append(f"{fact.name} moves the wrong way (measured {fact.scale:+.2f} of what was asked)")
        elif fact.scale > 1 + FIT:
            problems.append(f"{fact.name} moves {fact.scale:.2f} times what was asked; correct its command_scale")
        elif fact.scale < LAZY:
            problems.append(f"{fact.name} moves only {fact.scale:.2f} of what was asked")
    return problems


def _frame_problems(frame: str, contract: RobotContract) -> list[str]:
    """What is wrong with the frame of the deltas, in words."""
    if frame == "tool":
        return ["deltas act in the hand's frame, the contract's are in " + (contract.action.frame or "base")]
    if frame == "unknown":
        return ["deltas act neither in the base's nor in the hand's frame"]
    return []


def _gripper_problem(contract: RobotContract, measured_by: StateField | None, opened: float, closed: float) -> str:
    """What is wrong with the gripper, in words; "" where it opens and closes as the contract says."""
    gripper = contract.action.gripper
    assert gripper is not None  # the caller moved it
    if measured_by is None:
        return "no state field measures the gripper, so it was moved but not checked"
    unit = next(dim.unit for dim in contract.action.dims if dim.name == gripper.dim)
    if not abs(opened - closed) > GRIPPER_MOVES:
        return "the gripper does not open on its open command"
    if measured_by.unit == unit:
        # The measurement is in the command's own numbers, so it must change as they do: an angle may fall on opening.
        growing = gripper.open > gripper.closed
    elif measured_by.unit == "rad":
        return ""  # an angle beside a command in other units: the contract does not tell which way it opens
    else:
        growing = True  # a width or aperture
    return "" if (opened > closed) == growing else "open and closed are exchanged"


def _move_gripper(
    arm: Arm,
    measure: _Measure,
    rest_action: Float32,
    announce: Callable[[str], None],
    pace: Callable[[], None],
) -> tuple[float, float]:
    """Open, close, open again; the opening measured after the first two, in the state field's unit."""
    gripper = arm.contract.action.gripper
    assert gripper is not None  # the caller checked
    index = [dim.name for dim in arm.contract.action.dims].index(gripper.dim)
    openings = []
    for command_name, command in (("open", gripper.open), ("closed", gripper.closed)):
        announce(f"gripper: {command_name}")
        action = rest_action.copy()
        action[index] = command
        for _ in range(4 * SETTLE):
            arm.act(action)
            pace()
        measure.read()
        openings.append(measure.opening)
    # The rest action holds the gripper open.
    for _ in range(2 * SETTLE):
        arm.act(rest_action)
        pace()
    return openings[0], openings[1]
