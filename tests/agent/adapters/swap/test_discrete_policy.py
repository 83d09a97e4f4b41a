"""Adapters on the real policy class: its head is computed row by row around the LoRA layer, which is easy to get wrong.

Pinned: the swap conformance suite on a small PrismaticPolicy, in float32 and under bfloat16 autocast; PEFT's own model
gives the same hidden states from the same stored files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.lora.layers import attach, lora_config
from ratchet_vla.adapters.peft_format import export_folder
from ratchet_vla.contract import RobotContract
from ratchet_vla.policy.discrete.action_tokens import Statistics
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.discrete.text import train_tokenizer
from ratchet_vla.policy.presets import small, spec_for
from ratchet_vla.policy.protocol import PolicyInput
from ratchet_vla.testing.conformance.swap import SwapSuite, noise

ROBOT = Path(__file__).parents[4] / "robots" / "metaworld.yaml"
TOKENIZER = train_tokenizer(["open the drawer", "pick up the object"], 300)


def prismatic(compute_dtype: str = "float32", q99: float = 0.5) -> PrismaticPolicy:
    contract = RobotContract.load(ROBOT)
    units = tuple(d.unit for d in contract.action.dims)
    statistics = Statistics("test", units, (-0.5,) * len(units), (q99,) * len(units), (True,) * len(units))
    spec = spec_for(contract, cameras=[contract.cameras[0].name], state=[], chunk=2, statistics_key="test")
    size = contract.cameras[0].height
    config = small(image_size=size, hidden=64, layers=2, heads=2, channels=(8, 8, 16, 16), compute_dtype=compute_dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PrismaticPolicy(config, spec, statistics, TOKENIZER)


def observation(policy: PrismaticPolicy) -> PolicyInput:
    size = policy.spec.image_size
    images = torch.randint(0, 256, (1, 1, size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return PolicyInput(images, None, ["open the drawer"])


class TestFloat32(SwapSuite):
    @pytest.fixture
    def make(self) -> Callable[[], PrismaticPolicy]:
        return prismatic

    @pytest.fixture
    def answer(self) -> Callable[[PrismaticPolicy], Tensor]:
        return lambda policy: policy.logits(observation(policy))


class TestBfloat16(TestFloat32):
    tolerance = 0.2

    @pytest.fixture
    def make(self) -> Callable[[], PrismaticPolicy]:
        return lambda: prismatic("bfloat16")


def test_peft_runs_the_exported_adapter_with_equal_logits(tmp_path: Path) -> None:
    policy = prismatic()
    lora = attach(policy.module, lora_config(4, 8))
    adapter = noise(lora, policy, 1)
    lora.load(adapter.tensors)
    export_folder(adapter, tmp_path)
    peft_policy = prismatic()
    peft_policy.network = peft.PeftModel.from_pretrained(peft_policy.network, str(tmp_path)).base_model.model.eval()
    assert torch.equal(peft_policy.logits(observation(peft_policy)), policy.logits(observation(policy)))


def test_the_binding_follows_statistics_and_spec() -> None:
    first = binding_of(prismatic())
    second = binding_of(prismatic(q99=0.6))
    assert first.statistics_hash == binding_of(prismatic()).statistics_hash
    assert first.statistics_hash != second.statistics_hash
    assert first.base_hash != second.base_hash
    assert first.action_space_hash == second.action_space_hash
