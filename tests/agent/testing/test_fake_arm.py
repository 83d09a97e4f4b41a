"""FakeArm stands in for hardware in every fault test: where it behaves unlike an arm, those tests prove nothing.

Pinned: the conformance suite that SimRobot passes too, in every control mode, and that its faults do what they say.
Time is its own manual clock.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ratchet_vla.errors import RatchetError
from ratchet_vla.testing.conformance.robot import RobotConformance
from ratchet_vla.testing.fake_arm import FakeArm
from ratchet_vla.testing.fake_contract import MODES, arm


@pytest.fixture(params=MODES)
def robot(request: pytest.FixtureRequest) -> Iterator[FakeArm]:
    made = FakeArm(arm(request.param))
    made.connect()
    yield made
    made.close()


class TestFakeArm(RobotConformance):
    """The shared suite."""

    def test_it_goes_where_it_is_told(self, robot: FakeArm) -> None:
        action = self.still(robot)
        action[0] = 0.01
        robot.act(action)
        mode = robot.contract.action.control_mode
        assert robot.position[0] == pytest.approx(0.01 * 0.05 if mode == "joint_velocity" else 0.01)
        assert robot.observe().state["place"][0] == robot.position[0]

    def test_frames_differ_from_each_other_until_they_freeze(self, robot: FakeArm) -> None:
        first, second = robot.observe(), robot.observe()
        assert not np.array_equal(first.images["front"], second.images["front"])
        robot.faults.frozen_frames = True
        stamp = robot.frames_stamp()
        robot.act(self.still(robot))
        assert robot.frames_stamp() == stamp
        np.testing.assert_array_equal(robot.observe().images["front"], second.images["front"])

    def test_a_frozen_state_repeats_its_stamp(self, robot: FakeArm) -> None:
        before = robot.observe(cameras=False)
        robot.faults.frozen_state = True
        robot.act(self.still(robot))
        assert robot.observe(cameras=False).stamp == before.stamp

    def test_other_faults(self, robot: FakeArm) -> None:
        robot.faults.not_finite = True
        assert np.isnan(robot.observe().state["place"]).all()
        robot.faults.not_finite = False
        robot.faults.shift = 0.5
        assert robot.observe().state["place"][0] == pytest.approx(0.5)
        robot.faults.refuse = True
        with pytest.raises(RatchetError, match=r"robot\.refused"):
            robot.act(self.still(robot))


def test_an_unconnected_arm_refuses() -> None:
    with pytest.raises(RatchetError, match=r"robot\.not_connected"):
        FakeArm(arm()).observe()
