"""How long something will take on this machine: said before it begins, and kept up to date while it runs.

Knows a measurement of two seconds, and how long the same work took on the machine that it is compared with. It is an
estimate: other programs that use the cores make everything slower.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np

from ratchet_vla.policy import computing, device

SECONDS = 0.7  # per measurement
# What the reference minutes of recipes and tests were measured on: AMD EPYC 7003 without bfloat16, 2 cores.
REFERENCE_PRODUCTS, REFERENCE_STEPS, REFERENCE_CORES = 80.0, 170.0, 2


@dataclass(frozen=True)
class Speed:
    """Of one machine. products: GFLOP/s of a small policy in the dtype that is chosen here, forward and backward.

    steps: thousands of small numpy operations a second, as the Python around a simulator makes them. cores: that may be
    used. dtype: chosen.
    """

    products: float
    steps: float
    cores: int
    dtype: str

    @property
    def factor(self) -> float:
        """How many times longer than on the reference machine; a policy's work and a simulator's count alike."""
        slower = 0.5 * REFERENCE_PRODUCTS / self.products + 0.5 * REFERENCE_STEPS / self.steps
        return slower * (1.0 if self.cores >= REFERENCE_CORES else 1.7)  # recipes for two cores leave others idle

    def told(self) -> str:
        return f"{computing.processor()}, {self.cores} cores, {self.dtype} {self.products:.0f} GFLOP/s"


def measure() -> Speed:
    """Two seconds of work like the policies' and the simulators'."""
    where = device.choose()
    choice = computing.choose(where, "bfloat16")
    products = computing.speed(where, choice.dtype, SECONDS)
    count, end = 0, time.perf_counter() + SECONDS
    x = np.linspace(0.0, 1.0, 64)
    while time.perf_counter() < end:
        for _ in range(100):
            x = np.clip(x * 1.0001 + 0.001, 0.0, 1.0)
        count += 100
    return Speed(products, count / SECONDS / 1e3, len(os.sched_getaffinity(0)), choice.name)


def minutes(seconds: float) -> str:
    """A duration as one says it: "40 s", "6 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


class Remaining:
    """Time left of work whose parts are weighed; starts from an estimate and trusts what it sees more and more.

    total: weight of all parts. expected: seconds that all of it should take.
    """

    def __init__(self, total: float, expected: float) -> None:
        self.total, self.expected, self.done = max(total, 1e-9), expected, 0.0
        self._began = time.monotonic()

    def advance(self, weight: float) -> None:
        """Parts of this weight are over."""
        self.done = min(self.total, self.done + weight)

    def seconds(self, elapsed: float | None = None) -> float:
        """Left. elapsed: seconds since the beginning; by the clock if absent."""
        used = time.monotonic() - self._began if elapsed is None else elapsed
        share = self.done / self.total
        # The pace so far says little at first: the estimate counts as a tenth of the work does.
        pace = (used + 0.1 * self.expected) / (share + 0.1)
        return (1 - share) * pace
