"""The network of the discrete VLA, from 7 billion parameters down to 3 million: configuration and forward pass.

Knows modules and the order of the sequence: first prompt token, image patches, rest of the prompt, [state,] K x D
placeholders. Knows no file, no words and no sampling.
Sources: OpenVLA-OFT (arXiv 2502.19645), discrete variant of arXiv 2603.11653; OpenVLA (arXiv 2406.09246), which gives
one token after another.
Departures from the published code, none of which changes what is read beyond rounding:
- it appends a stop token that nothing attends to; here there is none;
- it computes every position's logits over all words; here those of the action positions and action tokens alone;
- it runs the trunk's last layer at every position; here at those that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ratchet_vla.policy.configuration import impossible, require_choices, require_counts
from ratchet_vla.policy.discrete.action_tokens import BINS
from ratchet_vla.policy.images import Preparation
from ratchet_vla.policy.layers.linear import linear
from ratchet_vla.policy.layers.trunk import KeyValue, Llama, RopeMask
from ratchet_vla.policy.layers.vision import make_tower

_LATER_OPTIONS = ("decoding", "head", "state_style", "images")


@dataclass(frozen=True)
class PrismaticConfig:
    """Sizes and conventions of one checkpoint; all of it is part of the base's hash.

    vision, vision_options: name and arguments of the tower (vision.py).
    attention: which mask the checkpoint was trained with; there is no default, because the wrong one changes a quarter
        of the tokens without an error.
    placeholders: "zero" embeddings as published, or "learned" ones.
    hidden, layers, heads, intermediate: the trunk's width, depth, attention heads and MLP width.
    vocabulary: ids of the text model before padding; the last 256 are action tokens.
    padded_vocabulary: rows of the head.
    projector: "mlp3" as published for fused towers, "mlp2" for single ones.
    prompt, bos, pad, end_token, prompt_length: see text.py.
    compute_dtype: "float32", or "bfloat16" for autocast of everything but norms, residuals and the log-softmax.
    decoding: "parallel" reads all tokens from placeholders at once; "autoregressive" gives each token after those
        before it (OpenVLA), which needs causal attention.
    head: "tokens", or "l1": OpenVLA-OFT's regression head, which gives actions but no probabilities.
    state_style: how the state enters: "own", one linear layer, behind the prompt; "oft", two layers, behind the images,
        values clipped to [-1, 1].
    images: fields of `images.Preparation`; empty takes images of the model's own size only.

    Raises:
        RatchetError: policy.bad_config.
    """

    vision: str
    vision_options: Mapping[str, Any]
    attention: Literal["bidirectional", "causal"]
    placeholders: Literal["zero", "learned"]
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    padded_vocabulary: int
    projector: Literal["mlp2", "mlp3"]
    prompt: str
    bos: int
    pad: int
    end_token: int
    prompt_length: int = 0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    decoding: Literal["parallel", "autoregressive"] = "parallel"
    head: Literal["tokens", "l1"] = "tokens"
    state_style: Literal["own", "oft"] = "own"
    images: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choices(
            self, ("attention", "placeholders", "projector", "compute_dtype", "decoding", "head", "state_style")
        )
        require_counts(self, ("hidden", "layers", "heads", "intermediate", "vocabulary", "padded_vocabulary"))
        if self.hidden % (2 * self.heads):
            raise impossible(self, "heads", f"hidden = {self.hidden} must divide into heads of an even width")
        if not BINS <= self.vocabulary <= self.padded_vocabulary:
            raise impossible(self, "vocabulary", f"at least {BINS}, and no more than padded_vocabulary")
        for name in ("bos", "pad"):
            if not 0 <= getattr(self, name) < self.padded_vocabulary:
                raise impossible(self, name, "give an id of the vocabulary")
        if "{instruction}" not in self.prompt:
            raise impossible(self, "prompt", "it must contain {instruction}")
        if self.decoding == "autoregressive" and (self.attention != "causal" or self.head != "tokens"):
            raise impossible(self, "decoding", "one token after another needs causal attention and a head of tokens")
        self.preparation()

    def preparation(self) -> Preparation:
        """How camera images become the tower's."""
        return Preparation.of(self.images)

    def facts(self) -> dict[str, Any]:
        """What goes into the base's hash.

        Options that came later are left out at their default, so that the ids of all earlier bases stay as they are.
        """
        hashed: dict[str, Any] = {}
        for option in fields(self):
            value = getattr(self, option.name)
            default = option.default if option.default is not MISSING else {}
            if option.name in _LATER_OPTIONS and value == default:
                continue
            hashed[option.name] = dict(value) if isinstance(value, Mapping) else value
        return hashed

    @property
    def action_rows(self) -> slice:
        """The head's rows of the action tokens."""
        return slice(self.vocabulary - BINS, self.vocabulary)


