"""The network of the discrete VLA, from 7 billion parameters down to 3 million: configuration and forward pass.

Knows modules and the order of the sequence: first prompt token, image patches, rest of the prompt, [state,] K x D
placeholders. (The published code appends a stop token that nothing attends to; it is left out.) Knows no file, no words
and no sampling.
Source: OpenVLA-OFT (arXiv 2502.19645), discrete variant of arXiv 2603.11653.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional

from agent.errors import RatchetError
from agent.policy.action_tokens import BINS
from agent.policy.linear import linear
from agent.policy.trunk import Llama
from agent.policy.vision import make_tower


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

    def __post_init__(self) -> None:
        def refuse(name: str, fix: str) -> RatchetError:
            value = getattr(self, name)
            return RatchetError("policy.bad_config", f"{name} = {value!r} is not possible", where="model", fix=fix)

        hints = get_type_hints(type(self))
        for name in ("attention", "placeholders", "projector", "compute_dtype"):
            if getattr(self, name) not in get_args(hints[name]):
                raise refuse(name, f"one of {', '.join(get_args(hints[name]))}")
        for name in ("hidden", "layers", "heads", "intermediate", "vocabulary", "padded_vocabulary"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) > 0):
                raise refuse(name, "give a whole number above 0")
        if self.hidden % (2 * self.heads):
            raise refuse("heads", f"hidden = {self.hidden} must divide into heads of an even width")
        if not BINS <= self.vocabulary <= self.padded_vocabulary:
            raise refuse("vocabulary", f"at least {BINS}, and no more than padded_vocabulary")
        for name in ("bos", "pad"):
            if not 0 <= getattr(self, name) < self.padded_vocabulary:
                raise refuse(name, "give an id of the vocabulary")
        if "{instruction}" not in self.prompt:
            raise refuse("prompt", "it must contain {instruction}")

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

    actions: K x D. state: how many state values are taken, 0 for none.
    """

    def __init__(self, config: PrismaticConfig, actions: int, state: int) -> None:
        super().__init__()
        self.config, self.actions = config, actions
        self.vision_backbone = make_tower(config.vision, config.vision_options)
        self.projector = Projector(self.vision_backbone.features, config.hidden, config.projector)
        self.language_model = LanguageModel(config)
        if state:
            self.state_projector = nn.Linear(state, config.hidden)
        if config.placeholders == "learned":
            self.placeholders = nn.Parameter(torch.randn(actions, config.hidden) * 0.02)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor, state: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B, K*D, hidden): final hidden states from which the action tokens are read.

        pixels: as the tower's `prepare` gives them. ids, mask: (B, L) prompt ids, and True where not padding.
        state: (B, S) normalised; None where none is taken. dtype: of matrix products.
        """
        trunk = self.language_model.model
        embedded = trunk.embed_tokens(ids)
        said = mask[..., None].to(embedded.dtype)
        said[:, 0] = 0  # the first token says nothing about the task
        text = (embedded * said).sum(1) / said.sum(1).clamp(min=1)
        patches = self.projector(self.vision_backbone(pixels, text).to(dtype)).to(embedded.dtype)
        batch, count = patches.shape[:2]
        if self.config.placeholders == "learned":
            slots = self.placeholders.expand(batch, -1, -1)
        else:
            slots = embedded.new_zeros(batch, self.actions, self.config.hidden)
        parts = [embedded[:, :1], patches, embedded[:, 1:]]
        if state is not None:
            parts.append(linear(self.state_projector, state.to(dtype))[:, None].to(embedded.dtype))
        sequence = torch.cat([*parts, slots], 1)
        length = sequence.shape[1]
        seen = torch.cat([mask[:, :1], mask.new_ones(batch, count), mask[:, 1:]], 1)
        seen = functional.pad(seen, (0, length - seen.shape[1]), value=True)
        # The token of a position is read one position earlier, as in any language model.
        asked = slice(length - self.actions - 1, length - 1)
        out: Tensor = trunk(sequence, trunk.places(seen, self.config.attention, dtype), asked, dtype)
        return out

    def action_logits(self, hidden: Tensor) -> Tensor:
        """(…, hidden) -> (…, 256) float32: the head's action rows alone, also under an adapter."""
        return linear(self.language_model.lm_head, hidden, self.config.action_rows).float()
