"""An hour at an arm is wasted if none of its episodes may be learned from; every reason is told before the arm moves.

Pinned: what a goal takes from the learner's rollout request and what it is refused for, noise of its own for each
episode and shared noise only where it is asked for, the last status on the disk. Values and one file; nothing runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.noise import chunk_noise
from ratchet_vla.runtime.session.rollout_requests import Goal, LearnerStatus, read, requested, write

ADAPTER = "a" * 64
REQUEST: dict[str, Any] = {
    "id": "run/1", "task": "door-open", "instruction": "open the door", "adapter": ADAPTER, "temperature": 1.6,
    "noise_correlation": 0.9, "stage": 0, "update": 0, "groups": 24, "group_size": 1, "horizon": 200, "seed": 7,
    "slots": 0, "have": 3,
}  # fmt: skip


def status_in(folder: Path, phase: str = "collecting", **changes: Any) -> LearnerStatus:
    request = None if phase != "collecting" else {**REQUEST, **changes}
    write(folder, {"run": "r", "phase": phase, "mode": "robot", "tags": {}, "order": request, "adapters": [ADAPTER]})
    return read(folder)


def goal(status: LearnerStatus, **asked: Any) -> Goal:
    return requested(status, **{"active": ADAPTER, "episode": "s-0001", **asked})


def test_a_goal_takes_everything_from_the_request(tmp_path: Path) -> None:
    made = goal(status_in(tmp_path))
    assert (made.task, made.instruction, made.horizon) == ("door-open", "open the door", 200)
    assert (made.temperature, made.adapter, made.request_id) == (1.6, ADAPTER, "run/1")
    assert (
        goal(status_in(tmp_path), task="door-open", instruction="open the door", temperature=1.6, horizon=50).horizon
        == 50
    )
    request = read(tmp_path).request
    assert request is not None
    assert (request.wanted, request.have) == (24, 3)


def test_every_episode_has_noise_of_its_own_unless_a_seed_is_asked_for(tmp_path: Path) -> None:
    status = status_in(tmp_path)
    names = [f"{session}-{n:04d}" for session in ("s", "t") for n in range(12)]
    seeds = [goal(status, episode=name).seed for name in names]
    assert len(set(seeds)) == len(names)
    assert seeds == [goal(status, episode=name).seed for name in names]
    assert goal(status_in(tmp_path, seed=8), episode="s-0000").seed != seeds[0]
    assert {goal(status, episode=name, seed=5).seed for name in names} == {5}


def test_the_noise_is_correlated_as_requested(tmp_path: Path) -> None:
    made = goal(status_in(tmp_path))
    assert made.noise is not None
    drawn = made.noise(np.random.Generator(np.random.Philox(key=1)), (8, 4))
    np.testing.assert_array_equal(drawn, chunk_noise(np.random.Generator(np.random.Philox(key=1)), (8, 4), 0.9))
    assert goal(status_in(tmp_path, noise_correlation=0.0)).noise is None


@pytest.mark.parametrize(
    ("asked", "changes", "code"),
    [
        ({"task": "push"}, {}, "other_task"),
        ({"instruction": "open it"}, {}, "other_instruction"),
        ({"temperature": 0.0}, {}, "greedy"),
        ({"temperature": 1.0}, {}, "other_temperature"),
        ({"active": "b" * 64}, {}, "other_adapter"),
        ({}, {"slots": 24}, "exact"),
        ({}, {"phase": "waiting"}, "none"),
    ],
)
def test_what_could_not_be_learned_from_is_refused(
    asked: dict[str, Any], changes: dict[str, Any], code: str, tmp_path: Path
) -> None:
    with pytest.raises(RatchetError) as caught:
        goal(status_in(tmp_path, **changes), **asked)
    assert caught.value.code == f"order.{code}"
    assert caught.value.fix


@pytest.mark.parametrize("text", [None, "", "[]", "{"])
def test_without_a_status_of_the_learner_nothing_is_collected(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "learner.json").write_text(text)
    with pytest.raises(RatchetError, match=r"order\.no_word"):
        read(tmp_path)
