"""A wrong sign or frame of one action dimension turns a good policy into a dangerous one.

Pinned: a correct arm passes, its latency measured; every single fault (sign, scale, frame, a dead dimension, exchanged
or stuck gripper) is named; every motion is announced, small, inside the limits, and undone. Determinism: an arm that
integrates its commands, with simulated time.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from agent.contract import RobotContract
from agent.errors import RatchetError
from agent.records import Float32, Observation
from agent.testing.fake_contract import arm
from calibration import action_checks
from calibration.action_checks import ActionFacts
from calibration.geometry import Float

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
    ) -> None:
        self._contract = arm("ee_delta")
        self.names = [d.name for d in self._contract.action.dims]
        self.scales = np.array([(scales or {}).get(n, 1.0) for n in self.names])
        self.turned, self.grip, self.waiting = turned, grip, deque([np.zeros(len(self.names))] * late)
        self.position, self.orientation = np.array(start), START
        self.opening, self.steps = 1.0, 0
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


def check(robot: BentArm, said: list[str] | None = None) -> ActionFacts:
    return action_checks.check(robot, (said if said is not None else []).append)


def test_a_good_arm_passes_and_ends_where_it_began() -> None:
    robot, said = BentArm(), []
    facts = check(robot, said)
    assert facts.problems == ()
    assert (facts.frame, facts.gripper_works) == ("base", True)
    assert [d.name for d in facts.dims] == robot.names[:-1]
    assert [d.scale for d in facts.dims] == pytest.approx([1.0] * 6, abs=0.02)
    assert np.abs(robot.position).max() < 1e-6
    assert len(said) == 8  # six dimensions, open, closed: nothing moves without a word before
    assert robot.held == 1
    limits, hz = robot.contract.limits, robot.contract.control_hz
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
