"""`ratchet learn` on the command line: what is learned must go on from the adapter that was named, and say so.

Pinned: a run that starts from a stored adapter samples its first episodes with it, keeps its shape, leaves its line in
the run's own store and the command on the card; the store that it came from stays as it was. Real simulator and policy,
one update of two episodes of two chunks. Determinism: fixed seeds; nothing depends on success.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from agent.adapters.identity import binding_of
from agent.adapters.protocol import Provenance
from agent.adapters.store import FolderStore
from agent.cli import common
from agent.cli.main import main
from sim import registry

TASK = "button-press"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    store = FolderStore(tmp_path_factory.mktemp("origin") / "adapters", create=True)
    policy, lora = common.open_policy(
        common.policy_folder("metaworld", None), registry.contract_for("metaworld"), common.LoraOptions(rank=2, alpha=2)
    )
    generator = torch.Generator().manual_seed(0)
    lora.load({n: 0.01 * torch.randn(t.shape, generator=generator) for n, t in lora.export().items()})
    card = store.put(lora.adapter(binding_of(policy)), Provenance(task="handle-press", stage=1))
    store.tag("mine", card.id)
    return store


def test_it_goes_on_from_a_named_adapter(
    origin: FolderStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = f"learn --tasks {TASK} --start mine --store {origin.root} --out {out} --update.algorithm ppo"
    small = "--updates 1 --groups 1 --group-size 2 --horizon 10 --evaluation-episodes 0 --workers 1 --slots 2"
    assert main([*command.split(), *small.split(), "--no-videos", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["matrix"]["cells"] == []
    first = origin.resolve("mine")
    (update,) = [json.loads(line) for line in (out / "updates.jsonl").read_text().splitlines()]
    assert update["adapter_id"] == first
    store = FolderStore(out / "adapters")
    learned = store.resolve("candidate")
    assert store.lineage(learned) == [learned, first]
    card = store.card(learned)
    assert (card.provenance.task, card.provenance.stage) == (TASK, 2)
    assert card.provenance.notes.startswith("seq_ft: ")
    assert store.get(learned).config["r"] == 2
    assert origin.ids() == [first], "the store that it came from must not change"


def test_a_warm_start_has_an_option_of_its_own(origin: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"learn --from demonstrations --tasks {TASK} --start mine --store {origin.root} --json"
    assert main(command.split()) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "learn.cannot_start"
    assert "--warm.start" in error["fix"]
