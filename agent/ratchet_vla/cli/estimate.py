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
REFERENCE_PRODUCTS = 80.0  # GFLOP/s
REFERENCE_STEPS = 170.0  # thousands a second
REFERENCE_CORES = 2
ONE_CORE = 1.7  # times as long with one core as with two: recipes for two cores leave others idle


@dataclass(frozen=True)
class Speed:
    """How fast one machine is.

    Attributes:
        products: GFLOP/s of a small policy in the dtype that is chosen here, forward and backward.
        steps: Thousands of small numpy operations a second, as the Python around a simulator makes them.
        cores: Cores that may be used.
        dtype: Name of the dtype that policies compute in here.
    """

    products: float
    steps: float
    cores: int
    dtype: str

    @property
    def factor(self) -> float:
        """How many times longer than on the reference machine; a policy's work and a simulator's count alike."""
        slower = 0.5 * REFERENCE_PRODUCTS / self.products + 0.5 * REFERENCE_STEPS / self.steps
        return slower if self.cores >= REFERENCE_CORES else slower * ONE_CORE

    def sentence(self) -> str:
        """Describe the machine in words."""
        return f"{computing.processor()}, {self.cores} cores, {self.dtype} {self.products:.0f} GFLOP/s"


def measure() -> Speed:
    """Measure with two seconds of work like the policies' and the simulators'."""
    processor = device.choose()
    choice = computing.choose(processor, "bfloat16")
    products = computing.speed(processor, choice.dtype, SECONDS)
    operations = 0
    values = np.linspace(0.0, 1.0, 64)  # so few that Python's overhead counts, as around a simulator
    end_s = time.perf_counter() + SECONDS
    while time.perf_counter() < end_s:
        for _ in range(100):
            values = np.clip(values * 1.0001 + 0.001, 0.0, 1.0)
        operations += 100
    return Speed(products, operations / SECONDS / 1e3, len(os.sched_getaffinity(0)), choice.name)


def minutes(seconds: float) -> str:
    """Word a duration: "40 s", "6 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


class Remaining:
    """Time left of work whose parts are weighed; starts from an estimate and trusts what it measures more and more.

    Args:
        total: Weight of all parts.
        expected: Seconds that all of it should take.
    """

    def __init__(self, total: float, expected: float) -> None:
        self.total = max(total, 1e-9)  # a run of no parts is over, not an error
        self.expected = expected
        self.done = 0.0
        self._started_s = time.monotonic()

    def advance(self, weight: float) -> None:
        """Count parts of this weight as done."""
        self.done = min(self.total, self.done + weight)

    def seconds(self, elapsed: float | None = None) -> float:
        """Estimate the seconds that are left.

        Args:
            elapsed: Seconds since the beginning; by the clock if absent.
        """
        elapsed_s = time.monotonic() - self._started_s if elapsed is None else elapsed
        share = self.done / self.total
        # The pace so far says little at first: the estimate counts as a tenth of the work does.
        pace = (elapsed_s + 0.1 * self.expected) / (share + 0.1)
        return (1 - share) * pace
