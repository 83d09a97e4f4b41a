"""Only what people have verified leaves the robot, with the label that holds, once.

Pinned: unlabelled, discarded and deployed episodes stay; a label that changes or is disputed is told and taken back; a
session's end comes after its episodes; a killed process sends nothing twice. Deterministic: files only, no sockets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.learner.service.ingest import ingest_record
from ratchet_vla.learner.service.state import PendingFile
from ratchet_vla.link.robot.outbox import Outbox
from ratchet_vla.runtime.session.dispatch import Dispatcher
from ratchet_vla.runtime.session.manifest import Session
from tests.agent.episodes.samples import episode, small_contract


class Place:
    """A robot's folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contract = small_contract()
        self.store = EpisodeStore(folder / "episodes", create=True)
        self.annotations = Annotations(self.store)
        self.open()

    def open(self) -> None:
        self.outbox = Outbox(self.folder / "outbox", reserve=0)
        self.dispatcher = Dispatcher(self.store, self.outbox, self.folder / "sessions")

    def kill(self) -> None:
        self.outbox.close()
        self.open()

    def record(self, seed: int, mode: str = "collect", session: str = "", simulator: bool = False) -> str:
        made = episode(self.contract, seed=seed)
        made.success, made.success_source = (True, "simulator") if simulator else (None, "")
        path = self.folder / f"{seed}.mcap"
        write_episode(path, made, self.contract, mode=mode, session=session)
        return self.store.copy_in(path).id

    def sent(self) -> list[str]:
        return [i.key.split("/")[0] for i in self.outbox.waiting()]

    def labels(self) -> list[dict[str, Any]]:
        items = [i for i in self.outbox.waiting() if i.type == "label"]
        records = [ingest_record(PendingFile("label", i.sha), self.outbox.path(i)) for i in items]
        return [dict(record.label) for record in records if record.label is not None]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_only_verified_episodes_for_learning_leave(place: Place) -> None:
    labelled, unlabelled, thrown = place.record(1), place.record(2), place.record(3)
    place.record(4, mode="deploy", simulator=True)
    simulated = place.record(5, simulator=True)
    place.annotations.annotate(labelled, "success", "anna")
    place.annotations.annotate(thrown, "discard", "anna")
    assert place.dispatcher.look() == 3
    keys = {i.key for i in place.outbox.waiting()}
    assert keys == {f"episode/{labelled}", f"label/{labelled}/1", f"episode/{simulated}"}
    assert place.labels() == [{"episode": labelled, "success": True, "source": "human:anna"}]
    [item] = [i for i in place.outbox.waiting() if i.key == f"episode/{labelled}"]
    assert item.sha == labelled
    assert place.store.path(labelled).is_file()
    assert place.dispatcher.look() == 0
    place.annotations.annotate(unlabelled, "failure", "anna")
    assert place.dispatcher.look() == 2
    place.outbox.close()


def test_a_label_that_changes_is_told_and_a_dispute_takes_it_back(place: Place) -> None:
    one = place.record(1)
    for value, annotator in (("success", "anna"), ("failure", "bob"), ("failure", "anna"), ("success", "anna")):
        place.annotations.annotate(one, value, annotator)
        place.dispatcher.look()
        place.kill()
    said = [(label["success"], label["source"]) for label in place.labels()]
    assert said == [
        (True, "human:anna"),
        (None, "human:withdrawn"),
        (False, "human:anna+bob"),
        (None, "human:withdrawn"),
    ]
    assert place.sent().count("episode") == 1
    place.outbox.close()


def test_a_sessions_end_comes_after_its_episodes(place: Place) -> None:
    session = Session.start(place.folder / "sessions", place.contract, base_hash="b" * 64, adapter_id="b" * 64)
    one = place.record(1, session=session.id)
    place.annotations.annotate(one, "success", "anna")
    assert place.dispatcher.look() == 2
    session.stop("done")
    assert place.dispatcher.look() == 1
    place.kill()
    assert place.dispatcher.look() == 0
    assert place.sent() == ["episode", "label", "session"]
    record = json.loads(place.outbox.path(place.outbox.waiting()[2]).read_bytes())
    assert (record["ended"], [e["sha"] for e in record["episodes"]]) == (True, [one])
    assert record["manifest"]["contract_id"] == place.contract.id
    (place.folder / "sessions" / "broken").mkdir()
    (place.folder / "sessions" / "broken" / "session.json").write_text("{")
    assert place.dispatcher.look() == 0
    place.outbox.close()
