"""What every Robot must do, real or simulated. Inherit `RobotConformance` and give it a `robot` fixture (connected).

Pinned: observations match the contract, sequence and stamps grow, bad actions are refused before anything moves,
hold and close can be repeated. A control loop relies on each of these without asking.
"""

from __future__ import annotations

import numpy as np
import pytest

from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.robots.protocol import Robot

__all__ = ["RobotConformance"]


class RobotConformance:
    """Inherit in a Test class with a function-scoped fixture `robot` that yields a connected robot."""

    def test_is_a_robot(self, robot: Robot) -> None:
        assert isinstance(robot, Robot)

    def test_observations_match_the_contract(self, robot: Robot) -> None:
        seen = robot.observe()
        assert set(seen.images) == {c.name for c in robot.contract.cameras}
        for camera in robot.contract.cameras:
            assert seen.images[camera.name].shape == (camera.height, camera.width, 3)
            assert seen.images[camera.name].dtype == np.uint8
        for field in robot.contract.state:
            assert seen.state[field.name].shape == (field.size,)
            assert seen.state[field.name].dtype == np.float32
            assert np.isfinite(seen.state[field.name]).all()
        assert seen.instruction

    def test_frames_cost_nothing_when_not_asked_for(self, robot: Robot) -> None:
        assert robot.observe(cameras=False).images == {}

    def test_sequence_and_stamps_grow(self, robot: Robot) -> None:
        first = robot.observe(cameras=False)
        robot.act(self.still(robot))
        second = robot.observe(cameras=False)
        assert second.sequence == first.sequence + 1
        assert second.stamp > first.stamp

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_actions_that_are_not_finite_move_nothing(self, robot: Robot, value: float) -> None:
        before = robot.observe(cameras=False).state
        action = self.still(robot)
        action[0] = value
        with pytest.raises(RatchetError, match=r"robot\.bad_action"):
            robot.act(action)
        after = robot.observe(cameras=False).state
        for name, expected in before.items():
            np.testing.assert_array_equal(after[name], expected)

    def test_actions_of_another_size_are_refused(self, robot: Robot) -> None:
        with pytest.raises(RatchetError, match=r"robot\.bad_action"):
            robot.act(np.zeros(robot.contract.action.size + 1, np.float32))

    def test_hold_and_close_can_be_repeated(self, robot: Robot) -> None:
        robot.hold()
        robot.hold()
        robot.close()
        robot.close()

    @staticmethod
    def still(robot: Robot) -> np.ndarray:
        """An action that moves no joint: zero for deltas, the gripper where the contract calls it open."""
        action = np.zeros(robot.contract.action.size, np.float32)
        gripper = robot.contract.action.gripper
        if gripper is not None:
            action[[d.name for d in robot.contract.action.dims].index(gripper.dim)] = gripper.open
        return action
