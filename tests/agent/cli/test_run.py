"""`ratchet run` is how a policy first meets the runtime: it must show the limits before it moves and say what happened.

Pinned: one lock-step episode of the built-in policy on Meta-World: contract and times printed first, success, every
action as sampled, a session manifest on disk, the episode in a store under that session. Determinism: lock-step,
greedy, one initial state.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.cli.main import main
from agent.episodes.store import EpisodeStore
from agent.runtime.session import Session


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
