"""The LIBERO part of the demo shows what long learning gave: it must show the adapter that ships, and measure it.

Pinned: the shipped store is sound and its card complete, it fits the built-in base and changes what that does; the part
runs on real simulators, measures both on the same states, goes on from the adapter and leaves the shipped store as it
was. Determinism: fixed seeds; a few episodes of one chunk, which nobody expects to succeed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from ratchet_sim import registry
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.cli.learn import demo_shipped
from ratchet_vla.cli.recipes import DEMO, SHIPPED
from ratchet_vla.learner.gate.decision import Comparison, GateConfig
from ratchet_vla.learner.measures.metrics import Cell
from ratchet_vla.policy.noise import chunk_noise
from ratchet_vla.policy.protocol import PolicyInput
from tests.agent.learner.runs import tiny_policy

SUITE = "libero_object"
SHIP = SHIPPED[SUITE]
LEARNED = DEMO[SUITE].tasks[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_the_shipped_store_is_sound_and_says_where_it_comes_from(tmp_path: Path) -> None:
    shutil.copytree(SHIP.store, tmp_path / "copy", ignore=shutil.ignore_patterns("scratch", ".lock"))
    store = FolderStore(tmp_path / "copy")
    assert store.verify() == []
    card = store.card("active")
    line = [store.card(i).provenance for i in reversed(store.lineage("active"))]
    assert [(p.task, p.stage) for p in line] == [(LEARNED, 1)]
    assert all(f"ratchet demo --suite {SUITE}" in p.notes for p in line)
    assert all(p.effect for p in line)
    decision = card.provenance.gate
    assert decision["decision"] == "promote"
    assert decision["active"] == "", "measured against the base"
    # With noise of its own, which the demo's is not. One held-out task fell, which the card tells.
    measured = dataclasses.replace(SHIP.gate, seed=1, held_out="report")
    assert decision["config"] == dataclasses.asdict(measured)
    assert all(row["episodes"] == 60 for row in decision["tasks"])
    told = {row["task"]: row["role"] for row in decision["tasks"]}
    assert told == {LEARNED: "new", **dict.fromkeys(SHIP.held_out, "held_out")}, (
        "what it cost on tasks that it never learned stands on the card"
    )
    assert sum(p.stat().st_size for p in SHIP.store.rglob("*") if p.is_file()) < 2 << 20


def test_the_shipped_adapter_fits_the_base_and_changes_its_actions() -> None:
    store = FolderStore(SHIP.store)
    running = common.open_running(
        common.policy_folder(SUITE, None), registry.contract_for(SUITE), common.lora_of(store, "active"), store
    )
    report = running.swapper.swap("active")
    assert store.card("active").base_hash == running.policy.base_hash
    assert report.warnings == ()
    assert report.canary_change > 0
    assert running.swapper.current_id == store.resolve("active")


def test_the_part_measures_both_and_goes_on_from_the_adapter(tmp_path: Path) -> None:
    before = contents(SHIP.store)
    tiny = dataclasses.replace(
        SHIP,
        gate=dataclasses.replace(SHIP.gate, episodes=2, draws=1, min_episodes=2, horizon=8),
        update=dataclasses.replace(SHIP.update, tasks=(LEARNED,), groups=1, group_size=2, horizon=8),
    )
    console = Console(file=io.StringIO(), width=200)
    result = demo_shipped.run(
        suite=SUITE, shipped=tiny, folder=tmp_path, seed=0, workers=1, videos=False, console=console
    )
    assert contents(SHIP.store) == before
    adapter = FolderStore(SHIP.store).resolve("active")
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert told["adapter"]["id"] == adapter
    assert set(told["outcomes"]) == {LEARNED}
    for task, outcomes in told["outcomes"].items():
        states = [f"state-{s}" for s in registry.task(SUITE, task).evaluation_states[:2]]
        assert [list(outcomes[who]) for who in ("base", "adapter")] == [states, states]
    assert (result.gate_decision.candidate, result.gate_decision.active) == (adapter, "")
    assert told["when_made"] == dict(FolderStore(SHIP.store).card("active").provenance.gate)
    # The update's episodes are the shipped adapter's, and its result runs but is not promoted.
    assert result.update["adapter_id"] == adapter
    store = FolderStore(tmp_path / "adapters")
    assert store.lineage(result.update["to"])[:2] == [result.update["to"], adapter]
    assert store.tags() == {"candidate": result.update["to"]}
    assert [s["to"] for s in result.swaps] == [adapter[:12], result.update["to"][:12]]
    page = result.report.read_text()
    assert "NOT larger than its interval" in page, "two failures each are no gain"
    assert "Missing from this run" in page, "no videos"


def test_the_episode_that_is_filmed_is_the_first_that_only_the_adapter_solved() -> None:
    def pair(task: str, base: str, adapter: str) -> Comparison:
        cells = [Cell.of({f"state-{30 + i}": c == "1" for i, c in enumerate(s)}) for s in (base, adapter)]
        return Comparison(task, "new", *cells)

    task, key, why = demo_shipped.telling([pair("a", "1101", "1111"), pair("b", "10100", "01101")])
    assert (task, key) == ("b", "state-31")
    assert "2 are such, 1 the reverse" in why
    task, key, why = demo_shipped.telling([pair("a", "0111", "0011")])
    assert (task, key) == ("a", "state-30")
    assert "none was solved by the adapter alone" in why


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_filmed_acts_as_the_gates_episodes(temperature: float) -> None:
    policy = tiny_policy()
    spec = policy.spec
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1, 1, spec.image_size, spec.image_size, 3), np.uint8)
    batch = PolicyInput(images=images, state=torch.zeros(1, 4), instructions=["open the door"])
    act = demo_shipped.acting(policy, GateConfig(temperature=temperature), seed=5)
    noise = np.random.Generator(np.random.Philox(key=5))
    for _ in range(2):
        if temperature:
            drawn = torch.from_numpy(chunk_noise(noise, (spec.chunk, 4), 0.0))[None]
            wanted = policy.sample(batch, temperature, drawn).actions
        else:
            wanted = policy.predict(batch).actions
        assert torch.equal(act(batch), wanted)
