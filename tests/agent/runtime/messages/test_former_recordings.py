"""Recordings that people already have must not be lost with the recorder that made them.

Pinned: a file that the nodes' former recorder really wrote (tests/golden/node_recording) becomes an episode: frames bit
by bit, what was sampled, what the command filter applied, both people's labels; a second time changes nothing; a file
that was cut off before its first block, a label on another file and a torn label are passed over by name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory

from ratchet_vla.cli.main import main
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.records import Mark
from ratchet_vla.runtime.messages.former_recordings import import_recordings, recordings

ROOT = Path(__file__).resolve().parents[4]
MADE = ROOT / "tests" / "golden" / "node_recording"
NAME = "7d5e9fb1e5f8-0001"
BASE = "ce128775f0ee21be60fbe5912816bd58609f429d65a55cd76196c535f7b80104"


def test_a_recording_becomes_an_episode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["episodes", "import", str(MADE), "--store", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (len(told["episodes"]), told["labels"], told["passed"]) == (1, 2, [])
    store = EpisodeStore(tmp_path)
    card = store.card(NAME)
    assert (card.task, card.instruction, card.mode) == ("door-open", "open the door", "import")
    assert (card.adapter_id, card.success, card.source, card.reason) == (BASE, False, "simulator", "horizon")
    assert store.open(card.id).info.contract_id == RobotContract.load(ROOT / "robots/metaworld.yaml").id
    annotations = Annotations(store)
    assert [(x.annotator, x.value) for x in annotations.labels(card.id)] == [("Ada", "failure"), ("Bo", "discard")]
    episode = store.read(card.id)
    with (MADE / f"{NAME}.mcap").open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        every = [(channel.topic, body) for _, channel, _, body in reader.iter_decoded_messages()]
    images = [np.frombuffer(d.data, np.uint8).reshape(96, 96, 3) for t, d in every if t == "/corner2/image_raw"]
    upright = [np.rot90(p, 2) for p in images]  # the contract's camera hangs upside down
    stream = [image for _, image in store.open(card.id).frames("corner2")]
    assert np.array_equal(stream, upright)
    chunks = {d.observation_sequence: d for t, d in every if t == "/chunks"}
    assert [s.observation.sequence for s in episode.steps] == [1, 2, 3, 4]  # what the first one saw came too early
    for step in episode.steps:
        source = chunks[step.observation.sequence]
        assert step.chunk.tokens is not None
        assert step.chunk.log_prob is not None
        assert np.array_equal(step.chunk.tokens.ravel(), source.tokens)
        assert np.array_equal(step.chunk.log_prob.ravel(), np.array(source.log_prob, np.float32))
        assert any(np.array_equal(step.observation.images["corner2"], p) for p in upright)
    applied = [d for t, d in every if t == "/applied"]
    moved = [t.reached for t in episode.ticks if t.reached is not None]
    assert np.array_equal(moved, [np.array(a.action, np.float32) for a in applied if a.action])
    assert [t.fate for t in episode.ticks[:24]] == [Mark.NONE] * 24
    assert [s.steps_run for s in episode.steps] == [5, 5, 5, 4]
    # once more changes nothing
    assert main(["episodes", "import", str(MADE), "--store", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == 0
    assert len(EpisodeStore(tmp_path).cards()) == 1
    assert len(Annotations(EpisodeStore(tmp_path)).labels(card.id)) == 2


def test_what_does_not_belong_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    whole = (MADE / f"{NAME}.mcap").read_bytes()
    (folder / f"{NAME}.mcap.part").write_bytes(whole[: len(whole) // 2])  # within the only block of messages
    (folder / "holiday.mcap").write_bytes(b"no MCAP at all")
    shutil.copy(MADE / "verdicts.jsonl", folder)
    with (folder / "verdicts.jsonl").open("a") as file:
        file.write("torn\n" + json.dumps({"episode": "of another day", "label": "success", "person": "Ada"}) + "\n")
    assert [p.name for p in recordings(folder)] == [f"{NAME}.mcap.part"]
    store = EpisodeStore(tmp_path / "store", create=True)
    done = import_recordings(folder, store)
    assert (done.cards, done.labels) == ([], 0)
    codes = [error.code for _, error in done.passed]
    assert codes == ["import.empty_recording", *["import.other_recording"] * 2, *["import.bad_label"] * 2]


def test_a_label_on_another_file_is_nobodys(tmp_path: Path) -> None:
    whole = bytearray((MADE / f"{NAME}.mcap").read_bytes())
    (tmp_path / f"{NAME}.mcap").write_bytes(whole + b"\0")
    shutil.copy(MADE / "verdicts.jsonl", tmp_path)
    store = EpisodeStore(tmp_path / "store", create=True)
    done = import_recordings(tmp_path, store)
    assert done.labels == 0
    assert {e.code for _, e in done.passed} == {"import.other_recording"}
