"""How soon, and how often in a row, a policy process that died is started again.

Knows counts and seconds. Knows no process.
"""

from __future__ import annotations

FIRST_PAUSE_S = 0.5  # before the second start in a row; each pause is twice the one before
LONGEST_PAUSE_S = 8.0
STEADY_AFTER_S = 10.0  # of serving after which a process counts as sound, and its death as the first one


class Restarts:
    """Counts starts. limit: of starts in a row, none of which led to a process that served for `STEADY_AFTER_S`.

    Moments are seconds on any one clock. Not thread-safe: one thread starts processes.
    """

    def __init__(self, limit: int) -> None:
        self.total = 0
        self._limit = limit
        self._in_a_row = 0
        self._serving_since = float("inf")

    def serving(self, now: float) -> None:
        """A process has come up."""
        self._serving_since = now

    def pause(self, now: float) -> float | None:
        """The process died, or did not come up: seconds until the next one is started, None where none is any more."""
        if now - self._serving_since >= STEADY_AFTER_S:
            self._in_a_row = 0
        self._serving_since = float("inf")
        if self._in_a_row >= self._limit:
            return None
        pause_s = 0.0
        if self._in_a_row > 0:
            pause_s = min(FIRST_PAUSE_S * 2.0 ** (self._in_a_row - 1), LONGEST_PAUSE_S)
        self._in_a_row += 1
        self.total += 1
        return pause_s
