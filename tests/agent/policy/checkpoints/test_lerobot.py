"""SmolVLA, pi0 and pi0.5 number for number as LeRobot computes them, from LeRobot's own files.

The path matters because users bring these checkpoints and a wrong position, scale or order only makes a robot miss.
Pinned: actions, training loss and real-time chunking of LeRobot's classes for tiny random configurations
(tests/golden/flow, made by tests/golden/make), prompts, statistics, and the code of each file that is broken.
Determinism: fixed files, weights from their names, float32.
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
from torch import Tensor

from ratchet_vla.contract import CameraSpec, RobotContract, StateField, compatibility
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints import lerobot
from ratchet_vla.policy.flow import rtc
from ratchet_vla.policy.flow import sde as flow_sde
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.protocol import Policy, PolicyInput
from tests.agent.policy import samples
from tests.agent.policy.flow.test_policy import FlowConformance
from tests.golden.fill import fill_all

GOLDEN = samples.ROOT / "tests/golden/flow"
KINDS = ("smolvla", "pi0", "pi05")
TASKS = ["pick up the bowl", "Open the drawer of the cabinet", "push_the button"]
GOAL = 1e-5


def contract() -> RobotContract:
    """The robot of the golden data: two cameras, five state values, Meta-World's actions as they are commanded."""
    base = RobotContract.load(samples.ROOT / "robots/metaworld.yaml")
    dims = tuple(dataclasses.replace(d, command_scale=1.0) for d in base.action.dims)
    return dataclasses.replace(
        base,
        cameras=(CameraSpec("front", 40, 24), CameraSpec("side", 40, 24)),
        state=(StateField("joints", 5, "rad"),),
        action=dataclasses.replace(base.action, dims=dims),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LeRobot's folders, with the weights that their names stand for."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("lerobot") / kind
        shutil.copytree(GOLDEN / kind, folder)
        weights = fill_all(json.loads((folder / "shapes.json").read_text()))
        save_file({k: torch.from_numpy(v) for k, v in weights.items()}, folder / "model.safetensors")
        shutil.copy(GOLDEN / "tokenizer.json", folder)
        found[kind] = folder
    return found


def load(folder: Path, **changes: Any) -> FlowPolicy:
    options: dict[str, Any] = {"contract": contract(), "cameras": ["front", "side"], "state": ["joints"]}
    if (folder / "vlm").is_dir():
        options["vlm"] = folder / "vlm"
    return lerobot.load(folder, **{**options, **changes})


def observations(kind: str) -> tuple[PolicyInput, dict[str, Tensor]]:
    io = load_file(GOLDEN / kind / "io.safetensors")
    images = torch.stack([io[f"observation.images.{name}"] for name in ("front", "side")], 1)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
    return PolicyInput(pixels, io["observation.state"], TASKS), io


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("dtype", "goal"), [("float32", GOAL), ("bfloat16", 0.03)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_actions_loss_and_chunking_are_lerobots(folders: dict[str, Path], kind: str, dtype: str, goal: float) -> None:
    policy = load(folders[kind])
    batch, io = observations(kind)
    with policy.computing_in(dtype):
        prefix = policy.prefix(batch)
        velocity = policy.velocity(prefix)
        assert error(flow_sde.integrate(velocity, io["noise"], 5)[..., :4], io["actions"]) < goal
        assert error(policy.predict(batch, noise=io["noise"]).actions, io["physical"]) < goal
        wanted = torch.nn.functional.pad(io["loss.actions"], (0, 4))
        assert error(flow_sde.matching_loss(velocity, wanted, io["noise"], io["loss.time"]), io["loss"]) < goal
        guide = rtc.Guide(io["rtc.previous"], delay=1, horizon=5, schedule="linear", limit=10.0)
        pulled = flow_sde.integrate(rtc.guided(velocity, guide), io["noise"], 5)[..., :4]
        assert error(pulled, io["rtc.actions"]) < goal
        # The test can fail: another schedule is far outside.
        other = dataclasses.replace(guide, schedule="ones")
        assert error(flow_sde.integrate(rtc.guided(velocity, other), io["noise"], 5)[..., :4], io["rtc.actions"]) > 1e-2


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_prompts_are_lerobots(folders: dict[str, Path], kind: str) -> None:
    policy = load(folders[kind])
    batch, io = observations(kind)
    _, ids, mask, _ = policy.inputs(batch)
    assert torch.equal(mask.sum(1), io["mask"].sum(1))
    assert torch.equal(ids * mask, io["ids"][:, : ids.shape[1]] * io["mask"][:, : ids.shape[1]])


class TestSmolVla(FlowConformance):
    @pytest.fixture
    def policy(self, folders: dict[str, Path]) -> FlowPolicy:
        return load(folders["smolvla"])

    @pytest.fixture
    def batch(self) -> PolicyInput:
        return observations("smolvla")[0]

    def test_images_that_do_not_fit_are_refused(self, policy: Policy, batch: PolicyInput) -> None:
        """Any size goes in, so other misfits alone are left."""
        images = torch.as_tensor(batch.images)
        for wrong in (images.float(), images[:-1], images.transpose(-1, -2), images[:, :1]):
            with pytest.raises(RatchetError) as refused:
                policy.predict(PolicyInput(wrong, batch.state, batch.instructions))
            assert refused.value.code == "policy.bad_input"


class TestPi0(TestSmolVla):
    @pytest.fixture
    def policy(self, folders: dict[str, Path]) -> FlowPolicy:
        return load(folders["pi0"])


class TestPi05(TestSmolVla):
    @pytest.fixture
    def policy(self, folders: dict[str, Path]) -> FlowPolicy:
        return load(folders["pi05"])


def test_what_the_checkpoint_says_is_kept(folders: dict[str, Path]) -> None:
    policy = load(folders["pi0"])
    assert policy.spec.chunk == 6
    assert policy.spec.image_size == 32
    assert policy.config.steps == 5
    assert (policy.config.language.heads, policy.config.language.groups, policy.config.language.head) == (8, 1, 4)
    assert compatibility(policy.spec, contract()) == []
    stats = load_file(next(folders["pi0"].glob("*unnormalizer_processor.safetensors")))
    assert policy.statistics.action_offset == pytest.approx(stats["action.mean"].tolist())
    half = load(folders["pi0"], dtype=torch.bfloat16)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    batch, io = observations("pi0")
    assert error(half.predict(batch, noise=io["noise"]).actions, io["physical"]) < 0.05
    scaled = contract()
    dims = tuple(dataclasses.replace(d, command_scale=0.5) for d in scaled.action.dims)
    half_scale = dataclasses.replace(scaled, action=dataclasses.replace(scaled.action, dims=dims))
    moved = load(folders["pi0"], contract=half_scale, gripper=(1.0, 0.0))
    assert moved.statistics.action_scale[0] == pytest.approx(0.5 * policy.statistics.action_scale[0])
    assert (moved.spec.gripper_open, moved.spec.gripper_closed) == (1.0, 0.0)


# Broken folders.


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / name).read_text())
    change(raw)
    (folder / name).write_text(json.dumps(raw))


