"""The language model's trunk: Llama (arXiv 2302.13971) in plain torch, under the published parameter names.

Knows rotary attention, its masks and the gated MLP. Knows no image, no prompt and no action token.
Differences to transformers' LlamaModel are of cost only: no mask where nothing is hidden, adapters without casts, and a
last layer that computes the positions that are asked for and no others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ratchet_vla.policy.layers.linear import ALL, fused_linear, linear

# Below this width plain matrix products beat the fused kernel on a CPU: 1.5 times at a hundred tokens.
_FUSED_FROM = 1024


@dataclass(frozen=True)
class RopeMask:
    """Rotary factors of the tokens of a batch and what they may attend to; made by `rope_mask`.

    cosine, sine: (B or 1, T, 1, d) rotary factors; the first half of `sine` is negated.
    mask: (B or 1, 1, T or 1, T), added to attention scores; None where everything is seen.
    """

    cosine: Tensor
    sine: Tensor
    mask: Tensor | None

    def part(self, begin: int, end: int) -> RopeMask:
        """Of the positions from `begin` to before `end`, which may see themselves and all before them."""
        mask = self.mask
        if mask is not None:
            mask = (mask if mask.shape[2] == 1 else mask[:, :, begin:end])[..., :end]
        return RopeMask(self.cosine[:, begin:end], self.sine[:, begin:end], mask)


@dataclass
class KeyValue:
    """Keys and values (B, heads, T, d) that one layer has computed so far."""

    key: Tensor | None = None
    value: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of new positions; returns all."""
        if self.key is not None and self.value is not None:
            key = torch.cat([self.key, key], 2)
            value = torch.cat([self.value, value], 2)
        self.key = key
        self.value = value
        return key, value


def rope_mask(
    seen: Tensor, attention: Literal["bidirectional", "causal"], width: int, theta: float, dtype: torch.dtype
) -> RopeMask:
    """Rotary factors and mask.

    seen: (B, T) bool, False for padding, which takes no position; the first token of a row is never padding.
    width: of a head, even. theta: base of the rotary frequencies.
    dtype: of the rotary factors, which are computed in float32.
    """
    length = seen.shape[1]
    padded = not bool(seen.all())
    step = torch.arange(length, device=seen.device)
    frequency = theta ** (-torch.arange(0, width, 2, device=seen.device).float() / width)
    angle = step[:, None].float() * frequency
    cosine = angle.cos()
    sine = angle.sin()
    cosine = torch.cat([cosine, cosine], 1)
    sine = torch.cat([-sine, sine], 1)
    cosine = cosine.to(dtype)
    sine = sine.to(dtype)
    position = seen.long().cumsum(1) - 1 if padded else step[None]
    mask: Tensor | None = None
    if attention == "causal":
        allowed = (step[:, None] >= step)[None, None]
        mask = _hidden(allowed & seen[:, None, None, :] if padded else allowed)
    elif padded:
        mask = _hidden(seen[:, None, None, :])
    return RopeMask(cosine[position][:, :, None], sine[position][:, :, None], mask)


def _hidden(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, torch.finfo(torch.float32).min)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in float32, given in `dtype`."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        out: Tensor = _Norm.apply(x, self.weight, self.epsilon, dtype)  # type: ignore[no-untyped-call]
        return out


