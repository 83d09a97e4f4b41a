"""The built-in flow base takes the same road as the discrete one: from its folder through the simulator to an adapter.

The path matters because pi0 and SmolVLA take it too, and nobody runs those in every test. Pinned: the base opens, fits
its robot and succeeds on a task; one update of real episodes changes it, under ratios that begin at one; the adapter
that comes out is bound to this base and to no other. Determinism: seeds, fixed initial states, one thread.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli.main import main
from ratchet_vla.policy.checkpoints import own as checkpoint

ROOT = Path(__file__).resolve().parents[4]
BASE = ROOT / "models" / "small-metaworld-flow"


def test_the_flow_base_learns_from_its_own_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["learn", "--policy", str(BASE), "--tasks", "handle-press", "--out", str(tmp_path), "--json"]
    arguments += ["--updates", "1", "--groups", "4", "--group-size", "4", "--temperature", "2"]
    arguments += ["--update.algorithm", "ppo", "--update.warmup-steps", "0", "--update.learning-rate", "1e-3"]
    arguments += ["--evaluation-episodes", "6", "--workers", "1", "--slots", "8"]
    assert main(arguments) == 0
    capsys.readouterr()
    update = json.loads((tmp_path / "updates.jsonl").read_text().splitlines()[0])
    assert update["episodes"] == 16
    assert 0 < update["successes"] < 16
    assert update["ratio_mean"] == pytest.approx(1.0, abs=0.1)
    assert update["approx_kl"] > 0
    cells = json.loads((tmp_path / "matrix.json").read_text())["cells"]
    assert [c["stage"] for c in cells] == [0, 1]
    assert cells[0]["successes"] >= 2  # of 6, by the base alone
    store = FolderStore(tmp_path / "adapters")
    card = store.card(store.resolve("candidate"))
    assert card.base_hash == checkpoint.load(BASE).base_hash
    discrete = checkpoint.load(ROOT / "models" / "small-metaworld")
    assert card.base_hash != discrete.base_hash
