"""A study is the evidence on which somebody chooses a method: its table must come from what was really trained.

Pinned: a small grid runs to its table; evaluated again from what it stored (one adapter for all tasks, one per task, a
whole model) it gives its own success matrices episode by episode; changed worlds are new evidence in a folder of their
own; nothing finished is run twice, nothing is mixed with other settings or another base.
Determinism: seeds, fixed initial states, one thread, equal numbers of simulators.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from ratchet_vla.cli.main import main
from ratchet_vla.cli.study.folder import claim
from ratchet_vla.learner.measures.metrics import SuccessMatrix

ROOT = Path(__file__).resolve().parents[4]
ROWS = ("seq_ft", "expansion", "full_ft")
SIMULATORS = ["--workers", "2", "--slots", "4"]
RUN = [
    *["study", "run", "--tasks", "handle-press", "button-press", "--held-out", "faucet-open", "--methods", *ROWS],
    *["--updates", "1", "--groups", "3", "--group-size", "4", "--evaluation-episodes", "6", *SIMULATORS],
    # so that one update is seen
    *["--update.warmup-steps", "0", "--update.learning-rate", "3e-2", "--full-learning-rate", "2e-3"],
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    assert main([*RUN, "--out", str(out)]) == 0
    return out


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["study", "evaluate", *arguments, *SIMULATORS, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def matrix(folder: Path, row: str) -> SuccessMatrix:
    return SuccessMatrix.load(folder / row / "seed0" / "matrix.json")


def test_a_study_ends_in_a_table_of_all_methods(study: Path) -> None:
    result = json.loads((study / "study.json").read_text())
    assert [*result["methods"]] == ["seq_ft", "expansion", "full_ft"]
    assert all(result["methods"][row]["AVG"]["low"] <= result["methods"][row]["AVG"]["points"] for row in ROWS)
    assert result["evaluation_temperature"] == 0
    bases = [[matrix(study, row).get(0, t) for t in matrix(study, row).columns] for row in ROWS]
    assert bases[0] == bases[1] == bases[2]
    assert any(cell and cell.successes for cell in bases[0])


def test_stored_adapters_give_the_studys_own_matrix(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, str(study), "--stages", "all", "--out", str(tmp_path))
    for row in ("seq_ft", "expansion"):
        assert matrix(tmp_path, row) == matrix(study, row)
    again, first = matrix(tmp_path, "full_ft"), matrix(study, "full_ft")
    for stage in (0, 2):  # weights in between are not kept
        assert [again.get(stage, t) for t in again.columns] == [first.get(stage, t) for t in first.columns]
    for row in ROWS:  # not by chance: what is compared are different policies
        found = matrix(study, row)
        assert any(found.get(0, t) != found.get(2, t) for t in found.columns), row


def test_changed_worlds_are_held_out_and_nothing_finished_runs_twice(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(study), "--methods", "seq_ft", "--perturb", "base", "--episodes", "4", "--out", str(tmp_path)]
    result = run(capsys, *arguments)
    found = matrix(tmp_path, "seq_ft")
    assert found.held_out == ("handle-press@base", "button-press@base")
    assert {stage for stage, _ in found.cells} == {0, 2}
    assert result["methods"]["seq_ft"]["ZS"] is not None
    assert result["methods"]["seq_ft"]["NBT"] is None  # of stages that nobody evaluated
    written = (tmp_path / "seq_ft" / "seed0" / "run.json").stat().st_mtime_ns
    run(capsys, *arguments)
    assert (tmp_path / "seq_ft" / "seed0" / "run.json").stat().st_mtime_ns == written
    assert main(["study", "evaluate", *arguments[:-4], "--episodes", "5", *arguments[-2:]]) == 2
    assert "study.changed" in capsys.readouterr().err


def test_a_trial_that_another_process_runs_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [tmp_path / row / "seed0" for row in ROWS]
    with contextlib.ExitStack() as others:
        assert all(others.enter_context(claim(place)) for place in places)
        assert main([*RUN, "--out", str(tmp_path)]) == 0
        assert "3 of 3 trials run in other processes" in capsys.readouterr().out
        assert not any((place / "run.json").exists() for place in places)
        with claim(places[0]) as mine:
            assert not mine
    with claim(places[0]) as mine:  # given back
        assert mine


def test_what_the_base_did_is_measured_once(study: Path) -> None:
    # Three tasks: the base; seq_ft after two stages; expansion's second adapter, its first is that of seq_ft; models.
    assert len([*(study / "evaluations").glob("*.json")]) == 3 + 6 + 1 + 9


def test_an_adapter_scaled_to_nothing_acts_as_the_base(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, str(study), "--methods", "seq_ft", "--scale", "0", "--out", str(tmp_path))
    found = matrix(tmp_path, "seq_ft")
    assert [found.get(2, t) for t in found.columns] == [found.get(0, t) for t in found.columns]


def test_an_evaluation_of_nothing_or_of_another_base_is_refused(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "study.nothing_finished": [str(study), "--methods", "ewc", "--out", str(tmp_path / "a")],
        "study.no_adapter": [str(study), "--methods", "full_ft", "--scale", "0.5", "--out", str(tmp_path / "c")],
        "study.same_folder": [str(study), "--out", str(study)],
        "study.other_base": [
            *[str(study), "--methods", "seq_ft", "--out", str(tmp_path / "b")],
            *["--policy", str(ROOT / "models" / "small-metaworld-flow")],
        ],
    }
    for code, arguments in cases.items():
        assert main(["study", "evaluate", *arguments]) == 2
        assert code in capsys.readouterr().err
