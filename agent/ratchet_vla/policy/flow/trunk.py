"""Transformer layers of flow policies: a language model's and an action expert's, in Llama's or Gemma's form.

Knows grouped attention, rotary positions, norms that a time may modulate, and the two ways in which an expert reads the
language model: next to it in one attention (pi0), or every other layer across to it (SmolVLA). Knows no image, no word
and no flow. Parameter names are transformers' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ratchet_vla.policy.layers.linear import linear
from ratchet_vla.policy.layers.trunk import rotate


@dataclass(frozen=True)
class Sizes:
    """One stack of layers.

    form: "llama" (norm weight w, SiLU) or "gemma" (norm weight 1 + w, tanh-GELU).
    adaptive: norms take scale, shift and gate from a condition vector of the same width (pi0.5's expert).
    """

    width: int
    layers: int
    heads: int
    groups: int
    head: int
    hidden: int
    form: Literal["llama", "gemma"]
    epsilon: float
    adaptive: bool = False


class Norm(nn.Module):
    """Root-mean-square norm in float32, optionally modulated by a condition."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.epsilon = sizes.epsilon
        self.shift = 1.0 if sizes.form == "gemma" else 0.0
        self.dense = nn.Linear(sizes.width, 3 * sizes.width) if sizes.adaptive else None
        if not sizes.adaptive:
            self.weight = nn.Parameter(torch.full((sizes.width,), 1.0 - self.shift))

    def forward(self, x: Tensor, condition: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(B, T, width) -> normed in `dtype`, and the gate (B, 1, width) for what is added to x; None for 1."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        if self.dense is None or condition is None:
            return (wide * (self.weight.float() + self.shift)).to(dtype), None
        scale, shift, gate = linear(self.dense, condition.to(dtype)).float()[:, None].chunk(3, -1)
        return (wide * (1 + scale) + shift).to(dtype), gate


class Attention(nn.Module):
    """source: width that keys and values are made of; the layer's own, or the language model's."""

    def __init__(self, sizes: Sizes, source: int) -> None:
        super().__init__()
        self.head = sizes.head
        self.q_proj = nn.Linear(sizes.width, sizes.heads * sizes.head, bias=False)
        self.k_proj = nn.Linear(source, sizes.groups * sizes.head, bias=False)
        self.v_proj = nn.Linear(source, sizes.groups * sizes.head, bias=False)
        self.o_proj = nn.Linear(sizes.heads * sizes.head, sizes.width, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, heads * head) -> (B, T, heads, head)."""
        return x.view(*x.shape[:-1], -1, self.head)


class Mlp(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.form = sizes.form
        self.gate_proj = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.up_proj = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.down_proj = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = linear(self.gate_proj, x)
        gate = functional.silu(gate) if self.form == "llama" else functional.gelu(gate, approximate="tanh")
        return linear(self.down_proj, gate * linear(self.up_proj, x))


class Layer(nn.Module):
    def __init__(self, sizes: Sizes, source: int) -> None:
        super().__init__()
        self.self_attn = Attention(sizes, source)
        self.mlp = Mlp(sizes)
        self.input_layernorm = Norm(sizes)
        self.post_attention_layernorm = Norm(sizes)

    def finish(self, x: Tensor, attended: Tensor, gate: Tensor | None, condition: Tensor | None) -> Tensor:
        """What attention found, added to x, and the MLP on it."""
        out = linear(self.self_attn.o_proj, attended)
        x = x + (out if gate is None else out * gate.to(out.dtype))
        normed, gate = self.post_attention_layernorm(x, condition, attended.dtype)
        out = cast(Tensor, self.mlp(normed))
        return x + (out if gate is None else out * gate.to(out.dtype))


class Stack(nn.Module):
    """Layers and the final norm. crossed: indices of layers whose keys and values come from elsewhere, `source`
    wide."""

    def __init__(
        self, sizes: Sizes, crossed: frozenset[int] = frozenset(), source: int = 0, prefill_only: bool = False
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.crossed = crossed
        self.checkpointing = False  # True recomputes each prefilled layer in the backward pass
        self.layers = nn.ModuleList(Layer(sizes, source if i in crossed else sizes.width) for i in range(sizes.layers))
        if prefill_only:  # the last layer leaves keys and values; nothing else of it is ever read
            last = cast(Layer, self.layers[-1])
            del last.self_attn.q_proj, last.self_attn.o_proj, last.mlp, last.post_attention_layernorm
        else:
            self.norm = Norm(sizes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def prefill(
        self, x: Tensor, position: Tensor, hidden: Tensor, dtype: torch.dtype
    ) -> tuple[list[LayerKeyValue], Tensor]:
        """Run as the language model: keys and values of every layer, and the last layer's input, normed.

        x: (B, P, width). position: (B, P). hidden: (B, 1, P, P) float, added to scores.
        The last layer's own output is never read, so it is not computed.
        """
        cosine, sine = rotary(position, self.sizes.head, dtype)
        kv_cache: list[LayerKeyValue] = []

        def keys(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            attention = layer.self_attn
            normed, _ = layer.input_layernorm(x, None, dtype)
            key = rotate(attention.split(linear(attention.k_proj, normed)), cosine, sine)
            return key, attention.split(linear(attention.v_proj, normed)), normed

        def whole(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            key, value, normed = keys(layer, x)
            query = rotate(layer.self_attn.split(linear(layer.self_attn.q_proj, normed)), cosine, sine)
            return key, value, layer.finish(x, attend(query, key, value, hidden), None, None)

        for module in self.layers[:-1]:
            layer = cast(Layer, module)
            if self.checkpointing and torch.is_grad_enabled():
                key, value, x = checkpoint(whole, layer, x, use_reentrant=False)
            else:
                key, value, x = whole(layer, x)
            kv_cache.append((key, value))
        key, value, normed = keys(cast(Layer, self.layers[-1]), x)
        return [*kv_cache, (key, value)], normed

    def forward(
        self,
        x: Tensor,
        kv_cache: list[LayerKeyValue],
        position: Tensor,
        hidden: Tensor,
        condition: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Run as the expert: (B, T, width) -> (B, T, width) normed, in `dtype`.

        kv_cache: the language model's, per layer. position: (B, T), counted on from the language model's.
        hidden: (B, 1, T, P + T), added to scores.
        """
        cosine, sine = rotary(position, self.sizes.head, dtype)
        apart = rotary(position - position.amin(1, keepdim=True), self.sizes.head, dtype) if self.crossed else None
        for index, (module, (key, value)) in enumerate(zip(self.layers, kv_cache, strict=True)):
            layer = cast(Layer, module)
            attention = layer.self_attn
            normed, gate = layer.input_layernorm(x, condition, dtype)
            query = attention.split(linear(attention.q_proj, normed))
            if index in self.crossed and apart is not None:
                query = rotate(query, *apart)
                key = attention.split(linear(attention.k_proj, key.flatten(2)))
                value = attention.split(linear(attention.v_proj, value.flatten(2)))
                found = attend(query, key, value, hidden[..., : key.shape[1]])
            else:
                query = rotate(query, cosine, sine)
                own = rotate(attention.split(linear(attention.k_proj, normed)), cosine, sine)
                key = torch.cat([key, own], 1)
                value = torch.cat([value, attention.split(linear(attention.v_proj, normed))], 1)
                found = attend(query, key, value, hidden)
            x = layer.finish(x, found, gate, condition)
        normed, _ = self.norm(x, condition, dtype)
        return cast(Tensor, normed)


LayerKeyValue = tuple[Tensor, Tensor]
"""Keys and values (B, P, groups, head) of one layer."""


def attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    """(B, T, heads, d), (B, P, groups, d) twice, additive (B, 1, T, P) -> (B, T, heads * d)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    heads = query.shape[1]
    groups = key.shape[1]
    on_cpu = query.device.type == "cpu"
    if groups != heads and not on_cpu:
        # A GPU's fused kernel with a mask takes equal heads only; the other one would be several times slower.
        key = repeated(key, heads)
        value = repeated(value, heads)
    mask = hidden.to(query.dtype)
    out = functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=on_cpu and groups != heads)
    return out.transpose(1, 2).flatten(2)


def repeated(x: Tensor, heads: int) -> Tensor:
    """(B, groups, P, d) -> (B, heads, P, d), each group as often as it is shared."""
    batch, groups, length, width = x.shape
    if groups == 1:
        return x.expand(-1, heads, -1, -1)
    return x[:, :, None].expand(-1, -1, heads // groups, -1, -1).reshape(batch, heads, length, width)


def rotary(position: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rotary factors (B, T, 1, width) for `trunk.rotate`, base 10000, computed in float32."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=position.device).float() / width)
    angle = position[..., None].float() * frequency
    cosine = angle.cos()
    sine = angle.sin()
    factors = torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)
    return factors[0][:, :, None].to(dtype), factors[1][:, :, None].to(dtype)


def additive(allowed: Tensor) -> Tensor:
    """(B, T, P) bool -> (B, 1, T, P) float32 to add to scores; a row that sees nothing sees all alike, not NaN."""
    zeros = torch.zeros(allowed.shape, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(torch.bfloat16).min)[:, None]
