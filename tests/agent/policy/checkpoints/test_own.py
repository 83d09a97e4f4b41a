"""A policy on disk: what comes back must be the same policy, and anything else must not come back at all.

A checkpoint that loads with a missing tensor or without its statistics drives a robot with noise. Pinned: bitwise round
trip and equal base hash, published tensors that nothing depends on, every kind of damage with its code. Files are
written by the code under test and damaged by hand.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ratchet_vla.adapters.lora.layers import attach, lora_config
from ratchet_vla.adapters.swap.hotswap import HotSwapper
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.testing.conformance.swap import noise
from tests.agent.policy import samples


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    checkpoint.save(samples.policy(), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def code_of(folder: Path) -> str:
    with pytest.raises(RatchetError) as refused:
        checkpoint.load(folder)
    assert str(folder) in refused.value.where  # it says which file
    return refused.value.code


def test_the_round_trip_is_exact(folder: Path) -> None:
    policy, again = samples.policy(), checkpoint.load(folder)
    mine, theirs = policy.base_tensors(), again.base_tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert again.base_hash == policy.base_hash
    assert (again.config, again.spec, again.statistics) == (policy.config, policy.spec, policy.statistics)
    batch = samples.batch(policy)
    assert isinstance(again, PrismaticPolicy)
    assert torch.equal(again.logits(batch), policy.logits(batch))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_saving_over_a_policy_replaces_it(folder: Path) -> None:
    other = samples.policy(seed=5)
    checkpoint.save(other, folder)
    assert checkpoint.load(folder).base_hash == other.base_hash


def test_an_adapter_does_not_enter_the_base(tmp_path: Path) -> None:
    policy = samples.policy()
    lora = attach(policy.module, lora_config(4, 4))
    swapper = HotSwapper(policy, lora)
    swapper.swap(noise(lora, policy, 1))
    checkpoint.save(policy, tmp_path)
    assert checkpoint.load(tmp_path).base_hash == samples.policy().base_hash
    swapper.merge()
    with pytest.raises(RatchetError) as refused:
        checkpoint.save(policy, tmp_path / "merged")
    assert refused.value.code == "policy.merged"
    assert not (tmp_path / "merged" / "config.json").exists()


def test_loading_other_tensors_moves_the_hash() -> None:
    policy, other = samples.policy(), samples.policy(seed=1)
    before = policy.base_hash
    checkpoint.load_tensors(policy, other.base_tensors(), "memory")
    assert policy.base_hash == other.base_hash != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert code_of(folder) == "policy.bad_checkpoint"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[]", b"null", b"{}"])
def test_a_file_of_something_else_is_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert code_of(folder) == "policy.bad_checkpoint"


def test_a_truncated_weight_file_is_refused_wherever_it_ends(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        assert code_of(folder) == "policy.bad_checkpoint", length
    weights.write_bytes(whole + b"\0")
    assert code_of(folder) == "policy.bad_checkpoint"


def drop(tensors: dict[str, Tensor]) -> None:
    tensors.pop("placeholders")


def add(tensors: dict[str, Tensor]) -> None:
    tensors["value_head.weight"] = torch.zeros(3)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["placeholders"] = tensors["placeholders"].t().contiguous()


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["language_model.model.norm.scale"] = tensors.pop("language_model.model.norm.weight")


def spoil(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["projector.fc1.bias"][3] = value

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (drop, "missing (placeholders"),
        (add, "extra (value_head.weight"),
        (reshape, "of another shape (placeholders"),
        (rename, "missing (language_model.model.norm.weight"),
        (spoil(float("nan")), "not finite: projector.fc1.bias"),
        (spoil(float("-inf")), "not finite: projector.fc1.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, Tensor]], None], word: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RatchetError) as refused:
        checkpoint.load(folder)
    assert refused.value.code == "policy.bad_checkpoint"
    assert word in refused.value.what


def test_a_refused_file_changes_nothing() -> None:
    policy = samples.policy()
    before = {n: t.clone() for n, t in policy.base_tensors().items()}
    tensors = {n: t + 1 for n, t in before.items()}
    spoil(float("nan"))(tensors)
    with pytest.raises(RatchetError):
        checkpoint.load_tensors(policy, tensors, "memory")
    after = policy.base_tensors()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda raw: raw.update(format=2), "policy.bad_checkpoint"),
        (lambda raw: raw.pop("model"), "policy.bad_checkpoint"),
        (lambda raw: raw["model"].pop("attention"), "policy.bad_checkpoint"),
        (lambda raw: raw["model"].update(colour="red"), "policy.bad_checkpoint"),
        (lambda raw: raw["model"].update(attention="both"), "policy.bad_config"),
        (lambda raw: raw["model"]["vision_options"].update(depth=3), "policy.bad_config"),
        (lambda raw: raw["model"].update(vision="resnet"), "policy.unknown_vision_tower"),
        (lambda raw: raw["model"].update(layers=3), "policy.bad_checkpoint"),
        (lambda raw: raw.pop("policy"), "policy.bad_checkpoint"),
        (lambda raw: raw["policy"].pop("chunk"), "policy.bad_checkpoint"),
        (lambda raw: raw["policy"].update(colour="red"), "policy.bad_checkpoint"),
        (lambda raw: raw["policy"].update(bins=0), "policy.no_probabilities"),
        (lambda raw: raw.pop("statistics"), "policy.missing_statistics"),
        (lambda raw: raw.update(statistics=None), "policy.missing_statistics"),
        (lambda raw: raw.update(statistics=[1]), "policy.missing_statistics"),
        (lambda raw: raw["statistics"].pop("q01"), "policy.missing_statistics"),
        (lambda raw: raw["statistics"]["q99"].pop(), "policy.missing_statistics"),
        (lambda raw: raw["statistics"].pop("state_mean"), "policy.missing_statistics"),
        (lambda raw: raw["statistics"].update(key="other"), "policy.wrong_statistics"),
    ],
)
def test_configurations_that_are_refused(folder: Path, change: Callable[[dict[str, Any]], Any], code: str) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(RatchetError) as refused:
        checkpoint.load(folder)
    assert refused.value.code == code


def test_published_tensors_without_effect_may_be_there_or_not() -> None:
    from benchmarks.science import parity_oft

    tensors = load_file(samples.GOLDEN / "model.safetensors")
    policy: PrismaticPolicy = parity_oft.build(samples.GOLDEN, "causal")[0]
    idle = [name for name in tensors if name not in policy.base_tensors()]
    assert len(idle) > 10
    checkpoint.load_tensors(policy, {n: t for n, t in tensors.items() if n not in idle}, "memory")
    with pytest.raises(RatchetError) as refused:
        checkpoint.load_tensors(policy, {**tensors, "vision_backbone.featurizer.blocks.7.x": torch.zeros(1)}, "memory")
    assert "extra" in refused.value.what


def test_a_narrower_dtype_is_stored_and_read_as_float32(tmp_path: Path) -> None:
    policy = samples.policy()
    checkpoint.save(policy, tmp_path, dtype=torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "model.safetensors").values())
    again = checkpoint.load(tmp_path)
    for name, tensor in again.base_tensors().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, policy.base_tensors()[name].bfloat16().float())
