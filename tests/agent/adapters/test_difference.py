"""`ratchet adapters diff` answers "what did this training change?"; a wrong norm would send people to the wrong layer.

Pinned: norms, distance and cosine equal those of the weight changes written out; a scaled adapter changes every
layer by that factor; adapters of different bases are refused.
"""

from __future__ import annotations

import pytest
import torch

from ratchet_vla.adapters.difference import change
from ratchet_vla.adapters.identity import Adapter, Binding
from ratchet_vla.adapters.lora.layers import scaled, scaling_of, split_name
from ratchet_vla.errors import RatchetError
from ratchet_vla.testing.tiny_policy import made


def written_out(adapter: Adapter) -> dict[str, torch.Tensor]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        layer, half = split_name(name)
        halves.setdefault(layer, {})[half] = tensor.double().flatten(1)
    return {layer: scaling_of(adapter.config, layer) * h["lora_B"] @ h["lora_A"] for layer, h in halves.items()}


def test_equals_the_full_weight_changes() -> None:
    adapter_a = made(1)
    adapter_b = made(2)
    first = written_out(adapter_a)
    second = written_out(adapter_b)
    changes = change(adapter_a, adapter_b)
    assert {c.layer for c in changes} == set(first)
    assert [c.difference for c in changes] == sorted((c.difference for c in changes), reverse=True)
    for c in changes:
        w1 = first[c.layer]
        w2 = second[c.layer]
        assert c.first == pytest.approx(float(w1.norm()), rel=1e-6)
        assert c.second == pytest.approx(float(w2.norm()), rel=1e-6)
        assert c.difference == pytest.approx(float((w1 - w2).norm()), rel=1e-6)
        assert c.cosine == pytest.approx(float((w1 * w2).sum() / (w1.norm() * w2.norm())), abs=1e-6)


def test_the_same_adapter_differs_in_nothing() -> None:
    assert max(c.difference for c in change(made(1), made(1))) < 1e-6


def test_another_base_is_refused() -> None:
    first = made(1)
    foreign = Adapter(
        first.tensors, first.config, Binding("0" * 64, first.binding.statistics, first.binding.action_space)
    )
    with pytest.raises(RatchetError) as refused:
        change(first, foreign)
    assert refused.value.code == "adapter.wrong_base"


@pytest.mark.parametrize("factor", [0.0, 0.25, 2.0])
def test_a_scaled_adapter_changes_every_layer_by_the_factor(factor: float) -> None:
    adapter = made(1)
    before = written_out(adapter)
    after = written_out(scaled(adapter, factor))
    assert all(torch.allclose(after[layer], factor * change, rtol=1e-6) for layer, change in before.items())
    assert scaled(adapter, 1.0).id == adapter.id != scaled(adapter, factor).id


@pytest.mark.parametrize("factor", [-0.5, float("nan"), float("inf")])
def test_a_factor_that_is_none_is_refused(factor: float) -> None:
    with pytest.raises(RatchetError) as refused:
        scaled(made(1), factor)
    assert refused.value.code == "adapter.bad_scale"
