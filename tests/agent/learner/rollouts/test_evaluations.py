"""A study that looks an evaluation up under the wrong key reports another policy's success as its own.

Pinned: the key changes with all that outcomes depend on and with nothing else; a run that looks up gives the matrix of
a run that measures, for methods with and without adapters; a damaged file is refused by name, never half read.
Determinism: fixed policy and seeds, a fake simulator; what was looked up is counted by the events of the run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.metrics import Cell
from ratchet_vla.learner.methods.ewc import EWC
from ratchet_vla.learner.methods.registry import METHODS
from ratchet_vla.learner.rollouts.evaluations import KnownEvaluations, key_of
from ratchet_vla.learner.rollouts.specs import EpisodeSpec
from tests.agent.learner.runs import CONFIG, start

SPECS = [EpisodeSpec("push", "push the puck", s, 40, seed=100 + s) for s in range(3)]
HELD = len(CONFIG.tasks) + len(CONFIG.held_out)


def key(temperature: float = 0.0, specs: list[EpisodeSpec] = SPECS, **changed: str) -> str:
    facts = {"base_hash": "b", "acting": "a", "contract": "c"} | changed
    return key_of(facts["base_hash"], facts["acting"], facts["contract"], specs, temperature)


def changed(**values: Any) -> list[EpisodeSpec]:
    return [dataclasses.replace(SPECS[0], **values), *SPECS[1:]]


def test_the_key_holds_all_that_outcomes_depend_on() -> None:
    different = [
        key(),
        key(base_hash="x"),
        key(acting=""),
        key(contract="x"),
        key(specs=changed(task="reach")),
        key(specs=changed(instruction="Push the puck")),
        key(specs=changed(initial_state=7)),
        key(specs=changed(horizon=41)),
        key(specs=SPECS[:2]),
        key(1.0),
        key(1.0, specs=changed(seed=5)),
    ]
    assert len(set(different)) == len(different)
    assert key() == key(specs=changed(seed=5)), "greedy episodes do not depend on their noise"


def test_outcomes_come_back_as_they_were(tmp_path: Path) -> None:
    known = KnownEvaluations(tmp_path / "new")
    assert known.get("k") is None
    cell = Cell.of({"state-0": True, "state-1": False})
    known.put("k", cell)
    assert KnownEvaluations(tmp_path / "new").get("k") == cell
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["k.json"]


@pytest.mark.parametrize("text", ["", "{}", '{"episodes": {"state-0": 1}}', '{"episodes": []}', '{"episodes": {}}'])
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text(text)
    with pytest.raises(RatchetError) as refused:
        KnownEvaluations(tmp_path).get("k")
    assert refused.value.code == "learn.bad_evaluation"
    assert "k.json" in str(refused.value)


@pytest.mark.parametrize("name", ["seq_ft", "expansion", "full_ft"])
def test_a_run_that_looks_up_says_what_one_that_measures_says(name: str, tmp_path: Path) -> None:
    measured: list[bool] = []

    def count(kind: str, facts: dict[str, Any]) -> None:
        if kind == "evaluated":
            measured.append(facts["seconds"] > 0)

    plain = start(tmp_path / "plain", count, method=METHODS[name]())
    assert all(measured)
    known = KnownEvaluations(tmp_path / "known")
    measured.clear()
    first = start(tmp_path / "first", count, method=METHODS[name](), known=known)
    # One adapter per task leaves every other task's evaluation as it was.
    assert sum(measured) == (HELD + len(CONFIG.tasks) if name == "expansion" else HELD * (len(CONFIG.tasks) + 1))
    measured.clear()
    second = start(tmp_path / "second", count, method=METHODS[name](), known=known)
    assert not any(measured)
    assert plain.matrix.to_dict() == first.matrix.to_dict() == second.matrix.to_dict()


def test_methods_share_what_the_base_did_and_nothing_else(tmp_path: Path) -> None:
    known = KnownEvaluations(tmp_path / "known")
    looked_up: list[int] = []

    def count(kind: str, facts: dict[str, Any]) -> None:
        if kind == "evaluated" and not facts["seconds"]:
            looked_up.append(facts["stage"])

    start(tmp_path / "seq_ft", count, known=known)
    assert not looked_up
    start(tmp_path / "ewc", count, method=EWC(strength=1e9, clamp=1e9), known=known)
    # Nothing holds the first task back, so both learn it alike; the second task differs.
    assert looked_up == [0] * HELD + [1] * HELD
