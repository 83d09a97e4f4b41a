"""The published OpenVLA-OFT action model, number for number, from its configuration and weights.

The path matters because nothing else tells a wrong crop, bin, sign, mask or norm from a right one: the robot would just
miss. Pinned: golden data computed by the published code (tests/golden), under each mask; that the other mask does NOT
pass; how a published folder is read, in shards too, and what is refused. Determinism: fixed files, float32.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.science import parity_oft
from ratchet_vla.contract import RobotContract, compatibility
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints import openvla as published
from ratchet_vla.policy.presets import openvla_oft_7b
from tests.agent.policy import samples

LIBERO = RobotContract.load(samples.ROOT / "robots/libero.yaml")
ARGUMENTS: dict[str, Any] = {"attention": "causal", "contract": LIBERO, "cameras": ["agentview"]}


@pytest.mark.parametrize(("file", "attention"), parity_oft.FILES.items())
def test_outputs_are_the_published_ones(file: str, attention: parity_oft.Attention) -> None:
    errors, different = parity_oft.compare(samples.GOLDEN, file, attention)
    assert different == 0
    assert len(errors) == 5
    assert all(error < parity_oft.GOAL for error in errors.values()), errors


@pytest.mark.parametrize(("file", "attention"), parity_oft.FILES.items())
def test_in_bfloat16_only_rounding_is_left(file: str, attention: parity_oft.Attention) -> None:
    errors, different = parity_oft.compare(samples.GOLDEN, file, attention, "bfloat16")
    assert different <= 4  # of 168: near ties; another mask changes a quarter of them
    assert all(parity_oft.GOAL < error < 0.05 for error in errors.values()), errors


@pytest.mark.parametrize(
    ("file", "attention"), [("io.safetensors", "causal"), ("io_causal.safetensors", "bidirectional")]
)
def test_the_other_mask_does_not_pass(file: str, attention: parity_oft.Attention) -> None:
    errors, different = parity_oft.compare(samples.GOLDEN, file, attention)
    assert different > 20  # of 168
    assert min(errors.values()) > 10 * parity_oft.GOAL


def test_the_benchmark_says_so_and_fails_on_a_miss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    assert parity_oft.main([str(samples.GOLDEN), "--output", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("parity_oft: ")
    assert json.loads(out.read_text())["different_tokens"] == 0
    folder = shutil.copytree(samples.GOLDEN, tmp_path / "wrong")
    (folder / "io_causal.safetensors").rename(folder / "io.safetensors")
    assert parity_oft.main([str(folder), "--output", str(out)]) == 1
    assert parity_oft.main([str(tmp_path), "--output", str(out)]) == 1
    assert "parity.missing_file" in capsys.readouterr().err


def edited(tmp_path: Path, change: Any) -> Path:
    raw = json.loads((samples.GOLDEN / "config.json").read_text())
    change(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


def test_statistics_become_physical_and_the_gripper_stays() -> None:
    found = published.read(samples.GOLDEN, **ARGUMENTS)
    raw = json.loads((samples.GOLDEN / "config.json").read_text())["norm_stats"]["libero_spatial_no_noops"]["action"]
    assert found.statistics.q99[0] == pytest.approx(raw["q99"][0] * 0.05)  # m
    assert found.statistics.q01[3] == pytest.approx(raw["q01"][3] * 0.5)  # rad
    assert found.statistics.mask == (True,) * 6 + (False,)
    assert (found.spec.gripper_open, found.spec.gripper_closed) == (1.0, 0.0)
    assert found.spec.chunk == 8
    assert found.first_action_id == 31744
    assert compatibility(found.spec, LIBERO) == []


def test_a_published_7b_configuration_is_the_preset(tmp_path: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        for name in ("vision", "text", "dtype", "action_chunk", "unnorm_key", "images"):
            raw.pop(name)
        raw.update(
            text_config={"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
            timm_model_ids=["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
            image_sizes=[224, 224],
            torch_dtype="bfloat16",
            pad_to_multiple_of=64,
            n_action_bins=256,
        )

    folder = edited(tmp_path, change)
    assert published.read(folder, **ARGUMENTS, chunk=8).config == openvla_oft_7b("causal")
    with pytest.raises(RatchetError) as refused:
        published.read(folder, **ARGUMENTS)
    assert "how long a chunk" in refused.value.what


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda raw: raw.pop("text"), "policy.bad_checkpoint"),
        (lambda raw: raw.pop("dtype"), "policy.bad_checkpoint"),
        (lambda raw: raw.update(dtype="float16"), "policy.bad_checkpoint"),
        (lambda raw: raw["text"].update(num_key_value_heads=2), "policy.bad_checkpoint"),
        (lambda raw: raw["text"].update(rope_scaling={"factor": 2}), "policy.bad_checkpoint"),
        (lambda raw: raw.update(n_action_bins=128), "policy.no_probabilities"),
        (lambda raw: raw.pop("norm_stats"), "policy.missing_statistics"),
        (lambda raw: raw.update(unnorm_key="other"), "policy.missing_statistics"),
        (lambda raw: raw["norm_stats"]["libero_spatial_no_noops"]["action"]["q01"].pop(), "policy.missing_statistics"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, change: Any, code: str) -> None:
    with pytest.raises(RatchetError) as refused:
        published.read(edited(tmp_path, change), **ARGUMENTS)
    assert refused.value.code == code


def test_a_folder_without_configuration_and_an_unknown_camera(tmp_path: Path) -> None:
    with pytest.raises(RatchetError) as refused:
        published.read(tmp_path, **ARGUMENTS)
    assert refused.value.code == "policy.bad_checkpoint"
    with pytest.raises(RatchetError) as refused:
        published.read(samples.GOLDEN, attention="causal", contract=LIBERO, cameras=["nowhere"])
    assert refused.value.code == "contract.unknown_camera"


def test_a_folder_in_shards_loads_as_a_policy(tmp_path: Path) -> None:
    tensors = load_file(samples.GOLDEN / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    shutil.copy(samples.GOLDEN / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text(samples.TOKENIZER.to_str())
    policy = published.load(tmp_path, **ARGUMENTS)
    whole = parity_oft.build(samples.GOLDEN, "causal")[0].base_tensors()
    mine = policy.base_tensors()
    assert mine.keys() == whole.keys()
    assert all(torch.equal(mine[name], whole[name]) for name in whole)
    for content in ('{"weight_map": {"a": "../model.safetensors"}}', "[]", "{"):
        index.write_text(content)
        with pytest.raises(RatchetError) as refused:
            published.load(tmp_path, **ARGUMENTS)
        assert refused.value.code == "policy.bad_checkpoint"