class _Norm(torch.autograd.Function):
    """y = r x w with r = (mean x^2 + e)^-1/2. With g = w dL/dy: dL/dx = r (g - x r^2 mean(g x)), dL/dw = sum r x dL/dy.

    By hand because autograd's own way through the five operations is a tenth of a training step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        rate = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, rate)
        return (wide * rate).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, rate = ctx.saved_tensors
        wide = x.float()
        gradient = gradients[0].float()
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * wide * rate).flatten(0, -2).sum(0).to(weight.dtype)
        scaled = gradient * weight
        along = (scaled * wide).mean(-1, keepdim=True) * rate.square()
        return torch.addcmul(scaled, wide, along, value=-1).mul_(rate).to(x.dtype), of_weight, None, None


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of (B, T, heads, d), in the pairing of Llama."""
    out: Tensor = _Rotation.apply(x, cosine, sine)  # type: ignore[no-untyped-call]
    return out


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is turned back by the same angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        (gradient,) = gradients
        back = gradient.roll(gradient.shape[-1] // 2, -1)
        return torch.addcmul(gradient * cosine, back, sine, value=-1), None, None


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rope: RopeMask, query_slice: slice, kv_cache: KeyValue | None = None) -> Tensor:
        """(B, T, width) -> (B, Q, width), of the Q positions in query_slice.

        kv_cache: of the positions before x; those of x are added to it.
        """
        batch, _, width = x.shape
        shape = (batch, -1, self.heads, width // self.heads)
        if query_slice == ALL:
            query, key, value = fused_linear([self.q_proj, self.k_proj, self.v_proj], x)
        else:
            key, value = fused_linear([self.k_proj, self.v_proj], x)
            query = linear(self.q_proj, x[:, query_slice])
        cosine = rope.cosine
        sine = rope.sine
        query = rotate(query.view(shape), cosine[:, query_slice], sine[:, query_slice]).transpose(1, 2)
        key = rotate(key.view(shape), cosine, sine).transpose(1, 2)
        value = value.view(shape).transpose(1, 2)
        if kv_cache is not None:
            key, value = kv_cache.extend(key, value)
        scale = 1 / math.sqrt(shape[-1])
        mask = rope.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, query_slice]
        if width >= _FUSED_FROM:
            mask = None if mask is None else mask.to(query.dtype)
            out = functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        else:
            score = query @ (key * scale).transpose(2, 3)
            if mask is not None:
                score = score + mask
            out = score.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
        return linear(self.o_proj, out.transpose(1, 2).reshape(batch, -1, width))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = fused_linear([self.gate_proj, self.up_proj], x)
        return linear(self.down_proj, functional.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.mlp = MLP(width, hidden)
        self.input_layernorm = RMSNorm(width, epsilon)
        self.post_attention_layernorm = RMSNorm(width, epsilon)

    def forward(
        self, x: Tensor, rope: RopeMask, query_slice: slice, dtype: torch.dtype, kv_cache: KeyValue | None = None
    ) -> Tensor:
        x = x[:, query_slice] + self.self_attn(self.input_layernorm(x, dtype), rope, query_slice, kv_cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x, dtype))
        return out


class Llama(nn.Module):
    """Embeddings, layers and the final norm; initialised as Llama is, with deviation 0.02."""

    def __init__(
        self, *, rows: int, width: int, layers: int, heads: int, hidden: int, epsilon: float, theta: float
    ) -> None:
        super().__init__()
        self.width = width
        self.heads = heads
        self.theta = theta
        self.checkpointing = False  # True recomputes each layer in the backward pass instead of keeping what it made
        self.embed_tokens = nn.Embedding(rows, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, epsilon) for _ in range(layers))
        self.norm = RMSNorm(width, epsilon)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def rope_mask(self, seen: Tensor, attention: Literal["bidirectional", "causal"], dtype: torch.dtype) -> RopeMask:
        """See the function of the same name."""
        return rope_mask(seen, attention, self.width // self.heads, self.theta, dtype)

    def forward(
        self,
        x: Tensor,
        rope: RopeMask,
        query_slice: slice,
        dtype: torch.dtype,
        kv_cache: Sequence[KeyValue] | None = None,
    ) -> Tensor:
        """Embeddings (B, T, width) -> final hidden states (B, Q, width) in `dtype`.

        query_slice: the Q positions that are read. dtype: of matrix products and attention; sums and norms keep x's.
        kv_cache: one per layer, of the positions before x.
        """
        for index, layer in enumerate(self.layers):
            wanted = query_slice if index == len(self.layers) - 1 else ALL
            if self.checkpointing and torch.is_grad_enabled() and kv_cache is None:
                x = checkpoint(layer, x, rope, wanted, dtype, use_reentrant=False)
            else:
                x = layer(x, rope, wanted, dtype, None if kv_cache is None else kv_cache[index])
        out: Tensor = self.norm(x, dtype)
        return out
