"""The network of flow policies: pi0, pi0.5, SmolVLA and the small built-in one are configurations of one class.

Knows modules and the order of the two sequences. Prefix, run once per observation by the language model: image tokens,
words[, state]. Suffix, run once per step of the flow by the action expert: [state,] H noisy actions. Knows no file, no
words and no sampling. Vision towers are transformers' own; parameter names below them are LeRobot's.
Sources: pi0 (arXiv 2410.24164), pi0.5 (arXiv 2504.16054), SmolVLA (arXiv 2506.01844).
Departures from the published code: the language model's last layer computes keys and values only, because nothing else
of it is read; the padded sequence has no fixed length; and a summary of the prefix is kept for a value head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ratchet_vla.policy.configuration import impossible, require_choices, require_counts
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
        require_choices(self, ("word_scale", "image_scale", "order", "state", "time", "start", "compute_dtype"))
        require_counts(self, ("vocabulary", "horizon", "action_width", "prompt_length", "steps", "sample_steps"))
        if not self.noise_level > 0:
            raise impossible(self, "noise_level", "give a number above 0; without noise no sample has a probability")
        if not 0 <= self.shock_correlation < 1:
            raise impossible(self, "shock_correlation", "give a number from 0 to below 1")
        shared_sizes = ("layers", "heads", "groups", "head")
        if any(getattr(self.language, name) != getattr(self.expert, name) for name in shared_sizes):
            raise impossible(self, "expert", "the two stacks share layers, heads and the width of a head")
        if self.expert.adaptive != (self.time == "adaptive"):
            raise impossible(self, "time", "an adaptive expert takes the time through its norms, and no other does")
        if "{instruction}" not in self.prompt or ("{state}" in self.prompt) != (self.state == "words"):
            raise impossible(
                self, "prompt", "it must contain {instruction}, and {state} where the state is said in words"
            )
        self.preparation()

    def preparation(self) -> Preparation:
        """How camera images become the tower's."""
        return Preparation.of(self.images)

    def facts(self) -> dict[str, Any]:
        """What goes into the base's hash, as JSON data."""
        hashed: dict[str, Any] = {}
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, Sizes):
                value = {size.name: getattr(value, size.name) for size in fields(value)}
            hashed[option.name] = dict(value) if isinstance(value, Mapping) else value
        return hashed


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
        self.config = config
        self.checkpointing = False  # True recomputes each step of the flow in the backward pass
        width = config.language.width
        inner = config.expert.width
        self.vision = make_vision(config.vision, config.vision_options, width)
        self.embed_tokens = nn.Embedding(config.vocabulary, width)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.language = Stack(config.language, prefill_only=True)
        # Every `crossed`-th layer attends beside the language model, the others across to it.
        crossed: frozenset[int] = frozenset()
        if config.crossed:
            crossed = frozenset(index for index in range(config.expert.layers) if index % config.crossed)
        self.expert = Stack(config.expert, crossed, config.language.groups * config.language.head)
        self.action_in_proj = nn.Linear(config.action_width, inner)
        self.action_out_proj = nn.Linear(inner, config.action_width)
        if config.state in ("prefix", "suffix"):
            state_width = width if config.state == "prefix" else inner
            self.state_proj = nn.Linear(config.state_width, state_width)
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
        embedded = self.embed_tokens(ids)  # (B, L, width)
        weight = mask[..., None].to(embedded.dtype)  # (B, L, 1)
        text = (embedded * weight).sum(1) / weight.sum(1).clamp(min=1)  # (B, width)
        views = pixels.shape[1]
        per_view = self.vision(pixels.flatten(0, 1), text.repeat_interleave(views, 0)).to(
            embedded.dtype
        )  # (B V, P, width)
        patches: Tensor = per_view.reshape(len(ids), -1, per_view.shape[-1])
        return patches

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
        embedded = self.embed_tokens(ids)  # (B, L, width)
        if patches is None:
            patches = self.see(pixels, ids, mask)
        sections = [
            patches * (root if config.image_scale == "root" else 1.0),
            embedded * (root if config.word_scale == "root" else 1.0),
        ]
        present = [mask.new_ones(patches.shape[:2]), mask]
        token = None
        if config.state in ("prefix", "suffix") and state is not None:
            token = linear(self.state_proj, state.to(dtype))[:, None].to(embedded.dtype)  # (B, 1, width)
            if config.state == "prefix":
                sections.append(token)
                present.append(mask.new_ones(len(mask), 1))
        sequence = torch.cat(sections, 1)  # (B, P, width)
        not_padding = torch.cat(present, 1)  # (B, P)
        allowed = not_padding[:, :, None] & not_padding[:, None, :]  # (B, P, P)
        if config.state == "prefix":
            allowed[:, :-1, -1] = False  # images and words do not look at the state
        position = not_padding.long().cumsum(1) - 1  # (B, P): padding takes no position
        kv_cache, last = self.language.prefill(sequence, position, additive(allowed), dtype)
        weight = not_padding[..., None].to(last.dtype)  # (B, P, 1)
        summary = _unit_scale((last * weight).sum(1) / weight.sum(1))  # (B, width)
        if config.state != "suffix" or token is None:
            return Prefix(kv_cache, not_padding, summary, None)
        # The language model never sees a state that comes after it, and without it nobody can tell how far a task is.
        return Prefix(kv_cache, not_padding, torch.cat([summary, _unit_scale(token[:, 0])], 1), token)

    def velocity(self, prefix: Prefix, actions: Tensor, time: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, A) float32: where noisy actions (B, H, A) move at times (B,)."""
        config = self.config
        tokens = linear(self.action_in_proj, actions.to(dtype))  # (B, H, inner)
        clock = sinusoid(time, config.expert.width).to(dtype)  # (B, inner)
        condition = None
        if config.time == "concat":
            timed = torch.cat([tokens, clock[:, None].expand_as(tokens)], 2)  # (B, H, 2 inner)
            tokens = linear(self.action_time_mlp_out, functional.silu(linear(self.action_time_mlp_in, timed)))
        else:
            condition = functional.silu(linear(self.time_mlp_in, clock))
            condition = functional.silu(linear(self.time_mlp_out, condition))  # (B, inner)
        if prefix.state is not None:
            tokens = torch.cat([prefix.state.to(tokens.dtype), tokens], 1)  # (B, 1 + H, inner)
        batch, count, _ = tokens.shape
        among_suffix = torch.ones(count, count, dtype=torch.bool, device=tokens.device)
        if config.order == "causal":
            among_suffix = among_suffix.tril()
        elif prefix.state is not None:
            among_suffix[0, 1:] = False  # the state does not look at the noisy actions
        to_prefix = prefix.seen[:, None].expand(-1, count, -1)  # (B, T, P)
        allowed = torch.cat([to_prefix, among_suffix.expand(batch, -1, -1)], 2)  # (B, T, P + T)
        position = prefix.seen.sum(1, keepdim=True) + torch.arange(count, device=tokens.device)  # (B, T)
        hidden = self.expert(tokens, prefix.kv_cache, position, additive(allowed), condition, dtype)
        # Read in float32 as published: the integration adds many small steps.
        with torch.autocast(tokens.device.type, enabled=False):
            velocity: Tensor = linear(self.action_out_proj, hidden[:, -config.horizon :].float().contiguous())
        return velocity


def sinusoid(time: Tensor, width: int, shortest: float = 4e-3, longest: float = 4.0) -> Tensor:
    """(B,) in [0, 1] -> (B, width) float32: sines, then cosines, of periods from `shortest` to `longest`."""
    share = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = shortest * (longest / shortest) ** share
    angle = time.double()[:, None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], 1).float()


def _unit_scale(x: Tensor) -> Tensor:
    scaled: Tensor = nn.functional.layer_norm(x.float(), x.shape[-1:])
    return scaled
