"""The simulated robot stands in for an arm in every test of the runtime; it must behave as the protocol says.

Pinned: the conformance suite on Meta-World, simulated time, and that success is the benchmark's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ratchet_sim.registry import make_expert
from ratchet_sim.robot import SimRobot
from ratchet_vla.errors import RatchetError
from ratchet_vla.testing.conformance.robot import RobotConformance


@pytest.fixture
def robot() -> Iterator[SimRobot]:
    sim_robot = SimRobot("metaworld", "door-open", 0)
    sim_robot.connect()
    yield sim_robot
    sim_robot.close()


class TestSimRobot(RobotConformance):
    """The shared suite."""

    def test_stamps_are_simulated_time(self, robot: SimRobot) -> None:
        for _ in range(3):
            robot.act(self.still(robot))
        assert robot.observe(cameras=False).stamp == pytest.approx(3 / robot.contract.control_hz)

    def test_reset_starts_the_same_episode_again(self, robot: SimRobot) -> None:
        first = robot.observe().images["corner2"]
        robot.act(self.still(robot) + np.float32(0.02))
        robot.reset(0)
        second_observation = robot.observe()
        assert second_observation.sequence == 0
        np.testing.assert_array_equal(second_observation.images["corner2"], first)

    def test_the_expert_succeeds_through_the_protocol(self, robot: SimRobot) -> None:
        expert = make_expert("metaworld", "door-open")
        assert robot._env is not None
        expert.reset(robot._env)
        for _ in range(40):
            robot.act(expert.act(robot._env))
            if robot.success():
                break
        assert robot.success()


def test_an_unconnected_robot_refuses() -> None:
    with pytest.raises(RatchetError, match=r"robot\.not_connected"):
        SimRobot("metaworld", "door-open", 0).observe()
