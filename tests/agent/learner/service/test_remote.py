"""Robot and learner as processes that are really killed: the end is that of a run nobody disturbed.

Pinned: kill -9 at every phase of both (receiving, writing, rollout, update, checkpoint, evaluation, promotion,
delivery), torn files, a full disk, a jumping clock, network faults and foreign episodes; equal adapter ids, batches and
verdicts; nothing lost, doubled or off-policy. Deterministic: faults strike at counted steps from a seed; the test waits
for processes to end, never for a time. `benchmarks/learner/faults.py` does the same five hundred times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.learner import faults
from benchmarks.learner.small_world import World


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made: dict[str, Any] = {}
    World(tmp_path_factory.mktemp("parts"), parts=made)
    return made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, parts: dict[str, Any]) -> dict[str, Any]:
    result = faults.run(tmp_path_factory.mktemp("undisturbed"), parts, None)
    assert not result["stuck"]
    assert len(result["summary"]["adapters"]) == 4
    assert result["summary"]["finished"] == [("door-open", True), ("faucet-open", True)]
    return result


@pytest.mark.parametrize("seed", [0, 104])
def test_faults_change_nothing_but_time(
    tmp_path: Path, parts: dict[str, Any], undisturbed: dict[str, Any], seed: int
) -> None:
    result = faults.run(tmp_path, parts, seed)
    assert not result["stuck"], result["struck"]
    assert len(result["struck"]) >= 10
    assert result["summary"] == undisturbed["summary"]
    assert (result["lost"], result["doubled"], result["off_policy"]) == (0, 0, 0)
    assert not any(e.endswith("exit 4") for e in result["exits"]), (tmp_path / "learner.log").read_text()
