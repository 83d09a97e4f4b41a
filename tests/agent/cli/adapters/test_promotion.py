"""Promotion from the command line: the exit code is what a script at night acts on.

Pinned: 0 promoted, 3 held, 4 rejected; a stored decision is used only against the adapter that is active now; an
override is kept in the history with its reason; what cannot be simulated here is held and the card says why; rollback
and diff. Determinism: decisions are on the cards, nothing is simulated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ratchet_vla.adapters.protocol import Provenance
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli.main import main
from ratchet_vla.learner.gate.decision import GateConfig, decide
from ratchet_vla.testing.tiny_policy import made
from tests.agent.learner.gate.test_decision import NEW, pair


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    made_store = FolderStore(tmp_path / "adapters", create=True)
    for seed in (1, 2):
        made_store.put(made(seed), Provenance(task="new", stage=seed))
    made_store.promote(made(1).id)
    made_store.tag("candidate", made(2).id)
    return made_store


def decided(store: FolderStore, decision: str) -> None:
    earlier = {"promote": (40, 0, 0, 10), "hold": (40, 4, 1, 5), "reject": (30, 10, 1, 9)}[decision]
    stored = decide(made(2).id, made(1).id, [NEW, pair("earlier", *earlier)], GateConfig())
    assert stored.decision == decision
    store.annotate(made(2).id, {}, gate=stored.as_dict())


@pytest.mark.parametrize(("decision", "code"), [("promote", 0), ("hold", 3), ("reject", 4)])
def test_the_exit_code_is_the_decision(
    store: FolderStore, decision: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    decided(store, decision)
    assert main(["adapters", "promote", "candidate", "--store", str(store.root), "--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["decision"] == decision
    assert printed["promoted"] == (decision == "promote")
    assert store.tags()["active"] == made(2 if decision == "promote" else 1).id


def test_an_override_is_remembered(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    decided(store, "hold")
    command = ["adapters", "promote", "candidate", "--store", str(store.root), "--override", "seen on the arm"]
    assert main(command) == 0
    assert store.tags()["active"] == made(2).id
    assert "seen on the arm" in store.history("active")[-1].reason
    assert "gate.earlier_drop" in capsys.readouterr().out


def test_rollback_goes_back_to_what_was_active(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    decided(store, "promote")
    assert main(["adapters", "promote", "candidate", "--store", str(store.root)]) == 0
    assert main(["adapters", "rollback", "--store", str(store.root), "--reason", "hesitates", "--json"]) == 0
    assert store.tags()["active"] == made(1).id
    assert store.history("active")[-1].reason == "hesitates"


def test_after_a_first_promotion_the_way_back_is_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = FolderStore(tmp_path, create=True)
    candidate = store.put(made(1), Provenance(task="new")).id
    words = ["--store", str(tmp_path), "--json"]

    def told(*verb: str, code: int = 0) -> dict[str, Any]:
        assert main(["adapters", *verb, *words]) == code
        out: dict[str, Any] = json.loads(capsys.readouterr().out)
        return out

    # The morning after a night in which the gate held everything.
    assert told("show", "active")["id"] == "base"
    assert told("diff", "previous", "active") == {"cards": {}, "layers": []}
    assert told("list")["tags"] == {"active": "base"}
    assert told("rollback", code=2)["error"]["code"] == "adapter.no_previous"
    store.promote(candidate)
    between = told("diff", "previous", "active")
    assert between["cards"]["task"] == [None, "new"]
    assert all(layer["first"] == 0 < layer["second"] for layer in between["layers"])
    assert told("rollback")["new"] == "base"
    assert told("show", "active")["tags"] == ["active", "previous"]
    assert told("tag", "active", candidate)["old"] == "base"
    assert told("promote", "active", code=2)["error"]["code"] == "gate.same"
    assert main(["adapters", "list", "--store", str(tmp_path)]) == 0
    assert "previous" in capsys.readouterr().out


def test_promoting_the_active_adapter_is_refused(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "promote", "active", "--store", str(store.root), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "gate.same"


def test_diff_names_the_layers(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "diff", "active", "candidate", "--store", str(store.root), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["cards"]["stage"] == [1, 2]
    assert all(layer["difference"] > 0 for layer in printed["layers"])
    assert main(["adapters", "diff", "active", "candidate", "--store", str(store.root)]) == 0
    assert printed["layers"][0]["layer"] in capsys.readouterr().out


def test_what_cannot_be_simulated_is_held_and_the_card_says_so(
    store: FolderStore, capsys: pytest.CaptureFixture[str]
) -> None:
    # The cards name a task that no simulator here has; a task that somebody typed is refused instead.
    command = ["adapters", "promote", "candidate", "--store", str(store.root), "--json"]
    assert main(command) == 3
    printed = json.loads(capsys.readouterr().out)
    assert [r["code"] for r in printed["reasons"]] == ["gate.cannot_evaluate"]
    assert "'new'" in printed["reasons"][0]["text"]
    assert store.card("candidate").provenance.gate["decision"] == "hold"
    assert store.tags()["active"] == made(1).id
    assert main([*command, "--suite", "metawrld"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "sim.unknown_suite"


def test_a_verdict_under_laxer_demands_does_not_promote(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    lax = decide(made(2).id, made(1).id, [NEW, pair("earlier", 40, 4, 1, 5)], GateConfig(allowed_drop=0.5))
    assert lax.decision == "promote"
    store.annotate(made(2).id, {}, gate=lax.as_dict())
    assert main(["adapters", "promote", "candidate", "--store", str(store.root), "--json"]) == 3
    assert store.tags()["active"] == made(1).id
    capsys.readouterr()
