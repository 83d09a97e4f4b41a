"""`ratchet run` is how a policy first meets the runtime: it must show the limits before it moves and say what happened.

Pinned: one lock-step episode of the built-in policy on Meta-World: contract and times printed first, success, every
action as sampled, a session manifest on disk, the episode in a store under that session; and with a learner: a sync
agent is started beside it, its rollout request is run under the adapter that it names, and every episode arrives.
Determinism: lock-step; greedy and one initial state, or what a real learner requests (about fifteen seconds: learner,
sync agent and policy are processes that load torch).
"""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest

from benchmarks.product.week import Verb, eventually
from ratchet_vla.cli.main import main
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.learner.service.state import LearnerState
from ratchet_vla.runtime.session.manifest import Session
from ratchet_vla.storage.journal import read


def test_an_episode_through_the_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    robot, kept = tmp_path / "robot", tmp_path / "episodes"
    asked = ["run", "--task", "door-open", "--json", "--robot", str(robot), "--record", str(kept)]
    assert main(asked) == 0
    shown = capsys.readouterr()
    assert "contract metaworld" in shown.err
    assert "stops within 0.2 s" in " ".join(shown.err.split())
    result = json.loads(shown.out)
    (episode,) = result["episodes"]
    assert episode["success"] is True
    assert episode["termination"] == "success"
    assert episode["exactly_as_sampled"] == 1.0
    assert episode["events"] == {}
    (folder,) = (robot / "sessions").iterdir()
    manifest = Session.read(folder)
    assert (manifest.robot, manifest.base_hash, manifest.reason) == ("metaworld", result["adapter"], "done")
    store = EpisodeStore(kept)
    card = store.card(episode["episode"])
    assert (card.session, card.success, card.source) == (manifest.session, True, "simulator")
    assert manifest.episodes == [{"key": card.name, "sha": card.id}]
    assert (card.adapter_id, card.mode, card.dropped) == (result["adapter"], "collect", 0)
    read = store.read(card.id)
    assert len(read.steps) == episode["chunks"]
    assert len(read.ticks) == episode["ticks"]
    assert read.initial_state == episode["initial_state"]
    assert {s.chunk.compute_dtype for s in read.steps} <= {"float32", "bfloat16"}


def test_what_a_learner_requests_is_run_and_arrives_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    words = "ratchet learner --mode robot --tasks button-press --batch 4 --workers 0 --out runs/learner"
    learner = Verb(f"{words} --address {address} --plain --reserve-gib 0", tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    try:
        learner.until("listening on")
        asked = ["run", "--learner", address, "--plain", "--episodes", "3", "--horizon", "15", "--reserve-gib", "0"]
        assert main([*asked, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)

        def learner_state() -> LearnerState:
            return LearnerState.of(read(tmp_path / "runs" / "learner" / "journal.jsonl"))

        requested_adapter = learner_state().training
        store = EpisodeStore("runs/robot/episodes")
        eventually(lambda: len(learner_state().arrivals) == 3, "three episodes at the learner")
    finally:
        signal.signal(signal.SIGTERM, before)
        learner.end()
    assert (result["task"], result["adapter"], len(result["episodes"])) == ("button-press", requested_adapter, 3)
    arrivals = learner_state().arrivals
    assert set(arrivals) == set(store.cards()) == {row["episode"] for row in result["episodes"]}
    assert learner_state().counts()["accepted"] == 3
    assert {a.source for a in arrivals.values()} == {"simulator"}
    (folder,) = (tmp_path / "runs" / "robot" / "sessions").iterdir()
    manifest = Session.read(folder)
    assert {e["sha"] for e in manifest.episodes} == set(arrivals)
    for card in store.cards().values():
        assert (card.session, card.adapter_id, bool(card.meta["order"])) == (manifest.session, requested_adapter, True)
        assert {s.chunk.temperature for s in store.read(card.id).steps} == {1.0}
    seeds = {store.open(card.id).info.seed for card in store.cards().values()}
    assert len(seeds) == 3  # noise of its own for each
