"""The compatibility report: what a checkpoint expects, what a robot gives, a code for each misfit, before any motion.

The path matters because it is the last look before an arm moves. Pinned: that fitting pairs fit in every form that is
read, that each kind of misfit and each broken folder has its own code and a fix, that no weights are read, and the
command's exit codes. Determinism: fixed files.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.lora.layers import attach, lora_config
from ratchet_vla.adapters.peft_format import export_folder, import_folder
from ratchet_vla.cli.main import main
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.policy.checkpoints import weights
from ratchet_vla.policy.images import Preparation
from ratchet_vla.policy.inspection import Report, Stated, inspect
from tests.agent.policy import samples
from tests.agent.policy.checkpoints.test_lerobot import contract as lerobot_contract
from tests.agent.policy.checkpoints.test_lerobot import folders as folders
from tests.agent.policy.checkpoints.test_openvla import LIBERO, with_parts
from tests.agent.policy.checkpoints.test_openvla import folder as folder

METAWORLD = samples.ROOT / "robots/metaworld.yaml"
OPENVLA = Stated(cameras=("agentview",), attention="causal", images=Preparation("lanczos3"))


def codes(report: Report, fatal: bool = True) -> list[str]:
    return [f.code for f in report.findings if f.fatal == fatal]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    checkpoint.save(samples.policy(), tmp_path / "small")
    return tmp_path / "small"


def robot() -> RobotContract:
    """Meta-World with the samples' image size."""
    base = RobotContract.load(METAWORLD)
    cameras = tuple(dataclasses.replace(c, width=32, height=32) for c in base.cameras)
    return dataclasses.replace(base, cameras=cameras)


def test_what_fits_fits_in_every_form(small: Path, folder: Path, folders: dict[str, Path]) -> None:
    own = inspect(small, robot())
    assert own.fits
    assert own.kind == "ratchet"
    assert own.expects["horizon"].startswith("2 actions")
    oft = inspect(folder, LIBERO, OPENVLA)
    assert oft.fits, oft.findings
    assert oft.kind == "openvla"
    assert codes(oft, fatal=False) == ["compat.gripper_translated"]
    for kind, made in folders.items():
        stated = Stated(
            cameras=("front", "side"), state=("joints",), vlm=str(made / "vlm") if kind == "smolvla" else ""
        )  # The golden statistics are of no robot, so their ranges are set aside.
        found = [c for c in codes(inspect(made, lerobot_contract(), stated)) if c != "compat.statistics_range"]
        assert found == []


def test_no_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(weights, "load_file", never)
    assert inspect(folder, LIBERO, OPENVLA).fits


def test_what_a_published_file_does_not_say_is_asked_for(folder: Path) -> None:
    report = inspect(folder, LIBERO)
    assert codes(report) == ["policy.attention_unstated"]
    assert "inspect.cameras_unstated" in codes(report, fatal=False)
    assert "--attention" in report.findings[0].fix


def test_another_robot_is_told_dimension_by_dimension(small: Path) -> None:
    report = inspect(small, LIBERO)
    found = codes(report)
    assert {"compat.camera_missing", "compat.state_missing", "compat.rotation", "compat.frame"} < set(found)
    assert all(f.fix for f in report.findings)
    assert not report.fits


def with_action(change: Callable[[Any], Any]) -> RobotContract:
    base = robot()
    return dataclasses.replace(base, action=dataclasses.replace(base.action, dims=change(base.action.dims)))


def test_statistics_of_another_unit_are_told(small: Path) -> None:
    """The policy moves up to 4 cm a step; this robot takes 2 mm, or 40 m."""
    tight = with_action(lambda dims: (dataclasses.replace(dims[0], low=-0.002, high=0.002), *dims[1:]))
    assert codes(inspect(small, tight)) == ["compat.statistics_range"]
    vast = with_action(lambda dims: (dataclasses.replace(dims[0], low=-40.0, high=40.0), *dims[1:]))
    report = inspect(small, vast)
    assert codes(report) == []
    assert codes(report, fatal=False) == ["compat.statistics_range"]


