"""How much time a command may reckon with, from the clock readings of whoever commands.

Knows seconds and periods. Knows no command.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SLACK = 0.25  # of a period: how much earlier than due a command may come (jitter of a fixed-rate loop)
GAP = 2.0  # periods without a command after which the arm counts as standing
STUCK_TICKS = 3  # readings of one and the same instant after which the clock counts as stopped


@dataclass(frozen=True)
class Pace:
    """dt: seconds to reckon with, 0..period. gap: seconds since the last command where that was too long, else 0.

    problem: what is wrong with the clock; empty where nothing is. stands: that it stands still.
    """

    dt: float
    gap: float = 0.0
    problem: str = ""
    stands: bool = False


class Pacer:
    """Real time since the last command, never more than one period.

    A fixed-rate loop jitters: a command may come up to SLACK periods early and is reckoned as on time, but the debt is
    kept, so that a burst of commands gets no more motion than the time it took (plus SLACK once).
    """

    def __init__(self, period: float) -> None:
        self.period = period
        self.now = self._effective = -math.inf
        self._stuck = 0

    @property
    def allowed_gap(self) -> float:
        return GAP * self.period

    def start(self, now: float) -> None:
        """The first command may come at once."""
        self.now = self._effective = now - self.period
        self._stuck = 0

    def step(self, now: float) -> Pace:
        """Reckon with a command at `now`."""
        if not math.isfinite(now) or now < self.now - 1e-9:
            return Pace(0.0, problem=f"the clock went from {self.now:.6f} to {now:.6f} s")
        self._stuck = self._stuck + 1 if now == self.now else 0
        if self._stuck >= STUCK_TICKS:
            return Pace(0.0, problem=f"the clock stands still at {now:.6f} s", stands=True)
        passed, self.now = now - self.now, now
        due = self._effective + self.period
        effective = now if now >= due else min(due, now + SLACK * self.period)
        dt = min(effective - self._effective, self.period) if math.isfinite(self._effective) else self.period
        self._effective = max(effective, self._effective)
        dt = self.period if abs(dt - self.period) < 1e-9 else max(dt, 0.0)
        return Pace(dt, passed if self.allowed_gap < passed < math.inf else 0.0)
