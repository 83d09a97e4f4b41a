"""Clocks that a control loop can run on: the machine's, a simulation's, and one that moves only when it is told to.

Knows seconds. One clock stamps observations and commands; which one is chosen once, when a loop is built.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol, runtime_checkable

__all__ = ["Clock", "ExternalClock", "ManualClock", "MonotonicClock"]


@runtime_checkable
class Clock(Protocol):
    """Seconds that never go backward, and waiting for a moment."""

    def now(self) -> float: ...

    def sleep_until(self, moment: float) -> bool:
        """Wait until `moment`; True once it is reached, False where the clock stands still and waiting was given up."""
        ...


class MonotonicClock:
    """CLOCK_MONOTONIC: the clock of a real robot. Also what `time.monotonic` and ROS's steady time show."""

    def now(self) -> float:
        return time.monotonic()

    def sleep_until(self, moment: float) -> bool:
        while (left := moment - time.monotonic()) > 0.0:
            time.sleep(left)
        return True


class ManualClock:
    """Time that a test or a lock-step run moves: sleeping until a moment makes it that moment."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def sleep_until(self, moment: float) -> bool:
        self._now = max(self._now, moment)
        return True

    def advance(self, seconds: float) -> None:
        self._now += seconds


class ExternalClock:
    """Time told by somebody else, such as a simulator's /clock. `update` from any thread.

    stall_timeout: real seconds without an update after which waiting is given up. From then on, until the next update,
        a wait takes no longer than it would on a running clock, so that a stop goes on at its rate.
    """

    def __init__(self, stall_timeout: float = 0.2) -> None:
        self._stall, self._stalled = stall_timeout, False
        self._now = 0.0
        self._changed = threading.Condition()

    def now(self) -> float:
        return self._now

    def update(self, now: float) -> None:
        """Told time. A step back is passed on: the safety filter treats it as a fault."""
        with self._changed:
            self._now, self._stalled = now, False
            self._changed.notify_all()

    def sleep_until(self, moment: float) -> bool:
        with self._changed:
            while self._now < moment:
                patience = min(self._stall, moment - self._now) if self._stalled else self._stall
                if not self._changed.wait(patience):
                    self._stalled = True
                    return False
        return True