class Projector(nn.Module):
    """Patch features -> token embeddings, under the published parameter names."""

    def __init__(self, features: int, hidden: int, kind: str) -> None:
        super().__init__()
        middle = 4 * features if kind == "mlp3" else hidden
        self.fc1 = nn.Linear(features, middle)
        self.fc2 = nn.Linear(middle, hidden)
        self.fc3 = nn.Linear(hidden, hidden) if kind == "mlp3" else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, features) -> (…, hidden)."""
        x = linear(self.fc2, functional.gelu(linear(self.fc1, x)))
        return x if self.fc3 is None else linear(self.fc3, functional.gelu(x))


class StateProjector(nn.Module):
    """OpenVLA-OFT's proprioception: two layers, under the published parameter names."""

    def __init__(self, state: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S) -> (B, hidden)."""
        return linear(self.fc2, functional.gelu(linear(self.fc1, x)))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.ffn(hidden)
        return out


class RegressionHead(nn.Module):
    """OpenVLA-OFT's L1 head: the hidden states of one step's D slots -> its D actions, normalised."""

    def __init__(self, hidden: int, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.layer_norm1 = nn.LayerNorm(hidden * dims)
        self.fc1 = nn.Linear(hidden * dims, hidden)
        self.mlp_resnet_blocks = nn.ModuleList(_Residual(hidden) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, dims)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K*D, hidden) -> (B, K, D)."""
        x = functional.relu(self.fc1(self.layer_norm1(x.reshape(len(x), -1, self.dims * x.shape[-1]))))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        out: Tensor = self.fc2(self.layer_norm2(x))
        return out


class LanguageModel(nn.Module):
    """The trunk and its head, under the published parameter names."""

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        self.model = Llama(
            rows=config.padded_vocabulary,
            width=config.hidden,
            layers=config.layers,
            heads=config.heads,
            hidden=config.intermediate,
            epsilon=config.rms_norm_eps,
            theta=config.rope_theta,
        )
        self.lm_head = nn.Linear(config.hidden, config.padded_vocabulary, bias=False)


