"""Linear layers around PEFT's LoRA: the policy computes them itself, row by row and several at once.

A path that forgets an adapter, its scale or that it is merged answers with another model's numbers and no error.
Pinned: equality with PEFT's own forward for every state of an adapter, for rows and for layers together, with
gradients; the hand-written gradients of norm and rotation against autograd's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from ratchet_vla.policy.layers.linear import fused_linear, linear
from ratchet_vla.policy.layers.trunk import RMSNorm, rope_mask, rotate


class Pair(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.one = nn.Linear(6, 10, bias=bias)
        self.two = nn.Linear(6, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], -1)


def adapted(bias: bool = False, targets: tuple[str, ...] = ("one", "two"), **options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=list(targets), init_lora_weights=False, rank_pattern={"two": 2}, **options
    )
    return get_peft_model(Pair(bias), config)


def two_adapters() -> PeftModel:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=1, target_modules=["one", "two"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged() -> PeftModel:
    model = adapted()
    model.merge_adapter()
    return model


def disabled() -> PeftModel:
    model = adapted()
    model.base_model.disable_adapter_layers()
    return model


def in_training_with_dropout() -> PeftModel:
    return adapted(lora_dropout=0.5).train()


STATES: dict[str, Callable[[], PeftModel]] = {
    "plain": adapted,
    "with a bias": lambda: adapted(bias=True),
    "one layer only": lambda: adapted(targets=("two",)),
    "two adapters": two_adapters,
    "merged": merged,
    "disabled": disabled,
    "DoRA": lambda: adapted(use_dora=True),
    "LoRA with a bias": lambda: adapted(lora_bias=True),
    "dropout": in_training_with_dropout,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("positions", [1, 300])  # few: one product; many: one for each layer
def test_equal_to_pefts_forward(state: str, positions: int) -> None:
    model = STATES[state]()
    pair = model.base_model.model
    x = torch.randn(2, positions, 6, requires_grad=True)

    def run(compute: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        torch.manual_seed(5)  # for dropout
        model.zero_grad()
        x.grad = None
        out = compute()
        out.sin().sum().backward()
        assert x.grad is not None
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return out.detach(), gradients, x.grad.clone()

    theirs, their_gradients, their_x = run(lambda: pair(x))
    apart = run(lambda: torch.cat([linear(pair.one, x), linear(pair.two, x)], -1))
    at_once = run(lambda: torch.cat(fused_linear([pair.one, pair.two], x), -1))
    for out, gradients, of_x in (apart, at_once):
        assert torch.allclose(out, theirs, atol=1e-5)
        assert torch.allclose(of_x, their_x, atol=1e-5)
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, their_gradients[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("state", [s for s in STATES if s != "dropout"])
def test_rows_are_the_full_layers_rows(state: str) -> None:
    pair = STATES[state]().base_model.model
    x = torch.randn(5, 6)
    rows = slice(4, 9)
    assert torch.allclose(linear(pair.one, x, rows), pair.one(x)[..., rows], atol=1e-5)


def test_the_result_has_the_inputs_dtype() -> None:
    pair = adapted().base_model.model
    x = torch.randn(5, 6).bfloat16()
    assert linear(pair.one, x).dtype == torch.bfloat16
    assert {out.dtype for out in fused_linear([pair.one, pair.two], x)} == {torch.bfloat16}


def test_the_norms_gradient_is_autograds() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(8, 1e-6)
    norm.weight.data.normal_()
    x = torch.randn(3, 5, 8, requires_grad=True)

    def plain(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.sin().sum(), (x, norm.weight))

    assert torch.allclose(norm(x, torch.float32), plain(x), atol=1e-6)
    for mine, theirs in zip(gradients(norm(x, torch.float32)), gradients(plain(x)), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    half = norm(x.bfloat16(), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.autograd.grad(half.sum(), x)[0].dtype == torch.float32


def test_rotation_is_a_rotation_and_its_gradient_turns_back() -> None:
    torch.manual_seed(0)
    rope = rope_mask(torch.ones(2, 7, dtype=torch.bool), "bidirectional", 8, 10000.0, torch.float64)
    assert rope.mask is None
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64, requires_grad=True)
    turned = rotate(x, rope.cosine, rope.sine)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-6)
    assert torch.autograd.gradcheck(lambda t: rotate(t, rope.cosine, rope.sine), x)
    # What attention sees depends on the distance of two positions alone.
    same = rotate(x[:, :1].expand(-1, 7, -1, -1), rope.cosine, rope.sine)
    products = [float((same[0, i, 0] * same[0, i + 2, 0]).sum().detach()) for i in range(5)]
    assert products == pytest.approx([products[0]] * 5, abs=1e-6)


def test_padding_takes_no_position_and_is_not_seen() -> None:
    seen = torch.tensor([[True, False, False, True, True], [True] * 5])
    rope = rope_mask(seen, "bidirectional", 4, 100.0, torch.float32)
    assert torch.equal(rope.cosine[0, [0, 3, 4]], rope.cosine[1, [0, 1, 2]])
    assert rope.mask is not None
    assert (rope.mask[0, 0, 0] == 0).tolist() == seen[0].tolist()
    causal = rope_mask(seen, "causal", 4, 100.0, torch.float32).mask
    assert causal is not None
    assert (causal[0, 0] == 0).tolist() == [[seen[0, j].item() and j <= i for j in range(5)] for i in range(5)]
    assert rope_mask(seen[1:], "bidirectional", 4, 100.0, torch.float32).mask is None
