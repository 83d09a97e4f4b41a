"""Records are shared between recorder, learner and robot: one that could change under a reader would corrupt episodes.

Pinned: what was observed, chosen and executed cannot be reassigned; episodes share no list; nobody judged a new one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from ratchet_vla.records import ActionChunk, Episode, Observation, Step


def observation() -> Observation:
    return Observation({"front": np.zeros((2, 2, 3), np.uint8)}, {"hand": np.zeros(3, np.float32)}, "reach", 0.5, 3)


def chunk() -> ActionChunk:
    seen = observation()
    return ActionChunk(np.zeros((4, 3), np.float32), None, None, "id", 0.0, seen.stamp, seen.sequence)


def step() -> Step:
    return Step(observation(), chunk(), np.ones(4, bool), 0.0, False, 4)


@pytest.mark.parametrize("record", [observation(), chunk(), step()], ids=lambda r: type(r).__name__)
def test_facts_cannot_be_reassigned(record: Any) -> None:
    for field in dataclasses.fields(record):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field.name, None)


def test_episodes_share_nothing_and_start_unjudged() -> None:
    first, second = Episode("door-open", "open the door"), Episode("door-open", "open the door")
    first.steps.append(step())
    first.meta["note"] = "x"
    assert second.steps == []
    assert second.meta == {}
    assert second.success is None
    assert second.success_source == ""
    assert second.initial_state == -1, "a real robot has no initial state; 0 would be one"
