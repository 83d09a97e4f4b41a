"""The study's table is what people quote: a wrong mean or a seed counted twice would be quoted too.

Pinned: measures and intervals over seeds against values computed by hand, what an unmeasured cell does, the files
that a reader gets. Determinism: made-up matrices.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from benchmarks.science.study import packed, stored, unpacked
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.intervals import Interval
from ratchet_vla.learner.measures.metrics import Cell, SuccessMatrix
from ratchet_vla.learner.study.page import learning_curves, losses, write_study
from ratchet_vla.learner.study.results import (
    MEASURES,
    Trial,
    as_dict,
    forgetting,
    load_trial,
    markdown,
    over_seeds,
    plasticity,
    summarise,
)

RESULTS = Path(__file__).resolve().parents[4] / "benchmarks" / "results"


def matrix(rates: list[list[int]], trials: int = 10) -> SuccessMatrix:
    """rates[stage][task] successes of `trials`; the last column is held out."""
    made = SuccessMatrix(("a", "b"), ("c",))
    for stage, row in enumerate(rates):
        for task, successes in zip(made.columns, row, strict=True):
            made.record(stage, task, Cell(successes, trials))
    return made


FIRST = [[4, 2, 1], [8, 3, 2], [7, 9, 2]]
SECOND = [[4, 2, 1], [9, 2, 1], [9, 8, 4]]


def trials() -> list[Trial]:
    return [Trial("seq_ft", 0, matrix(FIRST), 3600.0, 100), Trial("seq_ft", 1, matrix(SECOND), 1800.0, 120)]


def test_measures_over_seeds_by_hand() -> None:
    (summary,) = summarise(trials())
    assert summary.seeds == (0, 1)
    assert summary.hours == pytest.approx(1.5)
    assert summary.episodes == 220
    expected = {
        "AVG": [(0.7 + 0.9) / 2, (0.9 + 0.8) / 2],
        "NBT": [0.8 - 0.7, 0.9 - 0.9],
        "FWT": [0.3 - 0.2, 0.2 - 0.2],
        "ZS": [0.2, 0.4],
        "plasticity": [((0.8 - 0.4) + (0.9 - 0.3)) / 2, ((0.9 - 0.4) + (0.8 - 0.2)) / 2],
    }
    for name, values in expected.items():
        found = summary.values[name]
        assert found is not None
        mean = sum(values) / 2
        half = stats.t.ppf(0.975, 1) * abs(values[0] - values[1]) / math.sqrt(2) / math.sqrt(2)
        assert found.estimate == pytest.approx(mean), name
        assert found.high == pytest.approx(min(mean + half, 1.0)), name
        assert found.low == pytest.approx(max(mean - half, 0.0 if name in ("AVG", "ZS") else -1.0)), name


def test_one_seed_keeps_the_evaluations_interval() -> None:
    one = plasticity(matrix(FIRST))
    assert one is not None
    assert over_seeds([one]) == one
    wild = [Interval(r, r, r, "") for r in (0.1, 0.9)]
    assert (over_seeds(wild, 0.0).low, over_seeds(wild).high) == (0.0, 1.0)  # a rate stays a rate
    with pytest.raises(RatchetError):
        over_seeds([])


def test_what_was_not_measured_is_not_invented() -> None:
    partial = SuccessMatrix(("a", "b"))
    partial.record(0, "a", Cell(1, 2))
    (summary,) = summarise([Trial("ewc", 0, partial, 1.0, 1)])
    assert all(v is None for v in summary.values.values())
    assert as_dict([Trial("ewc", 0, partial, 1.0, 1)], {})["methods"]["ewc"]["AVG"] is None


def test_points_in_the_json() -> None:
    methods = as_dict(trials(), {"command": "x"})["methods"]
    assert methods["seq_ft"]["AVG"]["points"] == pytest.approx(82.5)
    assert methods["seq_ft"]["matrices"]["1"]["tasks"] == ["a", "b"]


def test_forgetting_starts_where_a_task_was_learned() -> None:
    assert forgetting(matrix(FIRST), "a") == [(0, 0.8), (1, 0.7)]
    assert forgetting(matrix(FIRST), "b") == [(0, 0.9)]


def test_what_is_lost_is_counted_from_where_each_task_stood() -> None:
    """Success itself would fall from 0.85 to 0.7 here, for the second task is never old."""
    assert losses(trials()) == [(0, 0.0), (1, pytest.approx(-5.0))]
    kept = matrix([[4, 2, 1], [3, 2, 1], [3, 9, 1]])
    assert losses([Trial("expansion", 0, kept, 1.0, 1)]) == [(0, 0.0), (1, 0.0)]


def test_curves_of_trials_that_end_their_tasks_early() -> None:
    def updates(*lengths: int) -> tuple[dict[str, int], ...]:
        return tuple(
            {"stage": stage, "update": i, "successes": 3, "episodes": 4}
            for stage, length in enumerate(lengths, 1)
            for i in range(length)
        )

    ragged = [Trial("seq_ft", s, matrix(FIRST), 1.0, 1, updates(*n)) for s, n in enumerate([(3, 1), (1, 2)])]
    assert learning_curves(ragged).startswith(b"\x89PNG")
    assert learning_curves(trials()) == b"", "nothing to draw without episodes"


def test_the_page_and_the_table_hold_every_method(tmp_path: Path) -> None:
    both = [*trials(), Trial("ewc", 0, matrix(SECOND), 60.0, 10)]
    page = write_study(both, {"title": "A study", "command": "ratchet study"}, tmp_path / "study.html").read_text()
    for text in ("A study", "seq_ft", "ewc", "82.5", "data:image/png;base64"):
        assert text in page
    assert "<script" not in page
    assert len(markdown(both).splitlines()) == 4


def test_an_unfinished_trial_is_not_a_trial(tmp_path: Path) -> None:
    assert load_trial("ewc", 0, tmp_path) is None
    matrix(FIRST).save(tmp_path / "matrix.json")
    (tmp_path / "run.json").write_text('{"seconds": 3}')
    assert load_trial("ewc", 0, tmp_path) is None
    (tmp_path / "run.json").write_text('{"seconds": 3, "finished": "now"}')
    (tmp_path / "updates.jsonl").write_text('{"episodes": 5}\n{"episodes": 7}\n')
    trial = load_trial("ewc", 0, tmp_path)
    assert trial is not None
    assert trial.episodes == 12


@pytest.mark.parametrize("path", sorted(RESULTS.glob("study_*.json")), ids=lambda p: p.stem)
def test_committed_figures_follow_from_their_episodes(path: Path) -> None:
    written = json.loads(path.read_text())
    found = as_dict(stored(path), {})["methods"]
    assert found.keys() == written["methods"].keys()
    for method, row in found.items():
        for name in (*MEASURES, "seeds", "episodes"):
            assert row[name] == written["methods"][method][name], (method, name)


def test_outcomes_survive_packing() -> None:
    whole = matrix(FIRST)
    for stage, task in list(whole.cells):
        marks = {f"state-{i}": i % (stage + 2) == 0 for i in range(12)}  # more than nine: names sort otherwise
        whole.cells[(stage, task)] = Cell.of(marks)
    del whole.cells[(1, whole.held_out[0])]  # what was not measured stays so
    assert unpacked(packed(whole)) == whole
