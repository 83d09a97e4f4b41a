"""The network of flow policies: pi0, pi0.5, SmolVLA and the small built-in one are configurations of one class.

Knows modules and the order of the two sequences. Prefix, run once per observation by the language model: image tokens,
words[, state]. Suffix, run once per step of the flow by the action expert: [state,] H noisy actions. Knows no file, no
words and no sampling. Vision towers are transformers' own; parameter names below them are LeRobot's.
Sources: pi0 (arXiv 2410.24164), pi0.5 (arXiv 2504.16054), SmolVLA (arXiv 2506.01844).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.flow.trunk import LayerKeyValue, Sizes, Stack, additive
from ratchet_vla.policy.flow.vision import make_vision
from ratchet_vla.policy.images import Preparation
from ratchet_vla.policy.layers.linear import linear


@dataclass(frozen=True)
class FlowConfig:
    """Sizes and conventions of one flow checkpoint; all of it is part of the base's hash.

    vision, vision_options: see vision.py. language, expert: the two stacks.
    vocabulary: rows of the word embedding. word_scale, image_scale: "root" multiplies embeddings by sqrt(width).
    crossed: 0 where the expert attends beside the language model in every layer (pi0); n where it does so in every
        n-th layer only and across to it in the others (SmolVLA: 2).
    order: "causal" where an action sees those before it only (SmolVLA), "full" where all see each other (pi0).
    state: "prefix" behind the words (SmolVLA), "suffix" before the actions (pi0), "words" within the prompt (pi0.5).
    time: "concat" beside each action (pi0, SmolVLA), "adaptive" through the expert's norms (pi0.5).
    horizon: H actions of the network; action_width, state_width: to which both are padded.
    steps: of the flow for prediction. sample_steps: of the stochastic flow. noise_level: of the latter, > 0.
    shock_correlation: in [0, 1), of the stochastic flow's shocks between the actions of a chunk. Independent ones
        average out over a chunk and explore little; the density stays exact.
    start: what prediction starts from: "zeros", or "fixed", one draw of noise that is the same at every call.
    prompt: template with {instruction}, and {state} where the state is said in words. prompt_length: longest, in
    tokens. images: fields of `images.Preparation`. compute_dtype: as in `PrismaticConfig`.

    Raises:
        RatchetError: policy.bad_config.
    """

    vision: str
    vision_options: Mapping[str, Any]
    language: Sizes
    expert: Sizes
    vocabulary: int
    horizon: int
    action_width: int
    state_width: int
    prompt: str
    prompt_length: int
    word_scale: Literal["none", "root"] = "root"
    image_scale: Literal["none", "root"] = "none"
    crossed: int = 0
    order: Literal["causal", "full"] = "full"
    state: Literal["none", "prefix", "suffix", "words"] = "suffix"
    time: Literal["concat", "adaptive"] = "concat"
    steps: int = 10
    sample_steps: int = 4
    noise_level: float = 0.5
    shock_correlation: float = 0.0
    start: Literal["zeros", "fixed"] = "fixed"
    images: Mapping[str, Any] = field(default_factory=dict)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        def refuse(name: str, fix: str) -> RatchetError:
            value = getattr(self, name)
            return RatchetError("policy.bad_config", f"{name} = {value!r} is not possible", where="model", fix=fix)

        hints = get_type_hints(type(self))
        for name in ("word_scale", "image_scale", "order", "state", "time", "start", "compute_dtype"):
            if getattr(self, name) not in get_args(hints[name]):
                raise refuse(name, f"one of {', '.join(get_args(hints[name]))}")
        for name in ("vocabulary", "horizon", "action_width", "prompt_length", "steps", "sample_steps"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) > 0):
                raise refuse(name, "give a whole number above 0")
        if not self.noise_level > 0:
            raise refuse("noise_level", "give a number above 0; without noise no sample has a probability")
        if not 0 <= self.shock_correlation < 1:
            raise refuse("shock_correlation", "give a number from 0 to below 1")
        same = all(getattr(self.language, n) == getattr(self.expert, n) for n in ("layers", "heads", "groups", "head"))
        if not same:
            raise refuse("expert", "the two stacks share layers, heads and the width of a head")
        if self.expert.adaptive != (self.time == "adaptive"):
            raise refuse("time", "an adaptive expert takes the time through its norms, and no other does")
        if "{instruction}" not in self.prompt or ("{state}" in self.prompt) != (self.state == "words"):
            raise refuse("prompt", "it must contain {instruction}, and {state} where the state is said in words")
        self.preparation()

    def preparation(self) -> Preparation:
        """How camera images become the tower's."""
        return Preparation.of(self.images)

    def facts(self) -> dict[str, Any]:
        """What goes into the base's hash, as JSON data."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Sizes):
                value = {g.name: getattr(value, g.name) for g in fields(value)}
            out[f.name] = dict(value) if isinstance(value, Mapping) else value
        return out


@dataclass
class Prefix:
    """What one pass of the language model leaves for the expert.

    kv_cache: keys and values per layer. seen: (B, P) True where not padding. summary: (B, F) what a value head reads:
    mean of what the last layer read, and beside it the state's own token where that comes after, each of unit scale.
    state: (B, 1, width) the state's own token in the suffix; None where it has none.
    """

    kv_cache: list[LayerKeyValue]
    seen: Tensor
    summary: Tensor
    state: Tensor | None


class FlowNetwork(nn.Module):
    """Everything with parameters; the module that adapters attach to."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config, self.checkpointing = config, False
        width, inner = config.language.width, config.expert.width
        self.vision = make_vision(config.vision, config.vision_options, width)
        self.embed_tokens = nn.Embedding(config.vocabulary, width)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.language = Stack(config.language, prefill_only=True)
        crossed = frozenset(
            i for i in range(config.expert.layers) if config.crossed and i % config.crossed
        )  # every `crossed`-th layer attends beside the language model
        self.expert = Stack(config.expert, crossed, config.language.groups * config.language.head)
        self.action_in_proj = nn.Linear(config.action_width, inner)
        self.action_out_proj = nn.Linear(inner, config.action_width)
        if config.state in ("prefix", "suffix"):
            self.state_proj = nn.Linear(config.state_width, width if config.state == "prefix" else inner)
        if config.time == "concat":
            self.action_time_mlp_in = nn.Linear(2 * inner, inner)
            self.action_time_mlp_out = nn.Linear(inner, inner)
        else:
            self.time_mlp_in = nn.Linear(inner, inner)
            self.time_mlp_out = nn.Linear(inner, inner)

    def set_checkpointing(self, on: bool) -> None:
        """Recompute in the backward pass what the language model's layers and the flow's steps would keep."""
        self.checkpointing = self.language.checkpointing = on

    def see(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, patches, width): the images as the language model takes them."""
        words = self.embed_tokens(ids)
        said = mask[..., None].to(words.dtype)
        text = (words * said).sum(1) / said.sum(1).clamp(min=1)
        views = pixels.shape[1]
        patches = self.vision(pixels.flatten(0, 1), text.repeat_interleave(views, 0)).to(words.dtype)
        out: Tensor = patches.reshape(len(ids), -1, patches.shape[-1])
        return out

    def prefix(
        self,
        pixels: Tensor,
        ids: Tensor,
        mask: Tensor,
        state: Tensor | None,
        dtype: torch.dtype,
        patches: Tensor | None = None,
    ) -> Prefix:
        """Run the language model once.

        pixels: (B, V, 3, size, size) in [0, 1]. ids, mask: (B, L) padded at the end. state: (B, state_width)
        normalised. patches: what `see` gave for these images, where they were seen before.
        """
        config = self.config
        root = math.sqrt(config.language.width)
        words = self.embed_tokens(ids)
        if patches is None:
            patches = self.see(pixels, ids, mask)
        parts = [
            patches * (root if config.image_scale == "root" else 1.0),
            words * (root if config.word_scale == "root" else 1.0),
        ]
        seen = [mask.new_ones(patches.shape[:2]), mask]
        token = None
        if config.state in ("prefix", "suffix") and state is not None:
            token = linear(self.state_proj, state.to(dtype))[:, None].to(words.dtype)
            if config.state == "prefix":
                parts.append(token)
                seen.append(mask.new_ones(len(mask), 1))
        x, known = torch.cat(parts, 1), torch.cat(seen, 1)
        allowed = known[:, :, None] & known[:, None, :]
        if config.state == "prefix":
            allowed[:, :-1, -1] = False  # images and words do not look at the state
        kv_cache, last = self.language.prefill(x, known.long().cumsum(1) - 1, additive(allowed), dtype)
        weight = known[..., None].to(last.dtype)
        summary = _unit_scale((last * weight).sum(1) / weight.sum(1))
        if config.state != "suffix" or token is None:
            return Prefix(kv_cache, known, summary, None)
        # The language model never sees a state that comes after it, and without it nobody can tell how far a task is.
        return Prefix(kv_cache, known, torch.cat([summary, _unit_scale(token[:, 0])], 1), token)

    def velocity(self, prefix: Prefix, actions: Tensor, time: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, A) float32: where noisy actions (B, H, A) move at times (B,)."""
        config = self.config
        x = linear(self.action_in_proj, actions.to(dtype))
        clock = sinusoid(time, config.expert.width).to(dtype)
        condition = None
        if config.time == "concat":
            both = torch.cat([x, clock[:, None].expand_as(x)], 2)
            x = linear(self.action_time_mlp_out, functional.silu(linear(self.action_time_mlp_in, both)))
        else:
            condition = functional.silu(linear(self.time_mlp_in, clock))
            condition = functional.silu(linear(self.time_mlp_out, condition))
        if prefix.state is not None:
            x = torch.cat([prefix.state.to(x.dtype), x], 1)
        count = x.shape[1]
        own = torch.ones(count, count, dtype=torch.bool, device=x.device)
        if config.order == "causal":
            own = own.tril()
        elif prefix.state is not None:
            own[0, 1:] = False
        batch = len(x)
        allowed = torch.cat([prefix.seen[:, None].expand(-1, count, -1), own.expand(batch, -1, -1)], 2)
        position = prefix.seen.sum(1, keepdim=True) + torch.arange(count, device=x.device)
        out = self.expert(x, prefix.kv_cache, position, additive(allowed), condition, dtype)
        # Read in float32 as published: the integration adds many small steps.
        with torch.autocast(x.device.type, enabled=False):
            v: Tensor = linear(self.action_out_proj, out[:, -config.horizon :].float().contiguous())
        return v


def sinusoid(time: Tensor, width: int, shortest: float = 4e-3, longest: float = 4.0) -> Tensor:
    """(B,) in [0, 1] -> (B, width) float32: sines, then cosines, of periods from `shortest` to `longest`."""
    share = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = shortest * (longest / shortest) ** share
    angle = time.double()[:, None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], 1).float()


def _unit_scale(x: Tensor) -> Tensor:
    found: Tensor = nn.functional.layer_norm(x.float(), x.shape[-1:])
    return found