def test_a_camera_of_another_size_is_told(small: Path, folder: Path) -> None:
    assert codes(inspect(small, RobotContract.load(METAWORLD))) == ["compat.image_size"]
    cameras = tuple(dataclasses.replace(c, width=20, height=20) for c in LIBERO.cameras)
    report = inspect(folder, dataclasses.replace(LIBERO, cameras=cameras), OPENVLA)
    assert report.fits
    assert "compat.image_blown_up" in codes(report, fatal=False)


def test_a_regression_head_is_told(folder: Path, tmp_path: Path) -> None:
    state = ("eef_position", "eef_rotation", "gripper")
    report = inspect(with_parts(folder, tmp_path), LIBERO, dataclasses.replace(OPENVLA, state=state))
    assert report.fits, report.findings
    assert "policy.no_probabilities" in codes(report, fatal=False)


# Bad input.


def test_broken_folders_have_their_codes(folder: Path, tmp_path: Path) -> None:
    def broken(change: Callable[[Path], object]) -> Report:
        made = tmp_path / "broken"
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(folder, made)
        change(made)
        return inspect(made, LIBERO, OPENVLA)

    def edit(path: Path, change: Callable[[Any], object]) -> None:
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    def tensors(made: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        found = load_file(made / "model.safetensors")
        change(found)
        save_file(found, made / "model.safetensors")

    def cut(made: Path) -> None:
        data = (made / "model.safetensors").read_bytes()
        (made / "model.safetensors").write_bytes(data[: len(data) // 2])

    head = "language_model.lm_head.weight"
    cases: list[tuple[Callable[[Path], object], str]] = [
        (lambda f: (f / "config.json").unlink(), "policy.bad_checkpoint"),
        (lambda f: (f / "config.json").write_text("{"), "policy.bad_checkpoint"),
        (lambda f: (f / "config.json").write_text("[]"), "policy.bad_checkpoint"),
        (lambda f: (f / "tokenizer.json").unlink(), "policy.bad_checkpoint"),
        (cut, "policy.bad_checkpoint"),
        (lambda f: tensors(f, lambda t: t.pop(head)), "policy.bad_checkpoint"),
        (lambda f: tensors(f, lambda t: t.update({head: t[head][:, :3].contiguous()})), "policy.bad_checkpoint"),
        (lambda f: tensors(f, lambda t: t.update({head: t[head].to(torch.int8)})), "policy.wrong_dtype"),
        (lambda f: edit(f / "config.json", lambda r: r["text"].update(vocab_size=32128)), "policy.wrong_vocabulary"),
        (lambda f: edit(f / "config.json", lambda r: r.update(norm_stats={})), "policy.missing_statistics"),
    ]
    for change, code in cases:
        report = broken(change)
        assert code in codes(report), (code, report.findings)
    with pytest.raises(RatchetError) as refused:
        inspect("nobody/nothing", LIBERO)
    assert refused.value.code == "policy.not_downloaded"


def test_an_adapter_for_a_base_and_a_base_for_an_adapter(small: Path, tmp_path: Path) -> None:
    policy = samples.policy()
    lora = attach(policy.module, lora_config(2, 2))
    export_folder(lora.adapter(binding_of(policy)), tmp_path / "adapter")
    assert codes(inspect(tmp_path / "adapter", robot())) == ["policy.is_adapter"]
    with pytest.raises(RatchetError) as refused:
        checkpoint.load(tmp_path / "adapter")
    assert refused.value.code == "policy.is_adapter"
    with pytest.raises(RatchetError) as refused:
        import_folder(small, binding_of(policy))
    assert refused.value.code == "adapter.is_base"


def test_the_command_tells_by_its_exit_code(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small), "--robot", str(METAWORLD), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["findings"][0]["code"] == "compat.image_size"
    text = METAWORLD.read_text().replace("width: 96, height: 96", "width: 32, height: 32")
    (tmp_path / "robot.yaml").write_text(text)
    assert main(["inspect", str(small), "--robot", str(tmp_path / "robot.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "fits" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert main(["inspect", "nobody/nothing", "--robot", str(METAWORLD)]) == 2
