"""What an update costs by default, verb by verb, in one table: where two differ, they differ here.

Knows numbers. What each setting means stands where it is an option.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Budget:
    """Updates per task; initial states per update and episodes from each; how they are sampled.

    temperature: > 0. noise_correlation: in [0, 1), within a chunk. batch_when: of a robot's batch.
    """

    updates: int
    groups: int
    group_size: int
    temperature: float
    noise_correlation: float
    batch_when: Literal["full", "session"] = "full"


PAPER = Budget(updates=10, groups=128, group_size=8, temperature=1.6, noise_correlation=0.0)
"""The published recipe, for a 7B policy (arXiv 2603.11653); a configuration without a verb."""
LEARN = dataclasses.replace(PAPER, groups=64, temperature=1.0)
"""`ratchet learn`: two cores, small policies."""
STUDY = Budget(updates=12, groups=32, group_size=8, temperature=1.0, noise_correlation=0.9)
"""`ratchet study run`: many trials, each small."""
SERVICE = dataclasses.replace(PAPER, groups=32, temperature=1.0)
"""`ratchet learner`: every episode crosses a link."""
