"""Two dtypes side by side: seconds per unit of work over repeats, their ratio, and what the device chose to compute in.

Knows repeats, spread and the machine's name; the work is a function that is given. A dtype that the device emulates may
be twenty times slower: then it does a share of the work per repeat, and its row says how much that was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from ratchet_vla.policy import computing

REPEATS = 5
DECLARED = "bfloat16"  # by every built-in checkpoint
EMULATED = 3.0  # times as slow as the other dtype, from where a side does a share of the work only


@dataclass
class Side:
    """What one dtype took. seconds: per unit of work (a chunk, a sample), one figure per repeat; units: in each."""

    seconds: list[float] = field(default_factory=list)
    units: int = 0

    @property
    def p50(self) -> float:
        return median(self.seconds)

    @property
    def milliseconds(self) -> str:
        """Median (least to most), for tables."""
        least, most = 1e3 * min(self.seconds), 1e3 * max(self.seconds)
        return f"{1e3 * self.p50:.1f} ({least:.1f} to {most:.1f})"

    def as_dict(self) -> dict[str, Any]:
        spread = {"min": min(self.seconds), "p50": self.p50, "max": max(self.seconds)}
        return {"repeats": len(self.seconds), "units_per_repeat": self.units, "seconds_per_unit": spread}


@dataclass(frozen=True)
class Verdict:
    """The device's choice beside the other dtype."""

    choice: computing.Choice
    other: str
    sides: Mapping[str, Side]

    @property
    def ratio(self) -> float:
        """How many times as fast the choice is, by medians."""
        return self.sides[self.other].p50 / self.sides[self.choice.name].p50

    @property
    def slower(self) -> bool:
        """Whether the choice was slower beyond the spread: its fastest repeat took longer than the other's slowest."""
        return min(self.sides[self.choice.name].seconds) > max(self.sides[self.other].seconds)

    @property
    def figure(self) -> str:
        """For the line that ends a benchmark."""
        return (
            f"{self.choice.name}, this device's choice, {self.ratio:.2f} times as fast as {self.other} "
            "(goal: not slower beyond the spread)"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "choice": self.choice.name,
            "reason": self.choice.reason,
            "ratio": self.ratio,
            "slower_beyond_the_spread": self.slower,
            "sides": {name: side.as_dict() for name, side in self.sides.items()},
        }


def pair() -> tuple[computing.Choice, str]:
    """What this device chooses for the built-in checkpoints, whatever the environment asks for; the dtype beside it."""
    choice = computing.choose(torch.device("cpu"), DECLARED, "auto")
    return choice, "float32" if choice.name != "float32" else DECLARED


def in_turn(
    works: Mapping[str, Callable[[bool], int]], repeats: int = REPEATS, budget: float = 60.0
) -> dict[str, Side]:
    """Seconds per unit of every side, repeats of all sides in turn, so that they share the host's load.

    Args:
        works: by dtype: does a repeat's work, or a small share of it where it gets True; returns its units.
        budget: seconds that an emulated side may take; it has two repeats at least.
    """
    share = {}
    for name, work in works.items():
        work(True)  # after this nothing is read, allocated or made for the first time
        began = time.perf_counter()
        units = work(True)
        share[name] = time.perf_counter() - began, units
    fastest = min(seconds / units for seconds, units in share.values())
    emulated = {name: seconds / units > EMULATED * fastest for name, (seconds, units) in share.items()}
    sides = {name: Side() for name in works}
    for i in range(repeats):
        for name, work in works.items():
            if emulated[name] and i >= max(2, int(budget / share[name][0])):
                continue
            began = time.perf_counter()
            sides[name].units = work(emulated[name])
            sides[name].seconds.append((time.perf_counter() - began) / sides[name].units)
    return sides
