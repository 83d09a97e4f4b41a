"""A wrong sign or frame of one action dimension turns a good policy into a dangerous one.

Pinned: a correct arm passes, its latency measured, behind every shipped contract that takes deltas; every single
fault (sign, scale, frame, a dead dimension, exchanged, stuck or unmeasured gripper) is named; every motion is
announced, small, inside the limits, and undone. Determinism: an arm that integrates its commands, with simulated
time.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ratchet_calibration.arms import action_checks
from ratchet_calibration.arms.action_checks import ActionFacts
from ratchet_calibration.geometry import Float
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, Observation
from ratchet_vla.testing.fake_contract import arm

START = Rotation.from_euler("xyz", [3.0, 0.2, 0.9])


class BentArm:
    """Goes where it is told, but for its faults. scales: per dimension. turned: frame of its deltas. late: steps."""

    def __init__(
        self,
        scales: dict[str, float] | None = None,
        turned: Rotation | None = None,
        grip: float = 1.0,
        late: int = 0,
        start: tuple[float, float, float] = (0.0, 0.0, 0.0),
        contract: RobotContract | None = None,
    ) -> None:
        self._contract = contract or arm("ee_delta")
        self.names = [d.name for d in self._contract.action.dims]
        self.scales = np.array([(scales or {}).get(n, 1.0) for n in self.names])
        self.turned = turned
        self.grip = grip
        self.waiting = deque([np.zeros(len(self.names))] * late)
        self.position = np.array(start)
        self.orientation = START
        self.opening = 1.0
        self.steps = 0
        self.sent: list[Float] = []
        self.places: list[Float] = []
        self.turns: list[float] = []
        self.held = 0

    @property
    def contract(self) -> RobotContract:
        return self._contract

    def observe(self, cameras: bool = True) -> Observation:
        state = {
            "place": self.position.astype(np.float32),
            "turned": self.orientation.as_rotvec().astype(np.float32),
            "gripper": np.array([self.opening], np.float32),
        }
        return Observation({}, state, "", self.steps / self._contract.control_hz, self.steps)

    def act(self, action: Float32) -> None:
        self.sent.append(np.asarray(action, float))
        self.waiting.append(self.scales * action)
        values = self.waiting.popleft()
        move = values[:3]
        if self.turned is not None:
            move = (self.turned if self.turned is not FOLLOW else self.orientation).apply(move)
        self.position = self.position + move
        self.orientation = Rotation.from_rotvec(values[3:6]) * self.orientation
        target = values[6] if self.grip > 0 else 1 - values[6]
        self.opening += np.clip(target - self.opening, -0.2, 0.2) * abs(self.grip)
        self.steps += 1
        self.places.append(self.position.copy())
        self.turns.append(float((self.orientation * START.inv()).magnitude()))

    def hold(self) -> None:
        self.held += 1


FOLLOW = Rotation.identity()


def check(robot: BentArm, announcements: list[str] | None = None) -> ActionFacts:
    return action_checks.check(robot, (announcements if announcements is not None else []).append)


def test_a_good_arm_passes_and_ends_where_it_began() -> None:
    robot = BentArm()
    announcements: list[str] = []
    result = check(robot, announcements)
    assert result.problems == ()
    assert (result.frame, result.gripper_works) == ("base", True)
    assert [d.name for d in result.dims] == robot.names[:-1]
    assert [d.scale for d in result.dims] == pytest.approx([1.0] * 6, abs=0.02)
    assert np.abs(robot.position).max() < 1e-6
    assert len(announcements) == 8  # six dimensions, open, closed: nothing moves without a word before
    assert robot.held == 1
    limits = robot.contract.limits
    hz = robot.contract.control_hz
    speeds = np.abs(np.array(robot.sent)[:, :6]).max(0) * hz
    assert (speeds < 0.5 * np.array(limits.velocity[:6])).all()
    assert np.ptp(np.array(robot.places), axis=0).max() <= 0.05 + 1e-9
    assert max(robot.turns) <= 0.25 + 1e-9


@pytest.mark.parametrize("late", [0, 2, 4])
def test_latency_is_measured(late: int) -> None:
    robot = BentArm(late=late)
    period = 1 / robot.contract.control_hz
    base = np.median([d.latency for d in check(BentArm()).dims])
    assert np.median([d.latency for d in check(robot).dims]) - base == pytest.approx(late * period, abs=0.3 * period)


@pytest.mark.parametrize(
    ("robot", "words"),
    [
        (BentArm({"x": -1.0}), "x moves the wrong way"),
        (BentArm({"r2": -1.0}), "r2 moves the wrong way"),
        (BentArm({"y": 2.0}), "y moves 2.00 times"),
        (BentArm({"z": 0.04}), "z moves only 0.04"),
        (BentArm(turned=FOLLOW), "the hand's frame"),
        (BentArm(turned=Rotation.from_euler("xyz", [0.5, 0.9, -0.4])), "neither"),
        (BentArm(grip=-1.0), "exchanged"),
        (BentArm(grip=1e-9), "does not open"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_every_fault_is_named(robot: BentArm, words: str) -> None:
    problems = check(robot).problems
    assert any(words in p for p in problems), problems


def test_a_dead_dimension_is_refused() -> None:
    with pytest.raises(RatchetError, match=r"check\.did_not_move.*y was asked"):
        check(BentArm({"y": 0.0}))


def test_it_moves_away_from_the_edge_of_the_workspace() -> None:
    robot = BentArm(start=(0.499, 0.0, -0.499))
    assert check(robot).problems == ()
    places = np.array(robot.places)
    assert (np.abs(places) <= 0.5 + 1e-9).all()


def test_a_contract_without_deltas_is_refused() -> None:
    robot = BentArm()
    robot._contract = arm("joint_absolute")
    with pytest.raises(RatchetError, match=r"check\.unsupported"):
        check(robot)
    assert robot.sent == []
    with pytest.raises(RatchetError, match=r"check\.bad_size"):
        action_checks.check(BentArm(), lambda text: None, size=0.9)


SHIPPED = sorted((Path(__file__).resolve().parents[3] / "robots").glob("*.yaml"))
GRIPPER_FIELDS = {
    "franka_fr3": "fingers",
    "franka_fr3_joint": "fingers",
    "libero": "gripper",
    "metaworld": "gripper",
    "so101": "gripper",
    "ur5e": "knuckle",
    "ur5e_trajectory": "knuckle",
    "xarm": "drive",
}


class ShippedArm:
    """A faultless arm behind a shipped contract: deltas move the hand, every state field measures what it should.

    exchanged: open and closed are swapped in the driver. opening: share, 0 closed to 1 open.
    """

    def __init__(self, contract: RobotContract, exchanged: bool = False) -> None:
        self.contract = contract
        self.exchanged = exchanged
        limits = contract.limits
        self.position = np.add(limits.workspace_low, limits.workspace_high) / 2
        self.orientation = START
        self.opening = 1.0
        self.steps = 0

    def observe(self, cameras: bool = True) -> Observation:
        measured = action_checks.gripper_field(self.contract)
        state = {}
        for field in self.contract.state:
            if measured is not None and field.name == measured.name:
                values = self.measured_gripper(field.unit, field.size)
            elif field.size == 3 and field.unit == "m":
                values = self.position
            elif field.unit == "quaternion_xyzw":
                values = self.orientation.as_quat()
            elif field.size == 3:
                values = self.orientation.as_rotvec()
            else:
                values = np.zeros(field.size)
            state[field.name] = values.astype(np.float32)
        return Observation({}, state, "", self.steps / self.contract.control_hz, self.steps)

    def measured_gripper(self, unit: str, size: int) -> Float:
        gripper = self.contract.action.gripper
        assert gripper is not None
        dim = next(d for d in self.contract.action.dims if d.name == gripper.dim)
        width = 0.08 * self.opening
        if unit == dim.unit:
            width = gripper.closed + self.opening * (gripper.open - gripper.closed)
        return np.array([width]) if size == 1 else np.array([width / 2, -width / 2])

    def act(self, action: Float32) -> None:
        gripper = self.contract.action.gripper
        assert gripper is not None
        values = np.asarray(action, float)
        self.position = self.position + values[:3]
        if len(values) > 4:
            self.orientation = Rotation.from_rotvec(values[3:6]) * self.orientation
        opening = float((values[-1] - gripper.closed) / (gripper.open - gripper.closed))
        self.opening = 1 - opening if self.exchanged else opening
        self.steps += 1

    def hold(self) -> None:
        """It stands still by itself."""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_gripper_of_every_shipped_robot_is_told_from_its_contract(path: Path) -> None:
    measured = action_checks.gripper_field(RobotContract.load(path))
    assert measured is not None
    assert measured.name == GRIPPER_FIELDS[path.stem]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_robot_that_takes_deltas_passes_and_its_exchanged_gripper_does_not(path: Path) -> None:
    contract = RobotContract.load(path)
    if contract.action.control_mode != "ee_delta":
        with pytest.raises(RatchetError, match=r"check\.unsupported"):
            action_checks.check(ShippedArm(contract), lambda text: None)
        return
    result = action_checks.check(ShippedArm(contract), lambda text: None)
    assert result.problems == ()
    assert result.gripper_works
    assert result.gripper_open > result.gripper_closed
    result = action_checks.check(ShippedArm(contract, exchanged=True), lambda text: None)
    assert result.problems == ("open and closed are exchanged",)


def test_a_gripper_whose_angle_falls_on_opening_works() -> None:
    raw = arm("ee_delta").to_dict()
    raw["action"]["gripper"] = {"dim": "gripper", "open": 0.0, "closed": 1.0}
    contract = RobotContract.from_dict(raw)
    result = action_checks.check(BentArm(contract=contract), lambda text: None)
    assert result.problems == ()
    assert result.gripper_open < result.gripper_closed
    assert "exchanged" in action_checks.check(BentArm(grip=-1.0, contract=contract), lambda text: None).problems[0]


def test_a_gripper_that_nothing_measures_is_not_called_good() -> None:
    raw = arm("ee_delta").to_dict()
    raw["state"] = [field for field in raw["state"] if field["name"] != "gripper"]
    result = action_checks.check(BentArm(contract=RobotContract.from_dict(raw)), lambda text: None)
    assert not result.gripper_works
    assert np.isnan(result.gripper_open)
    assert "no state field measures the gripper" in result.problems[0]
