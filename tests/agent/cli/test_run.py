"""`ratchet run` is how a policy first meets the runtime: it must show the limits before it moves and say what happened.

Pinned: one lock-step episode of the built-in policy on Meta-World: contract and times printed first, success, every
action as sampled, a session manifest on disk. Determinism: lock-step, greedy, one initial state.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.cli.main import main
from agent.runtime.session import Session


def test_an_episode_through_the_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--task", "door-open", "--json", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "contract metaworld" in shown.err
    assert "stops within 0.2 s" in " ".join(shown.err.split())
    result = json.loads(shown.out)
    (episode,) = result["episodes"]
    assert episode["success"] is True
    assert episode["termination"] == "success"
    assert episode["exactly_as_sampled"] == 1.0
    assert episode["events"] == {}
    (folder,) = tmp_path.iterdir()
    manifest = Session.read(folder)
    assert (manifest.robot, manifest.base_hash, manifest.reason) == ("metaworld", result["adapter"], "done")
