"""A night that taught nothing must not look like one that did: somebody promotes what it left.

Pinned: a run in which every group ended alike says so, leaves no candidate and exits 1, also where it is resumed, while
a task that did learn leaves its candidate; files of another form are refused in words where demonstrations are meant; a
wrong base is called so by the verbs; one's own base is planned. Deterministic: seeds; groups of one teach nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from ratchet_sim import registry
from ratchet_sim.demonstrations import Demonstrations
from ratchet_vla import paths
from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.lora.layers import attach, lora_config
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli.main import main
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.learner.sequence import SequentialRun, Stop
from ratchet_vla.learner.update.step import UpdateConfig
from ratchet_vla.policy.checkpoints import adopted
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.runtime.inference.server import open_prismatic
from ratchet_vla.testing.conformance.swap import noise
from tests.agent.learner.runs import CONFIG, start
from tests.agent.policy import samples
from tests.agent.policy.checkpoints.test_adopted import STATED
from tests.agent.policy.checkpoints.test_openvla import LIBERO
from tests.agent.policy.checkpoints.test_openvla import folder as folder

# Groups of one episode: nothing to compare it with, whatever it did.
ALONE = dataclasses.replace(
    CONFIG, group_size=1, evaluation_episodes=0, update=UpdateConfig(algorithm="grpo", learning_rate=1e-2)
)


def test_a_run_that_learned_nothing_leaves_no_candidate(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []

    def watch(kind: str, facts: dict[str, Any]) -> None:
        if kind == "stage":
            told.append(facts)
        elif kind == "update" and facts["stage"] == 2 and not done:
            done.append(True)
            raise Stop

    done: list[bool] = []
    with pytest.raises(Stop):
        start(tmp_path, watch, ALONE)
    run = start(tmp_path, watch, ALONE)
    assert [(f["task"], f["learned"], f["effect"]) for f in told] == [
        ("door-open", False, 0),
        ("faucet-open", False, 0),
    ]
    assert set(run.unlearned) == set(CONFIG.tasks)
    assert all(run.unlearned.values())
    store = FolderStore(tmp_path / "adapters")
    assert (store.tags(), store.ids(), run.adapter_ids) == ({}, [], ["", "", ""])


def test_what_did_learn_keeps_its_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second task teaches nothing: the candidate stays what the first one left."""
    original = SequentialRun._learn

    def learn(self: SequentialRun, name: str) -> None:
        if name == CONFIG.tasks[1]:
            self.update, self.skipped = self.config.updates, "every group was unanimous"
        original(self, name)

    monkeypatch.setattr(SequentialRun, "_learn", learn)
    run = start(tmp_path, lambda *_: None, dataclasses.replace(CONFIG, evaluation_episodes=0))
    store = FolderStore(tmp_path / "adapters")
    assert run.unlearned == {CONFIG.tasks[1]: "every group was unanimous"}
    assert store.card("candidate").provenance.task == CONFIG.tasks[0]
    assert [m.reason for m in store.history("candidate")] == [f"after {CONFIG.tasks[0]}"]


