"""What every policy must stand for its adapters to be swapped. Inherit `SwapSuite` and give its two fixtures.

A policy that keeps a copy or a slice of its weights, or computes its head around the LoRA layer, would go on running
the old adapter after a swap, with the new one's id on every action; each test here would show it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ratchet_vla.adapters.identity import Adapter, binding_of
from ratchet_vla.adapters.lora.layers import Lora, attach, lora_config
from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.swap.hotswap import HotSwapper
from ratchet_vla.policy.protocol import Policy

__all__ = ["SwapSuite"]


def noise(lora: Lora, policy: Policy, seed: int, only: str = "") -> Adapter:
    """A visible adapter: random A and B, in the layers whose name contains `only`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in lora.parameters.items():
        values = torch.randn(parameter.shape, generator=generator) * 0.3
        tensors[name] = (values if only in name else torch.zeros_like(values)).to(parameter.dtype)
    return Adapter(tensors, lora.config, binding_of(policy))


class SwapSuite:
    """The fixtures.

    make: a function that gives equal policies.
    answer: a function of a policy that gives its outputs as one float tensor with gradient, which moves with every
        weight (logits or log-probabilities, not chosen tokens).
    """

    head = "lm_head"
    tolerance = 1e-3  # of merging, relative to the adapter's own effect: rounding in the compute dtype

    def test_a_fresh_adapter_is_the_base(self, make: Callable[[], Policy], answer: Callable[[Policy], Tensor]) -> None:
        policy = make()
        before = answer(policy)
        attach(policy.module, lora_config(4, 4))
        assert torch.equal(answer(policy), before)
        assert policy.base_hash == make().base_hash  # the id of the base does not move with the layers

    def test_swaps_are_seen_and_exact(self, make: Callable[[], Policy], answer: Callable[[Policy], Tensor]) -> None:
        policy = make()
        base = answer(policy)
        lora = attach(policy.module, lora_config(4, 4))
        swapper = HotSwapper(policy, lora)
        seen = [base]
        for adapter in (noise(lora, policy, 1), noise(lora, policy, 2), noise(lora, policy, 3, only=self.head)):
            swapper.swap(adapter)
            other = make()
            attach(other.module, lora_config(4, 4)).load(adapter.tensors)
            assert torch.equal(answer(policy), answer(other))
            assert all(not torch.allclose(answer(policy), earlier) for earlier in seen)
            seen.append(answer(policy))
        swapper.rollback()
        assert torch.equal(answer(policy), seen[2])
        with lora.disabled():
            assert torch.equal(answer(policy), base)
        swapper.swap(BASE)
        assert torch.equal(answer(policy), base)

    @pytest.mark.parametrize("only", ["", "lm_head"])
    def test_merged_agrees_and_unmerged_is_exact(
        self, make: Callable[[], Policy], answer: Callable[[Policy], Tensor], only: str
    ) -> None:
        policy = make()
        base = answer(policy)
        lora = attach(policy.module, lora_config(4, 4))
        swapper = HotSwapper(policy, lora)
        swapper.swap(noise(lora, policy, 1, only=self.head if only else ""))
        unmerged = answer(policy)
        swapper.merge()
        error = float(((answer(policy) - unmerged).norm() / (unmerged - base).norm()).detach())
        assert error < self.tolerance
        swapper.unmerge()
        assert torch.equal(answer(policy), unmerged)

    def test_staging_and_its_canary_touch_nothing(
        self, make: Callable[[], Policy], answer: Callable[[Policy], Tensor]
    ) -> None:
        policy = make()
        lora = attach(policy.module, lora_config(4, 4))
        swapper = HotSwapper(policy, lora)
        swapper.swap(noise(lora, policy, 1))
        before = answer(policy)
        swapper.stage(noise(lora, policy, 2))
        assert torch.equal(answer(policy), before)
        swapper.merge()
        merged = answer(policy)
        staged = swapper.stage(noise(lora, policy, 2))  # the canary's base is the unmerged one
        assert torch.equal(answer(policy), merged)
        swapper.unmerge()
        report = swapper.commit(staged)
        assert report.new_id == staged.id

    def test_every_adapted_layer_gets_a_gradient(
        self, make: Callable[[], Policy], answer: Callable[[Policy], Tensor]
    ) -> None:
        policy = make()
        lora = attach(policy.module, lora_config(4, 4))
        assert any(self.head in path for path in lora.layers)
        lora.load(noise(lora, policy, 1).tensors)
        answer(policy).square().sum().backward()  # type: ignore[no-untyped-call]
        still = [name for name, p in lora.parameters.items() if p.grad is None or not bool(p.grad.any())]
        assert still == []
