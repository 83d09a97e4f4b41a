"""Does the arm do what the contract says an action does? Small, slow, announced motions, and what they moved.

Knows the contract's action dimensions and which state measures them. Knows no device: `Arm` is what a Robot is.
Motions stay within 5 cm or 0.25 rad and a tenth of a second's worth of the velocity limit per step, go out and come
back, and are refused where the workspace leaves no room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from agent.contract import RobotContract
from agent.errors import RatchetError
from agent.records import Float32
from calibration.arm import Arm
from calibration.geometry import Float
from calibration.signals import lag

STROKE = {"m": 0.05, "rad": 0.25}  # at the most, out
STEPS = 6  # out, and as many back
SETTLE = 8  # steps without motion in between
FIT = 0.25  # share by which an arm may move further than asked
LAZY = 0.1  # of what was asked; compliant controllers stay behind (an operational-space one by three quarters)


@dataclass(frozen=True)
class DimensionFact:
    """scale: measured over commanded motion, negative where the sign is wrong. across: the share that went elsewhere.
    latency: s from command to motion."""

    name: str
    scale: float
    across: float
    latency: float


@dataclass(frozen=True)
class ActionFacts:
    """dims: of every dimension that moves the hand. frame: base, tool, or unknown, of positional deltas.
    gripper_open, gripper_closed: the opening measured after each command; gripper_works: whether they differ as they
    should. problems: what contradicts the contract, in words."""

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
        announce: told in words before each motion; may wait for a person. pace: waits for the next control step; not
            needed where `act` advances simulated time. size: share of a dimension's range per step, in (0, 0.5].

    Raises:
        RatchetError: check.unsupported for contracts without deltas; check.no_room; check.did_not_move.
    """
    contract = arm.contract
    if contract.action.control_mode != "ee_delta":
        raise RatchetError(
            "check.unsupported",
            f"actions of {contract.action.control_mode} are not checked yet",
            where=contract.name,
            fix="compare one small motion by eye",
        )
    if not 0 < size <= 0.5:
        raise RatchetError("check.bad_size", f"{size} is no share of a range in (0, 0.5]", where="size")
    gripper = contract.action.gripper
    names = [d.name for d in contract.action.dims]
    rest = np.zeros(len(names), np.float32)
    measure = _Measure(arm)
    moves: list[tuple[Float, Float]] = []  # commanded and measured position
    facts: list[DimensionFact] = []
    problems: list[str] = []
    if gripper is not None:
        rest[names.index(gripper.dim)] = gripper.open
    for index, dim in enumerate(contract.action.dims):
        if gripper is not None and dim.name == gripper.dim:
            continue
        turning = dim.unit == "rad"
        step = size * min(dim.high, -dim.low if dim.low < 0 else dim.high)
        step = min(step, 0.1 * contract.limits.velocity[index], STROKE["rad" if turning else "m"] / STEPS)
        before = measure.settled(rest, pace)
        direction = _direction(measure.position, step * STEPS, index, contract) if not turning else 1.0
        announce(f"{dim.name}: {direction * step * STEPS:+.3f} {dim.unit} and back")
        out, commanded, seen = _stroke(arm, measure, rest, index, direction * step, pace)
        _, back, returned = _stroke(arm, measure, rest, index, -direction * step, pace)
        asked = direction * step * STEPS
        if turning:
            moved = (Rotation.from_matrix(out[1]) * Rotation.from_matrix(before[1]).inv()).as_rotvec()
            axis = _axis(dim.name, index, names)
        else:
            moved = out[0] - before[0]
            axis = index if index < 3 else 0
            wanted = np.zeros(3)
            wanted[axis] = asked
            moves.append((wanted, moved))
        if np.linalg.norm(moved) < 0.02 * abs(asked):
            raise RatchetError(
                "check.did_not_move",
                f"{dim.name} was asked to move {asked:+.4f} {dim.unit} and did not",
                where=contract.name,
                fix="check that the controller is active and takes this dimension",
            )
        scale = float(moved[axis] / asked)
        across = float(np.linalg.norm(np.delete(moved, axis)) / (np.linalg.norm(moved) + 1e-12))
        facts.append(DimensionFact(dim.name, scale, across, _delay(commanded + back, seen + returned, axis, turning)))
    frame = _frame(moves, measure.orientation)
    for fact in facts:
        if frame == "base" or fact.across < 0.5:
            if fact.scale < 0:
                problems.append(f"{fact.name} moves the wrong way (measured {fact.scale:+.2f} of what was asked)")
            elif fact.scale > 1 + FIT:
                problems.append(f"{fact.name} moves {fact.scale:.2f} times what was asked; correct its command_scale")
            elif fact.scale < LAZY:
                problems.append(f"{fact.name} moves only {fact.scale:.2f} of what was asked")
    if frame == "tool":
        problems.append("deltas act in the hand's frame, the contract's are in " + (contract.action.frame or "base"))
    elif frame == "unknown":
        problems.append("deltas act neither in the base's nor in the hand's frame")
    opened = closed = float("nan")
    works = True
    if gripper is not None:
        opened, closed = _grip(
            arm, measure, rest, names.index(gripper.dim), (gripper.open, gripper.closed), announce, pace
        )
        works = opened > closed + 1e-3
        if not works:
            problems.append("the gripper does not open on its open command" if abs(opened - closed) < 1e-3 else
                            "open and closed are exchanged")  # fmt: skip
    arm.hold()
    return ActionFacts(tuple(facts), frame, opened, closed, works, tuple(problems))


