"""The Robot protocol: what a control loop may ask of an arm, real or simulated.

Knows observations and physical actions. Knows no transport and no simulator.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ratchet_vla.contract import RobotContract
from ratchet_vla.records import Float32, Observation

__all__ = ["Robot"]


@runtime_checkable
class Robot(Protocol):
    """One arm described by one contract."""

    @property
    def contract(self) -> RobotContract: ...

    def connect(self) -> None:
        """Open devices and check them against the contract; raises RatchetError before any motion."""
        ...

    def observe(self, cameras: bool = True) -> Observation:
        """The newest observation; `cameras=False` leaves `images` empty (frames are expensive in simulation)."""
        ...

    def act(self, action: Float32) -> None:
        """Command one control step: (D,) float32 in the contract's physical units.

        Raises:
            RatchetError: robot.bad_action for a wrong shape or a value that is not finite; nothing is sent then.
        """
        ...

    def hold(self) -> None:
        """Stop moving and keep the pose; safe to call at any time and more than once."""
        ...

    def close(self) -> None:
        """Hold, then release devices; safe to call more than once."""
        ...