class PrismaticNetwork(nn.Module):
    """Everything with parameters; the module that adapters attach to.

    actions: K x D. state: how many state values are taken, 0 for none. dims: D.
    """

    def __init__(self, config: PrismaticConfig, actions: int, state: int, dims: int) -> None:
        super().__init__()
        self.config = config
        self.actions = actions
        self.vision_backbone = make_tower(config.vision, config.vision_options)
        self.projector = Projector(self.vision_backbone.features, config.hidden, config.projector)
        self.language_model = LanguageModel(config)
        if state:
            own = config.state_style == "own"
            self.state_projector = nn.Linear(state, config.hidden) if own else StateProjector(state, config.hidden)
        if config.placeholders == "learned":
            self.placeholders = nn.Parameter(torch.randn(actions, config.hidden) * 0.02)
        if config.head == "l1":
            self.action_head = RegressionHead(config.hidden, dims)

    def forward(
        self,
        pixels: Tensor,
        ids: Tensor,
        mask: Tensor,
        state: Tensor | None,
        dtype: torch.dtype,
        given: Tensor | None = None,
    ) -> Tensor:
        """(B, K*D, hidden): final hidden states from which the action tokens are read.

        pixels: as the tower's `prepare` gives them. ids, mask: (B, L) prompt ids, and True where not padding.
        state: (B, S) normalised; None where none is taken. dtype: of matrix products.
        given: (B, K*D) bins that stand in the slots, for autoregressive decoding; the last is not read.
        """
        prefix, present = self.prefix(pixels, ids, mask, state, dtype)  # (B, P, hidden), (B, P)
        slots = self.slots(prefix, given)  # (B, K*D, hidden)
        rope = self.rope_mask(present, dtype)
        # The token of a position is read one position earlier, as in any language model.
        length = prefix.shape[1] + self.actions
        query_slice = slice(length - self.actions - 1, length - 1)
        hidden: Tensor = self.language_model.model(torch.cat([prefix, slots], 1), rope, query_slice, dtype)
        return hidden

    def see(self, pixels: Tensor, ids: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, patches, hidden): the images as the trunk takes them."""
        embedded = self.language_model.model.embed_tokens(ids)  # (B, L, hidden)
        weight = mask[..., None].to(embedded.dtype)  # (B, L, 1)
        weight[:, 0] = 0  # the first token says nothing about the task
        text = (embedded * weight).sum(1) / weight.sum(1).clamp(min=1)  # (B, hidden)
        features = self.vision_backbone(pixels, text).to(dtype)  # (B, V * patches, features)
        patches: Tensor = self.projector(features).to(embedded.dtype)
        return patches

    def prefix(
        self,
        pixels: Tensor,
        ids: Tensor,
        mask: Tensor,
        state: Tensor | None,
        dtype: torch.dtype,
        patches: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, P, hidden) of everything before the slots, and (B, P) which of them are not padding.

        patches: what `see` gave for these images, where they were seen before.
        """
        embedded = self.language_model.model.embed_tokens(ids)  # (B, L, hidden)
        if patches is None:
            patches = self.see(pixels, ids, mask, dtype)
        sections = [embedded[:, :1], patches, embedded[:, 1:]]
        present = [mask[:, :1], mask.new_ones(patches.shape[:2]), mask[:, 1:]]
        if state is not None:
            token = linear(self.state_projector, state.to(dtype))[:, None].to(embedded.dtype)  # (B, 1, hidden)
            # OpenVLA-OFT has the state behind the images, the built-in VLA behind the prompt.
            place = 3 if self.config.state_style == "own" else 2
            sections.insert(place, token)
            present.insert(place, mask.new_ones(len(mask), 1))
        return torch.cat(sections, 1), torch.cat(present, 1)

    def slots(self, prefix: Tensor, given: Tensor | None) -> Tensor:
        """(B, K*D, hidden): what stands where the actions are read."""
        if given is not None:
            embedded: Tensor = self.language_model.model.embed_tokens(given + self.config.action_rows.start)
            return embedded.to(prefix.dtype)
        if self.config.placeholders == "learned":
            return self.placeholders.expand(len(prefix), -1, -1)
        return prefix.new_zeros(len(prefix), self.actions, self.config.hidden)

    def rope_mask(self, present: Tensor, dtype: torch.dtype) -> RopeMask:
        """Of the whole sequence: the prefix, of which `present` (B, P) is not padding, and the slots."""
        present = functional.pad(present, (0, self.actions), value=True)  # (B, P + K*D)
        return self.language_model.model.rope_mask(present, self.config.attention, dtype)

    @torch.no_grad()
    def one_by_one(
        self,
        pixels: Tensor,
        ids: Tensor,
        mask: Tensor,
        state: Tensor | None,
        dtype: torch.dtype,
        choose: Callable[[Tensor, int], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Autoregressive decoding: (B, K*D) bins and (B, K*D, hidden) the states that they were read from.

        choose: from (B, 256) float32 logits and the token's index to (B,) bins. Keys and values of what stands before
        are kept, so that each token after the first costs one position.
        """
        trunk = self.language_model.model
        inputs, present = self.prefix(pixels, ids, mask, state, dtype)
        rope = self.rope_mask(present, dtype)
        kv_cache = [KeyValue() for _ in trunk.layers]
        begin = 0
        tokens: list[Tensor] = []  # each (B,)
        states: list[Tensor] = []  # each (B, 1, hidden)
        for index in range(self.actions):
            length = inputs.shape[1]
            end = begin + length
            hidden = trunk(inputs, rope.part(begin, end), slice(length - 1, length), dtype, kv_cache)
            states.append(hidden)
            tokens.append(choose(self.action_logits(hidden[:, 0]), index))
            inputs = trunk.embed_tokens(tokens[-1][:, None] + self.config.action_rows.start)  # (B, 1, hidden)
            begin = end
        return torch.stack(tokens, 1), torch.cat(states, 1)

    def set_checkpointing(self, on: bool) -> None:
        """Recompute layers in the backward pass: less memory, a third more time, equal numbers."""
        for module in self.modules():
            if hasattr(module, "checkpointing"):
                setattr(module, "checkpointing", on)  # noqa: B010 - modules' attributes are typed as tensors

    def action_logits(self, hidden: Tensor) -> Tensor:
        """(…, hidden) -> (…, 256) float32: the head's action rows alone, also under an adapter."""
        return linear(self.language_model.lm_head, hidden, self.config.action_rows).float()
