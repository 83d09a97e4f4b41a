"""What was exported is a robot's memory: an export that can't be read back here is a copy that nobody can trust.

Pinned, for every shipped contract and both formats, per control step, per decision, and where LeRobot cannot say how
many decisions a second there are: states, actions, chunks, marks, times and rewards come back to the bit, frames to the
bit (HDF5) or near (video), with task, adapter, calibrations and what was labelled as a claim; through the command, with
no contract named. Deterministic: seeded episodes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from ratchet_vla.cli.main import main
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.exchange.rows import Row, rows
from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import Card, EpisodeStore
from ratchet_vla.records import ActionChunk, ControlTick, Episode, Mark, Observation, Step
from tests.agent.episodes.samples import ROOT, random_image, same

ROBOTS = sorted((ROOT / "robots").glob("*.yaml"))
ADAPTER = "ab" * 32
SIZE = 64  # an even size that every codec takes, of the right proportions enough for a test


def contract_of(path: Path) -> RobotContract:
    whole = RobotContract.load(path)
    return dataclasses.replace(
        whole, cameras=tuple(dataclasses.replace(c, width=SIZE, height=SIZE) for c in whole.cameras)
    )


def recorded(
    contract: RobotContract, seed: int, *, ticks: bool, lengths: tuple[int, ...] = (5, 5, 5), last_ran: int = 0
) -> Episode:
    """Make an episode as the runtime records it: some steps clipped, some a person's, some held.

    Args:
        ticks: chunks of several actions, with a frame and a tick per control step; else decisions alone.
        last_ran: control steps of the last decision; all of its chunk's, if 0.
    """
    rng = np.random.default_rng(seed)
    marks = [Mark.NONE, Mark.CLIPPED | Mark.RAMPED, Mark.HUMAN, Mark.HELD, Mark.NONE]
    steps: list[Step] = []
    control: list[ControlTick] = []
    now = 12.3456789
    for number, length in enumerate(lengths):
        for k in range(length if ticks else 1):
            images = {c.name: random_image(contract, c.name, rng, smooth=True) for c in contract.cameras}
            state = {s.name: rng.normal(size=s.size).astype(np.float32) for s in contract.state}
            at = now + k / contract.control_hz + rng.uniform(0, 1e-4)
            seen = Observation(images, state, "do it", at, len(steps))
            actions = rng.normal(size=(1 if ticks else length, contract.action.size)).astype(np.float32)
            chunk = ActionChunk(actions, None, None, ADAPTER, 1.0, at, len(steps))
            last = number == len(lengths) - 1 and (not ticks or k == length - 1)
            flags = rng.random(len(actions)) > 0.3
            ran = last_ran if last and last_ran else len(actions)
            steps.append(Step(seen, chunk, flags, float(rng.integers(0, 8) / 4), last, ran))
            if ticks:
                mark = marks[k % 5]
                command = None if mark == Mark.HELD else actions[0]
                index = len(control)
                control.append(ControlTick(at + 1e-3, at, index, actions[0], command, mark, index, 0, ADAPTER, state))
        now += length / contract.control_hz
    return Episode(
        task=f"task {seed}", instruction=f"do it {seed}", steps=steps, ticks=control, success=True,
        success_source="simulator", initial_state=3, seed=seed, adapter_id=ADAPTER, meta={"note": [1, None]},
        termination="success",
    )  # fmt: skip


def store_of(root: Path, contract: RobotContract, episodes: list[Episode]) -> Annotations:
    store = EpisodeStore(root, create=True)
    for i, made in enumerate(episodes):
        path = store.folder("monday") / f"{i}.mcap"
        cameras = {contract.cameras[0].name: "cd" * 32}
        write_episode(path, made, contract, session="monday", mode="collect", calibrations=cameras)
        store.add(path)
    return Annotations(store)


def told(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> Any:
    assert main(["episodes", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def rows_of(store: EpisodeStore, card: Card, rate: Any) -> list[Row]:
    return list(rows(store.open(card.id), rate, card.success))


def equal(mine: Row, theirs: Row, tolerance: float) -> bool:
    def plain(row: Row) -> dict[str, Any]:
        return {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "images"}

    near = [np.abs(mine.images[n].astype(int) - theirs.images[n]).mean() <= tolerance for n in mine.images]
    return all(near) and list(mine.images) == list(theirs.images) and same(plain(mine), plain(theirs))


@pytest.mark.parametrize("rate", ["control", "decisions"])
@pytest.mark.parametrize("robot", ROBOTS, ids=lambda p: p.stem)
def test_own_exports_come_back_equal(
    robot: Path, rate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contract = contract_of(robot)
    lengths = (5,) if rate == "control" else (5, 5)
    made_up = [recorded(contract, i, ticks=rate == "control", lengths=lengths) for i in range(2)]
    annotations = store_of(tmp_path / "store", contract, made_up)
    for form, tolerance in (("hdf5", 0.0), ("lerobot", 8.0)):
        target = tmp_path / f"out.{form}"
        made = told(capsys, "export", target, "--format", form, "--store", annotations.store.root)
        assert (made["episodes"], made["rate"]) == (2, rate)
        told(capsys, "import", target, "--store", tmp_path / form)
        back = EpisodeStore(tmp_path / form)
        for mine, theirs in zip(annotations.store.cards().values(), back.cards().values(), strict=True):
            before, after = rows_of(annotations.store, mine, rate), rows_of(back, theirs, rate)
            assert len(before) == len(after) > 0
            assert all(equal(a, b, tolerance) for a, b in zip(before, after, strict=True))
            for name in ("task", "instruction", "adapter_id", "session", "robot", "contract_id", "created", "reason"):
                assert getattr(mine, name) == getattr(theirs, name)
            assert (theirs.mode, theirs.success, theirs.source) == ("import", True, "export:simulator")
            assert theirs.meta["note"] == [1, None]
            assert theirs.meta["exported"]["id"] == mine.id
            assert mine.human_share == pytest.approx(theirs.human_share, abs=0.06)  # held ticks are no rows
            info = back.open(theirs.id).info
            assert (info.seed, info.initial_state) == (annotations.store.open(mine.id).info.seed, 3)
            assert info.calibrations == annotations.store.open(mine.id).info.calibrations
            # Nobody here has labelled it yet; the claim is what a reader is shown first.
            assert Annotations(back).status(theirs.id).state == "unjudged"
            proposal = Annotations(back).proposal(theirs)
            assert proposal is not None
            assert proposal.success
        # Once more adds nothing, and out and in again changes nothing.
        told(capsys, "import", target, "--store", tmp_path / form)
        assert len(EpisodeStore(tmp_path / form).cards()) == 2


@pytest.mark.parametrize("robot", ROBOTS, ids=lambda p: p.stem)
def test_a_rate_that_lerobot_cannot_say_comes_back_equal(
    robot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight actions a decision: 2.5, 3.1 or 3.75 decisions a second, and `fps` is an integer."""
    contract = contract_of(robot)
    annotations = store_of(
        tmp_path / "store", contract, [recorded(contract, 1, ticks=False, lengths=(8, 8), last_ran=3)]
    )
    where = ["--store", annotations.store.root]
    error = told(capsys, "export", tmp_path / "set", *where, "--options.rate", "decisions", code=2)["error"]
    assert (error["code"], "--options.rate spread" in error["fix"]) == ("export.bad_rate", True)
    made = told(capsys, "export", tmp_path / "set", *where)
    assert (made["rate"], made["fps"], made["frames"]) == ("spread", contract.control_hz, 11)
    told(capsys, "import", tmp_path / "set", "--store", tmp_path / "back")
    back = EpisodeStore(tmp_path / "back")
    (mine,), (theirs,) = annotations.store.cards().values(), back.cards().values()
    before, after = rows_of(annotations.store, mine, "decisions"), rows_of(back, theirs, "decisions")
    assert [row.ran for row in after] == [8, 3]
    assert all(equal(a, b, 8.0) for a, b in zip(before, after, strict=True))
    # For everybody else it is a set at the control rate, whose rows say which frames are new.
    table = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet").to_pydict()
    assert table["is_decision"] == [i in (0, 8) for i in range(11)]
    sent = np.concatenate([row.chunk[: row.ran] for row in before if row.chunk is not None])
    assert np.array(table["action"], np.float32).tobytes() == sent.tobytes()
    assert table["timestamp"] == pytest.approx([i / contract.control_hz for i in range(11)])
    (tmp_path / "set/meta/ratchet.json").unlink()
    contract_file = tmp_path / "contract.yaml"
    contract_file.write_text(yaml.safe_dump(contract.to_dict()))
    others = ["--contract", contract_file, "--store", tmp_path / "others"]
    assert len(told(capsys, "import", tmp_path / "set", *others)) == 1