def test_the_command_says_so_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["learn", "--tasks", "faucet-open", "--out", str(tmp_path), "--updates", "1", "--groups", "2"]
    words += ["--group-size", "1", "--horizon", "10", "--evaluation-episodes", "0", "--workers", "1", "--slots", "2"]
    assert main([*words, "--no-videos"]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "nothing was learned on faucet-open" in told
    assert "no candidate was left" in told
    store = FolderStore(tmp_path / "adapters")
    assert (store.tags(), store.ids()) == ({}, [])
    (row,) = json.loads((tmp_path / "adapters.json").read_text())
    assert (row["stage"], row["task"], row["id"], row["effect"]) == (1, "faucet-open", "", 0.0)
    assert main(["adapters", "promote", "--store", str(tmp_path / "adapters"), "--override", "why not"]) == 2
    assert "adapter.unknown" in capsys.readouterr().err


def _hdf5(path: Path) -> Path:
    with h5py.File(path / "demos.hdf5", "w") as file:
        file["data/demo_0/actions"] = np.zeros((3, 4))
    return path / "demos.hdf5"


def _store(path: Path) -> Path:
    EpisodeStore(path / "episodes", create=True).index.append([("rule", {"second_reader": 0.0})])
    return path / "episodes"


def _plain(path: Path) -> Path:
    (path / "notes.txt").write_text("not weights")
    return path / "notes.txt"


def _weights(path: Path) -> Path:
    save_file({"weight": np.zeros(3, np.float32)}, path / "model.safetensors")
    return path / "model.safetensors"


def _other_robot(path: Path) -> Path:
    made = Demonstrations(
        images=np.zeros((3, 2, 8, 8, 3), np.uint8),
        state=np.zeros((3, 8), np.float32),
        actions=np.zeros((3, 8, 7), np.float32),
        task=np.zeros(3, np.int64),
        start=np.zeros(3, np.int64),
        tasks=["faucet-open"],
        instructions=["open it"],
    )
    made.save(path / "demonstrations.safetensors")
    return path / "demonstrations.safetensors"


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (_hdf5, "learn.not_demonstrations", "an HDF5 file"),
        (_store, "learn.not_demonstrations", "a store of episodes"),
        (_plain, "learn.not_demonstrations", "no demonstrations are in it"),
        (_weights, "learn.not_demonstrations", "no demonstrations are in it"),
        (_other_robot, "learn.other_demonstrations", "(2, 8, 8, 7)"),
        (lambda path: path / "absent", "learn.no_demonstrations", "no such file"),
    ],
)
def test_what_is_no_demonstration_is_refused_in_words(
    make: Callable[[Path], Path], code: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["learn", "--from", "demonstrations", "--tasks", "faucet-open", "--out", str(tmp_path / "out")]
    assert main([*words, "--warm.files", str(make(tmp_path)), "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], says in error["what"]) == (code, True)
    assert error["fix"]


def test_the_wrong_base_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The store's adapters were trained on another base than the one that the verb opens without --policy."""
    other = samples.policy()
    lora = attach(other.module, lora_config(4, 4))
    store = FolderStore(tmp_path, create=True)
    store.promote(store.put(noise(lora, other, 1)).id)
    assert binding_of(other).base_hash
    for verb in (["run", "--task", "door-open"], ["eval", "--tasks", "door-open"]):
        assert main([*verb, "--store", str(tmp_path), "--adapter", "active", "--json"]) == 2
        error = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["error"]
        assert (error["code"], "--policy" in error["fix"]) == ("adapter.wrong_base", True)


def test_a_base_of_another_architecture_is_called_a_wrong_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layers have other names, so that the adapter could not even be laid on it; both bases are named."""
    other, flow = samples.policy(), paths.MODELS / "small-metaworld-flow"
    lora = attach(other.module, lora_config(4, 4, r"projector\.fc[12]"))
    store = FolderStore(tmp_path, create=True)
    store.promote(store.put(noise(lora, other, 1)).id)
    given = ["--policy", str(flow), "--store", str(tmp_path), "--adapter", "active", "--json"]
    for verb in (["run", "--task", "door-open"], ["eval", "--tasks", "door-open"]):
        assert main([*verb, *given]) == 2
        error = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["error"]
        assert error["code"] == "adapter.wrong_base"
        assert other.base_hash[:12] in error["what"]
        assert adopted.load(flow, "cpu").base_hash[:12] in error["what"]
        assert "small-metaworld-flow" in error["where"]
    # The base alone runs beside such a store.
    assert open_prismatic({"policy": str(flow), "store": str(tmp_path)}, registry.contract_for("metaworld")).adapter_id


def test_ones_own_base_is_planned(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = samples.policy()
    checkpoint.save(mine, tmp_path / "mine")
    adopted.adopt(folder, LIBERO, STATED, tmp_path / "adopted")
    for place in ("mine", "adopted"):
        assert main(["plan", "--base", str(tmp_path / place), "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        policy = adopted.load(tmp_path / place)
        assert made["parameters"] == sum(p.numel() for p in policy.network.parameters())
        assert made["options"]["images"] == len(policy.spec.cameras)
    assert main(["plan", "--base", str(tmp_path / "mine")]) == 0
    assert "24 GB: fits" in capsys.readouterr().out
    assert main(["plan", "--base", str(folder), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "policy.not_adopted"
    assert main(["plan", "--base", "none", "--json"]) == 2
    assert "a base's folder" in json.loads(capsys.readouterr().out)["error"]["fix"]
