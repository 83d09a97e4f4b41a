"""Arm protocol: the part of the runtime's Robot that calibration uses, so that it depends on no robot.

Knows a contract, observations and actions.
"""

from __future__ import annotations

from typing import Protocol

from ratchet_vla.contract import RobotContract
from ratchet_vla.records import Float32, Observation

__all__ = ["Arm"]


class Arm(Protocol):
    """A Robot of ratchet_vla.runtime fulfils this, simulated or real."""

    @property
    def contract(self) -> RobotContract:
        """What the arm's states and actions mean."""

    def observe(self, cameras: bool = True) -> Observation:
        """The newest state, with images where `cameras`."""

    def act(self, action: Float32) -> None:
        """Command one action: (D,) float32, the contract's physical units."""

    def hold(self) -> None:
        """Stay where the arm is."""