class _Measure:
    """Pose of the hand and opening of the gripper, from the state fields that the contract names."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        contract = arm.contract
        fields = {s.name: s for s in contract.state}
        limits = contract.limits
        hand = [s.name for s in contract.state if s.unit == "m" and s.size == 3]
        turned = [s.name for s in contract.state if s.unit in ("rad", "quaternion", "quaternion_xyzw")]
        self._position = limits.position_state or (hand[0] if hand else "")
        self._rotation = limits.rotation_state or (turned[0] if turned else "")
        others = [n for n in fields if n not in (self._position, self._rotation)]
        self._gripper = next((n for n in others if "grip" in n or "open" in n), "")
        if self._position not in fields:
            raise RatchetError(
                "check.unsupported", "no state field measures the hand's position", where=contract.name,
                fix="name it in limits.position_state",
            )  # fmt: skip
        self.position = np.zeros(3)
        self.orientation = np.eye(3)
        self.opening = 0.0
        self.stamp = 0.0

    def read(self) -> tuple[Float, Float]:
        seen = self.arm.observe(cameras=False)
        state: Mapping[str, Any] = seen.state
        self.position = np.asarray(state[self._position], float)[:3]
        if self._rotation in state:
            value = np.asarray(state[self._rotation], float)
            turn = Rotation.from_quat(value) if len(value) == 4 else Rotation.from_rotvec(value)
            self.orientation = turn.as_matrix()
        if self._gripper in state:
            self.opening = float(np.abs(np.asarray(state[self._gripper], float)).sum())
        self.stamp = seen.stamp
        return self.position.copy(), self.orientation.copy()

    def settled(self, rest: Float32, pace: Callable[[], None]) -> tuple[Float, Float]:
        for _ in range(SETTLE):
            self.arm.act(rest)
            pace()
        return self.read()


Trace = list[tuple[float, float]]
Motion = list[tuple[float, Float, Float]]


def _stroke(
    arm: Arm, measure: _Measure, rest: Float32, index: int, step: float, pace: Callable[[], None]
) -> tuple[tuple[Float, Float], Trace, Motion]:
    """STEPS commands of `step`, then stillness. What was commanded and seen, with times."""
    commanded: Trace = []
    seen: Motion = []
    for k in range(STEPS + SETTLE):
        action = rest.copy()
        action[index] = step if k < STEPS else 0.0
        commanded.append((measure.stamp, float(action[index])))
        arm.act(action)
        pace()
        position, orientation = measure.read()
        seen.append((measure.stamp, position, orientation))
    return (seen[-1][1], seen[-1][2]), commanded, seen


def _delay(commanded: Trace, seen: Motion, axis: int, turning: bool) -> float:
    """s from command to velocity; NaN where the two do not resemble each other."""
    times = np.array([t for t, _, _ in seen])
    if turning:
        start = Rotation.from_matrix(seen[0][2])
        values = np.array([(Rotation.from_matrix(r) * start.inv()).as_rotvec()[axis] for _, _, r in seen])
    else:
        values = np.array([p[axis] for _, p, _ in seen])
    try:
        # A difference tells the speed at the middle between its two times.
        found = lag(
            [t for t, _ in commanded],
            [v for _, v in commanded],
            ((times[1:] + times[:-1]) / 2).tolist(),
            np.diff(values).tolist(),
        )
    except RatchetError:
        return float("nan")
    return found.seconds


def _direction(position: Float, length: float, index: int, contract: RobotContract) -> float:
    """+1 or -1: towards where the workspace has room."""
    low = contract.limits.workspace_low
    high = contract.limits.workspace_high
    if not low or index > 2:
        return 1.0
    if position[index] + length <= high[index]:
        return 1.0
    if position[index] - length >= low[index]:
        return -1.0
    raise RatchetError(
        "check.no_room", f"{length:.3f} m of room are needed along {'xyz'[index]}", where=contract.name,
        fix="bring the hand to the middle of the workspace",
    )  # fmt: skip


def _axis(name: str, index: int, names: list[str]) -> int:
    for axis, ends in enumerate((("x", "roll"), ("y", "pitch"), ("z", "yaw"))):
        if name.endswith(ends):
            return axis
    return max(index - 3, 0) % 3


def _frame(moves: list[tuple[Float, Float]], orientation: Float) -> str:
    """base or tool, whichever explains the measured motions; unknown where neither does."""
    if not moves:
        return "base"
    wanted = np.stack([m[0] for m in moves])
    got = np.stack([m[1] for m in moves])
    size = np.linalg.norm(wanted, axis=1, keepdims=True)

    def misfit(turned: Float) -> float:
        # Sign and scale are judged per dimension, so only the line along which each went counts here.
        cosine = np.abs((turned * got).sum(1)) / (size[:, 0] * np.linalg.norm(got, axis=1) + 1e-12)
        return float(1 - cosine.min())

    base = misfit(wanted)
    tool = misfit(wanted @ orientation.T)
    if min(base, tool) > 0.2:
        return "unknown"
    return "base" if base <= tool + 0.02 else "tool"


def _grip(
    arm: Arm, measure: _Measure, rest: Float32, index: int, values: tuple[float, float],
    announce: Callable[[str], None], pace: Callable[[], None],
) -> tuple[float, float]:  # fmt: skip
    found = []
    for name, value in zip(("open", "closed"), values, strict=True):
        announce(f"gripper: {name}")
        action = rest.copy()
        action[index] = value
        for _ in range(4 * SETTLE):
            arm.act(action)
            pace()
        measure.read()
        found.append(measure.opening)
    action = rest.copy()
    for _ in range(2 * SETTLE):
        arm.act(action)
        pace()
    return found[0], found[1]


def paced(hz: float) -> Callable[[], None]:
    """For an arm in real time: waits until the next control step is due."""
    due = [time.monotonic()]

    def wait() -> None:
        due[0] = max(due[0] + 1 / hz, time.monotonic())
        time.sleep(max(due[0] - time.monotonic(), 0.0))

    return wait