def drop_statistic(folder: Path, name: str) -> None:
    path = next(folder.glob("*_unnormalizer_processor.safetensors"))
    save_file({k: v for k, v in load_file(path).items() if k != name}, path)


def drop_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


CASES: list[tuple[str, Callable[[Path], object], str]] = [
    ("type", lambda f: edit(f, "config.json", lambda r: r.update(type="act")), "policy.unsupported"),
    ("aloha", lambda f: edit(f, "config.json", lambda r: r.update(adapt_to_pi_aloha=True)), "policy.unsupported"),
    ("no type", lambda f: edit(f, "config.json", lambda r: r.pop("type")), "policy.bad_checkpoint"),
    ("no chunk", lambda f: edit(f, "config.json", lambda r: r.pop("chunk_size")), "policy.bad_checkpoint"),
    ("no config", lambda f: (f / "config.json").unlink(), "policy.bad_checkpoint"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "policy.bad_checkpoint"),
    ("no processor", lambda f: (f / "policy_postprocessor.json").unlink(), "policy.missing_statistics"),
    ("inert statistics", lambda f: drop_statistic(f, "action.std"), "policy.missing_statistics"),
    (
        "identity",
        lambda f: edit(
            f, "policy_postprocessor.json", lambda r: r["steps"][0]["config"]["norm_map"].update(ACTION="IDENTITY")
        ),
        "policy.missing_statistics",
    ),
    ("missing tensor", lambda f: drop_tensor(f, "model.action_in_proj.bias"), "policy.bad_checkpoint"),
    (
        "another robot",
        lambda f: edit(f, "config.json", lambda r: r["output_features"]["action"].update(shape=[7])),
        "policy.wrong_statistics",
    ),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "policy.no_checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_broken_folders_are_refused(
    folders: dict[str, Path], tmp_path: Path, change: Callable[[Path], object], code: str
) -> None:
    folder = shutil.copytree(folders["smolvla"], tmp_path / "broken")
    change(folder)
    with pytest.raises(RatchetError) as refused:
        load(folder)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"cameras": ["front"]}, "policy.wrong_cameras"),
        ({"cameras": ["front", "nowhere"]}, "contract.unknown_camera"),
        ({"state": []}, "policy.wrong_state"),
        ({"state": ["nothing"]}, "policy.wrong_state"),
        ({"tokenizer": "nobody/nothing"}, "policy.not_downloaded"),
    ],
)
def test_a_contract_that_does_not_fit_is_refused(folders: dict[str, Path], changes: dict[str, Any], code: str) -> None:
    with pytest.raises(RatchetError) as refused:
        load(folders["smolvla"], **changes)
    assert refused.value.code == code