def test_chunks_of_several_lengths_and_a_rate_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contract = contract_of(ROOT / "robots/libero.yaml")
    made = recorded(contract, 0, ticks=False, lengths=(8, 3, 8))
    annotations = store_of(tmp_path / "store", contract, [made])
    store = ["--store", annotations.store.root]
    assert told(capsys, "export", tmp_path / "set", *store, code=2)["error"]["code"] == "export.mixed_chunks"
    error = told(capsys, "export", tmp_path / "set", *store, "--options.rate", "control", code=2)["error"]
    assert (error["code"], "--options.rate" in error["fix"]) == ("export.empty_episode", True)
    told(capsys, "export", tmp_path / "a.hdf5", "--format", "hdf5", *store)
    told(capsys, "import", tmp_path / "a.hdf5", "--store", tmp_path / "back")
    (mine,), (theirs,) = annotations.store.cards().values(), EpisodeStore(tmp_path / "back").cards().values()
    before = rows_of(annotations.store, mine, "decisions")
    after = rows_of(EpisodeStore(tmp_path / "back"), theirs, "decisions")
    assert [len(r.chunk) for r in after if r.chunk is not None] == [8, 3, 8]
    assert all(equal(a, b, 0.0) for a, b in zip(before, after, strict=True))
    assert not (tmp_path / "set").exists()


def test_what_is_no_more_what_was_exported_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contract = contract_of(ROOT / "robots/so101.yaml")
    annotations = store_of(tmp_path / "store", contract, [recorded(contract, i, ticks=True) for i in range(2)])
    told(capsys, "export", tmp_path / "set", "--store", annotations.store.root)
    told(capsys, "export", tmp_path / "a.hdf5", "--format", "hdf5", "--store", annotations.store.root)
    new = ["--store", tmp_path / "new"]
    for source in ("set", "a.hdf5"):
        other = told(capsys, "import", tmp_path / source, "--contract", "robots/libero.yaml", *new, code=2)["error"]
        assert other["code"] == "import.other_contract"
        assert "another action space" in other["what"]
    facts = json.loads((tmp_path / "set/meta/ratchet.json").read_text())
    (tmp_path / "set/meta/ratchet.json").write_text(json.dumps({**facts, "episodes": facts["episodes"][:1]}))
    assert told(capsys, "import", tmp_path / "set", *new, code=2)["error"]["code"] == "import.changed_export"
    # Without our note it is a set like any other's.
    (tmp_path / "set/meta/ratchet.json").unlink()
    assert told(capsys, "import", tmp_path / "set", *new, code=2)["error"]["code"] == "import.no_contract"
    assert not (tmp_path / "new" / "index.jsonl").exists()
