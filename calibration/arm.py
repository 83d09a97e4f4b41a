"""Arm protocol: the part of the runtime's Robot that calibration uses, so that it depends on no robot.

Knows a contract, observations and actions.
"""

from __future__ import annotations

from typing import Protocol

from agent.contract import RobotContract
from agent.records import Float32, Observation


class Arm(Protocol):
    """A Robot of agent.runtime fulfils this, simulated or real."""

    @property
    def contract(self) -> RobotContract: ...

    def observe(self, cameras: bool = True) -> Observation: ...

    def act(self, action: Float32) -> None: ...

    def hold(self) -> None: ...
