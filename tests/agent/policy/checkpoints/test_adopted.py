"""Published checkpoints under a folder's name: what is stated once, every command opens, and nothing else opens.

The path matters because a checkpoint that only Python can open is no use at a robot, and one that is opened with
something unstated moves wrongly without an error. Pinned: equal policies through the record, the policy's process on
images of the camera's own size, the check of the attention mask on recorded frames, and each refusal's code with
nothing written. Determinism: fixed files.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ratchet_sim import registry
from ratchet_vla.cli.main import main
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints import adopted
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.policy.checkpoints.adopted import Stated
from ratchet_vla.policy.discrete import masks
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.images import Preparation
from ratchet_vla.policy.inspection import inspect
from ratchet_vla.runtime.inference.server import open_prismatic
from ratchet_vla.testing.conformance.policy import rows
from tests.agent.episodes.samples import episode
from tests.agent.policy import samples
from tests.agent.policy.checkpoints import test_lerobot as lerobot_tests
from tests.agent.policy.checkpoints.test_lerobot import folders as folders
from tests.agent.policy.checkpoints.test_openvla import LIBERO
from tests.agent.policy.checkpoints.test_openvla import folder as folder
from tests.agent.policy.checkpoints.test_openvla import load as load_openvla

ROBOT = str(samples.ROOT / "robots/libero.yaml")
STATED = Stated(cameras=("agentview",), attention="causal", images=Preparation("bicubic"))


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(RatchetError) as refused:
        call()
    assert refused.value.fix
    return refused.value.code


def asked(folder: Path, out: Path, *more: str) -> list[str]:
    cameras = ["--cameras", "agentview", "--images", "bicubic"]
    return ["adopt", str(folder), "--robot", ROBOT, *cameras, "--out", str(out), *more]


def test_the_command_takes_a_checkpoint_into_use(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "oft"
    assert main(asked(folder, out)) == 1  # the mask is not stated
    assert not out.exists()
    assert main(asked(folder, out, "--attention", "causal")) == 0
    assert "adopted" in capsys.readouterr().out
    policy = adopted.load(out)
    assert isinstance(policy, PrismaticPolicy)
    expected = load_openvla(folder, decoding="parallel", images=Preparation("bicubic"))
    assert policy.base_hash == expected.base_hash
    # The policy's process takes the camera's own images and the robot's gripper.
    server = open_prismatic({"policy": str(out)}, LIBERO)
    camera = LIBERO.camera("agentview")
    image = np.random.default_rng(0).integers(0, 256, (camera.height, camera.width, 3), np.uint8)
    assert image.shape[0] != policy.spec.image_size
    answer = server.infer([image], np.zeros(0, np.float32), "open the drawer", 0.0, None, None)
    assert answer.actions.shape == (policy.spec.chunk, 7)
    # Inspected again, it answers with what was stated, for any robot.
    assert inspect(out, LIBERO).fits
    other = inspect(out, RobotContract.load(samples.ROOT / "robots/metaworld.yaml"))
    assert "compat.camera_missing" in [f.code for f in other.findings]


@pytest.mark.parametrize("kind", lerobot_tests.KINDS)
def test_every_form_opens_as_its_loader_opens_it(
    folders: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = folders[kind]
    monkeypatch.chdir(made)  # what is named relative to here is found from everywhere
    stated = Stated(
        cameras=("front", "side"), state=("joints",), tokenizer="tokenizer.json", vlm="vlm" if kind == "smolvla" else ""
    )
    adopted.adopt(made, lerobot_tests.contract(), stated, tmp_path / kind)
    monkeypatch.chdir(tmp_path)
    policy, expected = adopted.load(tmp_path / kind), lerobot_tests.load(made)
    assert policy.base_hash == expected.base_hash
    batch = rows(lerobot_tests.observations(kind)[0], [0])
    assert torch.equal(policy.predict(batch).actions, expected.predict(batch).actions)


def test_the_type_in_memory_is_kept_where_the_device_computes_in_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopted.adopt(folder, LIBERO, dataclasses.replace(STATED, dtype="bfloat16"), tmp_path / "a")
    ids = set()
    for name in ("bfloat16", "float32"):
        monkeypatch.setenv("RATCHET_DTYPE", name)
        policy = adopted.load(tmp_path / "a")
        assert {p.dtype for p in policy.network.parameters()} == {getattr(torch, name)}
        ids.add(policy.base_hash)
    assert len(ids) == 1


def store_of(root: Path, contract: RobotContract = LIBERO) -> Path:
    store = EpisodeStore(root / "episodes", create=True)
    write_episode(root / "a.mcap", episode(contract, steps=3, ticks=False), contract)
    store.copy_in(root / "a.mcap")
    return root / "episodes"


def test_the_mask_is_checked_on_recorded_frames(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--attention", "causal", "--frames", str(store_of(tmp_path)), "--json"]
    assert main(asked(folder, tmp_path / "one", *given)) == 0
    assert json.loads(capsys.readouterr().out)["attention"]["fits"] is None  # random weights are sure of nothing
    monkeypatch.setattr(masks, "check", lambda *_: masks.MaskReport("causal", -5.0, -0.1))
    assert main(asked(folder, tmp_path / "two", *given)) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "policy.attention_mismatch"
    assert not (tmp_path / "two").exists()
    (tmp_path / "other").mkdir()
    given[3] = str(store_of(tmp_path / "other", registry.contract_for("metaworld")))
    assert main(asked(folder, tmp_path / "two", *given)) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "policy.no_frames"


def test_what_is_no_published_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    checkpoint.save(samples.policy(), own)
    assert adopted.load(own).base_hash == checkpoint.load(own).base_hash
    assert code_of(lambda: adopted.load(folder)) == "policy.not_adopted"
    assert code_of(lambda: adopted.adopt(own, LIBERO, STATED, tmp_path / "a")) == "policy.not_published"
    assert code_of(lambda: adopted.adopt(folder, LIBERO, STATED, own)) == "policy.exists"
    assert code_of(lambda: adopted.adopt("nobody/nothing", LIBERO, STATED, tmp_path / "a")) == "policy.not_downloaded"
    assert not (tmp_path / "a").exists()
    assert main([*asked(folder, tmp_path / "a", "--attention", "causal")[:4], "--attention", "causal"]) == 2


def test_other_weights_than_those_adopted_are_refused(folder: Path, tmp_path: Path) -> None:
    made = shutil.copytree(folder, tmp_path / "published")
    adopted.adopt(made, LIBERO, STATED, tmp_path / "a")
    with (made / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert code_of(lambda: adopted.load(tmp_path / "a")) == "policy.changed_checkpoint"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "kind": "openvla"}', '{"format": 1, "kind": "act"}'])
def test_a_malformed_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / adopted.RECORD).write_text(text)
    assert code_of(lambda: adopted.load(tmp_path)) == "policy.bad_checkpoint"
