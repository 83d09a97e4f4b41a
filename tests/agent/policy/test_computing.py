"""A device that emulates a dtype is twenty times slower; one that computes in another must leave every id as it is.

Pinned: who decides (the caller, the environment, torch, a clock), that a measurement is made once per machine and
remembered, that ids, greedy actions' file form and adapters are the same in every dtype, and that a batch is recomputed
in the dtype of the robot that sampled it, or refused by a code that names both.
"""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy import computing
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.protocol import PolicyInput
from tests.agent.policy import samples

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No choice of an earlier test, no measurement of an earlier process, nothing asked for."""
    monkeypatch.delenv(computing.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    computing._by_device.cache_clear()


def says(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)


def clocked(monkeypatch: pytest.MonkeyPatch, rates: dict[torch.dtype, float]) -> list[torch.dtype]:
    """Stands in for the clock; the list tells what was measured."""
    measured: list[torch.dtype] = []

    def speed(device: torch.device, dtype: torch.dtype) -> float:
        measured.append(dtype)
        return rates[dtype]

    monkeypatch.setattr(computing, "speed", speed)
    return measured


def test_without_instructions_nothing_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, False)
    choice = computing.choose(CPU, "bfloat16")
    assert choice.dtype == torch.float32
    assert "no bfloat16 instructions" in choice.reason


@pytest.mark.parametrize(("half", "chosen"), [(30.0, torch.float32), (95.0, torch.bfloat16), (200.0, torch.bfloat16)])
def test_a_clock_decides_where_torch_cannot_tell(
    monkeypatch: pytest.MonkeyPatch, half: float, chosen: torch.dtype
) -> None:
    says(monkeypatch, True)
    measured = clocked(monkeypatch, {torch.bfloat16: half, torch.float32: 100.0})
    assert computing.choose(CPU, "bfloat16").dtype == chosen
    assert len(measured) == 2
    computing._by_device.cache_clear()  # as another process
    again = computing.choose(CPU, "bfloat16")
    assert again.dtype == chosen
    assert f"{half:g} GFLOP/s" in again.reason
    assert len(measured) == 2
    (key,) = json.loads(computing.memory_file().read_text())
    assert computing.processor() in key
    assert torch.__version__ in key


def test_a_build_that_cannot_be_asked_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch without oneDNN, as some builds for aarch64: the operator is not there at all."""
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
    clocked(monkeypatch, {torch.bfloat16: 3.0, torch.float32: 50.0})
    choice = computing.choose(CPU, "bfloat16")
    assert choice.dtype == torch.float32
    assert "3 GFLOP/s" in choice.reason


def test_a_dtype_that_cannot_be_trained_in_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN on processors with AVX-VNNI-2 alone: bfloat16 forward, no backward."""
    says(monkeypatch, True)

    def speed(device: torch.device, dtype: torch.dtype) -> float:
        if dtype == torch.bfloat16:
            raise RuntimeError("DNNL does not support bf16/f16 backward on the platform with avx2_vnni_2")
        return 40.0

    monkeypatch.setattr(computing, "speed", speed)
    assert computing.choose(CPU, "bfloat16").dtype == torch.float32


def test_what_is_remembered_and_damaged_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, True)
    measured = clocked(monkeypatch, {torch.bfloat16: 1.0, torch.float32: 2.0})
    computing.memory_file().parent.mkdir(parents=True)
    computing.memory_file().write_text("[1, ")
    assert computing.choose(CPU, "bfloat16").dtype == torch.float32
    assert len(measured) == 2


def test_a_card_without_bfloat16_is_measured_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card of 2018")
    clocked(monkeypatch, {torch.float32: 4.0, torch.float16: 20.0})
    choice = computing.choose(torch.device("cuda:0"), "bfloat16")
    assert choice.dtype == torch.float16
    assert "a card of 2018" in choice.reason


def test_a_checkpoint_in_float32_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, True)
    assert computing.choose(CPU, "float32").dtype == torch.float32


def test_the_user_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, False)
    monkeypatch.setenv(computing.VARIABLE, "bfloat16")
    assert computing.choose(CPU, "float32").dtype == torch.bfloat16
    assert computing.choose(CPU, "bfloat16", "float32").dtype == torch.float32
    monkeypatch.setenv(computing.VARIABLE, "int4")
    with pytest.raises(RatchetError) as refused:
        computing.choose(CPU, "bfloat16")
    assert refused.value.code == "policy.no_dtype"


def test_the_clock_measures() -> None:
    assert computing.speed(CPU, torch.float32, seconds=0.02) > 0.01


@pytest.mark.parametrize("make", [samples.policy, samples.flow])
def test_ids_do_not_depend_on_it_and_outputs_hardly(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = set()
    log_probs: list[torch.Tensor] = []
    for name in ("float32", "bfloat16"):
        monkeypatch.setenv(computing.VARIABLE, name)
        policy = make("bfloat16")  # type: ignore[operator]
        assert policy.compute_dtype == computing.DTYPES[name]
        assert computing.name_of(policy) == name
        ids.add(policy.base_hash)
        batch = samples.batch(policy)
        noise = torch.full((len(batch), policy.spec.chunk, len(policy.spec.action_names)), 0.5)
        if not log_probs:
            tokens = policy.sample(batch, 1.0, noise).tokens
        log_probs.append(policy.log_prob(batch, tokens, 1.0)[0].detach())
    assert len(ids) == 1
    gap = (log_probs[0] - log_probs[1]).abs().mean()
    assert 0 < float(gap) < 0.5


def feature_of(policy: PrismaticPolicy, batch: PolicyInput) -> torch.Tensor:
    """(B, hidden): the feature of a prediction, which this policy always has."""
    feature = policy.predict(batch).feature
    assert feature is not None
    return feature


def test_a_policy_computes_as_somebody_else_did_and_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(computing.VARIABLE, "bfloat16")
    policy = samples.policy("bfloat16")
    batch = samples.batch(policy)
    there = feature_of(policy, batch)
    monkeypatch.setenv(computing.VARIABLE, "float32")
    here = feature_of(policy, batch)
    with computing.computing_as(policy, "bfloat16"):
        assert torch.equal(feature_of(policy, batch), there)
    assert torch.equal(feature_of(policy, batch), here)
    assert not torch.equal(here, there)
    with computing.computing_as(policy, ""):
        assert torch.equal(feature_of(policy, batch), here)


def test_who_cannot_compute_as_the_other_did_refuses_and_names_both() -> None:
    @dataclasses.dataclass
    class Fixed:
        compute_dtype: torch.dtype = torch.float32

    with pytest.raises(RatchetError) as refused, computing.computing_as(Fixed(), "bfloat16"):
        pass
    assert refused.value.code == "policy.other_dtype"
    assert "bfloat16" in refused.value.what
    assert "float32" in refused.value.what


def test_weights_stay_where_memory_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, False)
    policy = samples.policy("bfloat16")
    policy.network.bfloat16()
    policy.base_changed()
    whole = policy.base_hash
    monkeypatch.setattr(computing, "_free_bytes", lambda device: 1000)
    with pytest.raises(RatchetError) as refused, policy.computing_in("float32"):
        pass
    assert refused.value.code == "policy.no_memory"
    assert bool(np.isfinite(policy.predict(samples.batch(policy)).actions.numpy()).all())
    assert policy.compute_dtype == torch.bfloat16
    assert "GB more" in policy.choice.reason
    assert policy.base_hash == whole
