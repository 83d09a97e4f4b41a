"""Linear layers, plain or under PEFT's LoRA, computed in the input's dtype: some output rows only, or several at once.

Knows PEFT's LoRA layer and its arithmetic. Knows no model.
PEFT's own forward casts activations to the adapter's dtype and scales the full-width result; here weights are cast and
scaled, which are smaller. Layers that it does not know run their own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional

ALL = slice(None)
# One product instead of several saves calls, most of the time that few positions take; it costs copies of weights and,
# in training, of gradients.
_FEW_POSITIONS = 256
_FEW_WEIGHTS = 1 << 20


def linear(layer: nn.Module, x: Tensor, rows: slice = ALL) -> Tensor:
    """(…, in) -> (…, out), or the output rows in `rows`, in x's dtype.

    Equal to `layer(x)[..., rows]` up to rounding, without computing the other rows.
    layer: nn.Linear, or PEFT's LoRA around one: merged, disabled or with any adapters active.
    """
    parts = _parts(layer)
    if parts is None:
        out: Tensor = layer(x)
        return out[..., rows]
    base, down, up = parts
    weight: Tensor = base.weight
    bias: Tensor | None = base.bias
    if rows != ALL:
        weight = weight[rows]
        bias = None if bias is None else bias[rows]
    out = functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if not down:
        return out
    return _add_low_rank(out, x, _cat(down), _cat([b[rows] for b in up], 1))


def fused_linear(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """`[linear(layer, x) for layer in layers]`, as one product where that is cheaper."""
    parts = [_parts(layer) for layer in layers]
    known = [part for part in parts if part is not None]
    weights = sum(base.weight.numel() for base, _, _ in known)
    simple = len(known) == len(layers) and all(base.bias is None for base, _, _ in known)
    if not simple or x.numel() > _FEW_POSITIONS * x.shape[-1] or weights > _FEW_WEIGHTS:
        return [linear(layer, x) for layer in layers]
    out = functional.linear(x, _cat([base.weight for base, _, _ in known]).to(x.dtype))
    downs = [a for _, down, _ in known for a in down]
    if downs:
        ups = [_cat(up, 1) if up else base.weight.new_zeros(base.out_features, 0) for base, _, up in known]
        out = _add_low_rank(out, x, _cat(downs), torch.block_diag(*ups))  # type: ignore[no-untyped-call]
    return list(out.split_with_sizes([base.out_features for base, _, _ in known], -1))


def _add_low_rank(out: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """out + x down^T up^T in one pass over `out`."""
    low = functional.linear(x.flatten(0, -2), down.to(x.dtype))
    return torch.addmm(out.flatten(0, -2), low, up.to(x.dtype).t()).view(out.shape)


def _parts(layer: nn.Module) -> tuple[nn.Linear, list[Tensor], list[Tensor]] | None:
    """The base layer, A and scaled B of each adapter in force; None for anything but W x + b + sum of s B A x."""
    if type(layer) is nn.Linear:
        return layer, [], []
    if type(layer) is not LoraLinear:
        return None
    lora = cast(Any, layer)
    base = layer._modules["base_layer"]  # looked up directly: small models run thousands of these a second
    if type(base) is not nn.Linear or lora.lora_variant:
        return None
    if lora.merged_adapters or lora._disable_adapters:
        return base, [], []
    names = [name for name in lora.active_adapters if name in lora.lora_A]
    for name in names:
        if lora.lora_bias[name] or (lora.training and not isinstance(lora.lora_dropout[name], nn.Identity)):
            return None
    down = [lora.lora_A[name].weight for name in names]
    return base, down, [lora.lora_B[name].weight * lora.scaling[name] for name in names]


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
