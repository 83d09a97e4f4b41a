"""A simulated robot on the machine's clock: the same robot, with observations stamped when they are taken.

Knows a robot and a clock. For simulators run in real time; a real driver stamps at acquisition and needs none of this.
"""

from __future__ import annotations

import dataclasses

from ratchet_vla.contract import RobotContract
from ratchet_vla.records import Float32, Observation
from ratchet_vla.runtime.clock import Clock
from ratchet_vla.runtime.robots.protocol import Robot


class Restamped:
    """Passes everything on; only `Observation.stamp` is the clock's."""

    def __init__(self, robot: Robot, clock: Clock) -> None:
        self._robot, self._clock = robot, clock

    @property
    def contract(self) -> RobotContract:
        return self._robot.contract

    def connect(self) -> None:
        self._robot.connect()

    def observe(self, cameras: bool = True) -> Observation:
        stamp = self._clock.now()
        return dataclasses.replace(self._robot.observe(cameras), stamp=stamp)

    def act(self, action: Float32) -> None:
        self._robot.act(action)

    def hold(self) -> None:
        self._robot.hold()

    def close(self) -> None:
        self._robot.close()
