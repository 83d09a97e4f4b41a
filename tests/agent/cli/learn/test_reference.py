"""A set that is not the base's, or not there, must be told before hours are spent; the one beside the base is used.

Pinned: `reference record` writes what `show` reads and `learn` is held by; run.json names it; a run on a task leaves
that task out of it; other bases and missing files are refused before a simulator starts; the shipped set is the shipped
base's. Determinism: seeds; one episode per task in the real suite.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ratchet_vla.cli.main import main
from ratchet_vla.learner.retention.reference_set import FILE, load
from ratchet_vla.paths import MODELS
from ratchet_vla.policy.checkpoints import adopted

SIMULATORS = ["--workers", "1", "--slots", "2"]
LEARN = ["learn", "--updates", "1", "--groups", "1", "--group-size", "2", "--evaluation-episodes", "0", "--no-videos"]


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "two.safetensors"
    record = ["reference", "record", "--tasks", "reach", "handle-press", "--recording.episodes", "1"]
    record += ["--recording.horizon", "8", "--out", str(path), *SIMULATORS]
    assert main(record) == 0
    return path


def test_what_was_recorded_is_shown(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reference", "show", str(recorded), "--json"]) == 0
    shown = answer(capsys)
    assert set(shown["tasks"]) == {"reach", "handle-press"}
    assert shown["id"] == load(recorded).id
    assert shown["origin"]["source"] == "metaworld"


def test_a_run_is_held_by_it_without_its_own_task(recorded: Path, tmp_path: Path) -> None:
    run = [*LEARN, "--tasks", "handle-press", "--horizon", "8", "--reference", str(recorded), "--out", str(tmp_path)]
    main([*run, *SIMULATORS])
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["reference"]["reference"] == load(recorded).id
    assert facts["reference"]["tasks"] == ["reach"]


def test_the_shipped_set_is_the_shipped_bases_and_holds_every_run(tmp_path: Path) -> None:
    folder = MODELS / "small-metaworld"
    shipped = load(folder / FILE)
    assert shipped.origin.base_hash == adopted.load(folder).base_hash
    main([*LEARN, "--tasks", "handle-press", "--horizon", "8", "--out", str(tmp_path), *SIMULATORS])
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["reference"]["reference"] == shipped.id
    assert "handle-press" not in facts["reference"]["tasks"]
    assert len(facts["reference"]["tasks"]) == len(shipped.decisions.present_tasks) - 1


def test_a_missing_file_is_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    run = [*LEARN, "--tasks", "handle-press", "--reference", str(tmp_path / "none"), "--out", str(out), "--json"]
    assert main(run) == 2
    assert answer(capsys)["error"]["code"] == "reference.missing"
    assert not out.exists()


def test_another_bases_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*LEARN, "--tasks", "handle-press", "--policy", str(MODELS / "small-metaworld-flow"), "--out", str(tmp_path)]
    assert main([*run, "--reference", str(MODELS / "small-metaworld" / FILE), "--json"]) == 2
    assert answer(capsys)["error"]["code"] == "reference.wrong_base"
