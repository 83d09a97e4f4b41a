"""The success matrix is the project's result; a swapped index turns forgetting into progress without any error.

Pinned: AVG, NBT, FWT and ZS by hand on an asymmetric matrix, pairing only where episodes are the same, coverage of the
measures' intervals by simulation, what is said where cells are missing, and the file format. Determinism: fixed seeds.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.intervals import mean, unpaired_difference, wilson
from ratchet_vla.learner.measures.metrics import Cell, Measures, SuccessMatrix, difference, measures

RATES = {  # every entry differs, so that no two wrong indices give the right measure
    "pick": [10, 80, 74, 71],
    "push": [20, 23, 90, 85],
    "open": [30, 34, 37, 95],
    "unseen": [50, 52, 51, 57],
    "other": [40, 39, 45, 44],
}


def matrix_of_counts() -> SuccessMatrix:
    matrix = SuccessMatrix(("pick", "push", "open"), ("unseen", "other"))
    for task, column in RATES.items():
        for stage, successes in enumerate(column):
            matrix.record(stage, task, Cell(successes, 100))
    return matrix


def estimates(result: Measures) -> list[float]:
    values = [result.avg, result.nbt, result.fwt, result.zs]
    assert all(v is not None for v in values)
    return [v.estimate for v in values if v is not None]


def test_measures_by_hand() -> None:
    result = measures(matrix_of_counts())
    assert estimates(result) == pytest.approx(
        [
            (0.71 + 0.85 + 0.95) / 3,  # last row, trained tasks
            ((0.80 - 0.71) + (0.90 - 0.85)) / 2,  # what pick and push lost since they were learned
            ((0.23 - 0.20) + (0.37 - 0.30)) / 2,  # what push and open gained before they were trained
            (0.57 + 0.44) / 2,
        ]
    )
    assert not result.missing


def test_measures_after_an_earlier_stage_count_only_what_was_learned() -> None:
    result = measures(matrix_of_counts(), after=2)
    assert estimates(result) == pytest.approx([(0.74 + 0.90) / 2, 0.80 - 0.74, 0.23 - 0.20, (0.51 + 0.45) / 2])


def test_intervals_are_those_documented() -> None:
    result = measures(matrix_of_counts())
    assert result.avg == mean([wilson(71, 100), wilson(85, 100), wilson(95, 100)])
    assert result.nbt == mean([unpaired_difference(80, 100, 71, 100), unpaired_difference(90, 100, 85, 100)])


def test_improvement_of_an_older_task_is_a_negative_nbt() -> None:
    matrix = SuccessMatrix(("a", "b"))
    for stage, task, k in ((0, "a", 2), (0, "b", 2), (1, "a", 5), (1, "b", 3), (2, "a", 8), (2, "b", 9)):
        matrix.record(stage, task, Cell(k, 10))
    nbt = measures(matrix).nbt
    assert nbt is not None
    assert nbt.estimate == pytest.approx(-0.3)


def test_pairs_are_used_only_for_the_same_episodes() -> None:
    first = Cell.of({f"state-{i}/seed-0": i < 30 for i in range(40)})
    second = Cell.of({f"state-{i}/seed-0": i < 26 for i in range(40)})
    elsewhere = Cell.of({f"state-{i}/seed-1": i < 26 for i in range(40)})
    paired, unpaired = difference(first, second), difference(first, elsewhere)
    assert (paired.method, unpaired.method) == ("Newcombe, paired", "Newcombe, unpaired")
    assert paired.estimate == unpaired.estimate == pytest.approx(0.1)
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)


def test_what_is_missing_is_said() -> None:
    matrix = SuccessMatrix(("a", "b"))
    matrix.record(2, "a", Cell(3, 10))
    result = measures(matrix)
    assert result.avg is None
    assert "stage 2 on b" in result.missing["avg"]
    assert "stage 1 on a" in result.missing["nbt"]
    assert result.missing["zs"] == "no held-out tasks"
    alone = SuccessMatrix(("a",))
    alone.record(1, "a", Cell(5, 10))
    result = measures(alone)
    assert result.avg == wilson(5, 10)
    assert result.nbt is None
    assert result.fwt is None
    assert json.loads(json.dumps(result.as_dict()))["avg"]["estimate"] == 0.5


def test_file_round_trip(tmp_path: Path) -> None:
    matrix = matrix_of_counts()
    fresh = SuccessMatrix(("pick",), ("unseen",))
    fresh.record(1, "pick", Cell.of({"state-0/seed-0": True, "state-1/seed-0": False}))
    for one in (matrix, fresh):
        one.save(tmp_path / "matrix.json")
        assert SuccessMatrix.load(tmp_path / "matrix.json") == one
    assert [p.name for p in tmp_path.iterdir()] == ["matrix.json"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 1, "tasks": ["a"], "held_out": [], "cells": [{"stage": 0}]}', '{"schema": 2}'],
)
def test_bad_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "matrix.json").write_text(text)
    with pytest.raises(RatchetError) as caught:
        SuccessMatrix.load(tmp_path / "matrix.json")
    assert caught.value.code == "metrics.bad_file"


def test_results_are_never_overwritten() -> None:
    matrix = SuccessMatrix(("a",))
    matrix.record(0, "a", Cell(1, 2))
    matrix.record(0, "a", Cell(1, 2))
    with pytest.raises(RatchetError) as caught:
        matrix.record(0, "a", Cell(2, 2))
    assert caught.value.code == "metrics.already_measured"
    assert matrix.cells[(0, "a")].successes == 1


def test_refusals_name_their_reason() -> None:
    for code, call in (
        ("metrics.unknown_cell", lambda: SuccessMatrix(("a",)).record(2, "a", Cell(1, 2))),
        ("metrics.unknown_cell", lambda: SuccessMatrix(("a",)).get(0, "b")),
        ("metrics.unknown_cell", lambda: measures(SuccessMatrix(("a",)), after=0)),
        ("metrics.bad_tasks", lambda: SuccessMatrix(("a", "a"))),
        ("metrics.bad_tasks", lambda: SuccessMatrix((), ("a",))),
        ("metrics.bad_counts", lambda: Cell(3, 2)),
        ("metrics.bad_counts", lambda: Cell(2, 2, {"x": True, "y": False})),
    ):
        with pytest.raises(RatchetError) as caught:
            call()
        assert caught.value.code == code


def test_intervals_of_the_measures_cover_the_truth() -> None:
    """Simulated evaluations whose episodes share initial-state difficulty between stages, so that pairing matters."""
    rng = np.random.default_rng(0)
    truth = np.array([[0.3, 0.4, 0.5], [0.8, 0.45, 0.5], [0.75, 0.85, 0.6], [0.7, 0.8, 0.95]])
    want = {
        "avg": truth[3].mean(),
        "nbt": ((truth[1, 0] - truth[3, 0]) + (truth[2, 1] - truth[3, 1])) / 2,
        "fwt": ((truth[1, 1] - truth[0, 1]) + (truth[2, 2] - truth[0, 2])) / 2,
    }
    hits = dict.fromkeys(want, 0)
    runs, episodes = 1000, 50
    keys = [f"state-{i}" for i in range(episodes)]
    for _ in range(runs):
        matrix = SuccessMatrix(("a", "b", "c"))
        for j, task in enumerate(matrix.tasks):
            shared = rng.random(episodes)
            for stage in matrix.stages:
                own = rng.random(episodes)
                draw = np.where(rng.random(episodes) < 0.6, shared, own) < truth[stage, j]
                matrix.record(stage, task, Cell.of(dict(zip(keys, map(bool, draw), strict=True))))
        result = measures(matrix)
        for name, value in want.items():
            interval = getattr(result, name)
            hits[name] += interval.low <= value <= interval.high
    for name, count in hits.items():
        assert 0.93 <= count / runs <= 0.99, (name, count / runs)
