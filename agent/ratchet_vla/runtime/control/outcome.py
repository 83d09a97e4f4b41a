"""How an episode ended and how well the loop kept time.

Knows words and numbers that a control loop reports. Runs nothing.
"""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np


class Termination(enum.StrEnum):
    """Why an episode ended; whether the task was solved is another question (`EpisodeEnd.success`)."""

    SUCCESS = "success"
    FAILURE = "failure"
    HORIZON = "horizon"
    CANCELLED = "cancelled"
    FAULT = "fault"
    HOLD_TIMEOUT = "hold_timeout"


@runtime_checkable
class FrameStamped(Protocol):
    """A robot that can tell how old its frames are without fetching them. Real ones can; the loop then checks it."""

    def frames_stamp(self) -> float:
        """Seconds, acquisition time of the oldest of the newest frames of all cameras."""
        ...


@dataclass
class Timing:
    """How well the loop kept time. Seconds; `jitter` is command time minus deadline, one value per tick.

    missed: periods in which no tick ran because the one before took too long; overruns: ticks that caused it.
    """

    jitter: array[float] = field(default_factory=lambda: array("d"))
    work: array[float] = field(default_factory=lambda: array("d"))
    missed: int = 0
    overruns: int = 0

    def percentiles(self) -> dict[str, float]:
        """p50, p99 and largest jitter and work per tick, in seconds."""
        out: dict[str, float] = {}
        for name in ("jitter", "work"):
            values = np.frombuffer(getattr(self, name), np.float64)
            p50, p99 = np.percentile(values, [50, 99]) if len(values) else (0.0, 0.0)
            out |= {f"{name}_p50": float(p50), f"{name}_p99": float(p99)}
            out[f"{name}_max"] = float(values.max()) if len(values) else 0.0
        return out


@dataclass(frozen=True)
class EpisodeEnd:
    """How one episode went. success, source: None and empty where nobody may say. ticks: control periods that ran.

    decisions: answers of the policy of which at least one action was sent. human_ticks: of `ticks`, those under a
    person's command.
    """

    termination: Termination
    success: bool | None
    ticks: int
    seconds: float
    events: int
    reason: str = ""
    source: str = ""
    decisions: int = 0
    human_ticks: int = 0
