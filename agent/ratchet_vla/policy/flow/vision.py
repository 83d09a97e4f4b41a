"""Vision towers of flow policies: images in [0, 1] to tokens as wide as the language model.

Knows three towers: SigLIP with a linear projection (pi0), SmolVLM's with pixel shuffling (SmolVLA), both transformers'
own modules, and the small FiLM-modulated convolutions of the built-in VLA. Knows no language model and no action.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.configuration import tuples_for_lists
from ratchet_vla.policy.layers.vision import FilmConv


class Siglip(nn.Module):
    """SigLIP's last hidden states through one linear layer; pi0."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        config = SiglipVisionConfig(vision_use_head=False, **options)
        config._attn_implementation = "sdpa"
        self.tower = SiglipVisionModel(config)
        self.linear = nn.Linear(config.hidden_size, width)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        """(N, 3, size, size) in [0, 1] -> (N, patches, width)."""
        out: Tensor = self.linear(self.tower(pixel_values=pixels * 2 - 1).last_hidden_state)
        return out


class SmolVlm(nn.Module):
    """SmolVLM's SigLIP with positions for any size, then `shuffle` x `shuffle` patches as one token; SmolVLA."""

    def __init__(self, width: int, shuffle: int, **options: Any) -> None:
        super().__init__()
        config = SmolVLMVisionConfig(**options)
        config._attn_implementation = "sdpa"
        self.shuffle = shuffle
        self.tower = SmolVLMVisionTransformer(config)
        self.proj = nn.Linear(config.hidden_size * shuffle * shuffle, width, bias=False)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        """(N, 3, size, size) in [0, 1] -> (N, patches / shuffle^2, width)."""
        x: Tensor = self.tower(pixel_values=pixels * 2 - 1).last_hidden_state
        count, patches, inner = x.shape
        side = round(patches**0.5)
        s = self.shuffle
        x = x.reshape(count, side // s, s, side // s, s * inner).transpose(2, 3)
        out: Tensor = self.proj(x.reshape(count, patches // s**2, s * s * inner))
        return out


class Film(nn.Module):
    """The built-in VLA's convolutions, which the instruction modulates at every stage, and two layers on top."""

    def __init__(self, width: int, image_size: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.tower = FilmConv(image_size=image_size, channels=channels, text=width)
        self.fc1 = nn.Linear(channels[-1], width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        """(N, 3, size, size) in [0, 1] -> (N, patches, width)."""
        x = self.tower((pixels * 2 - 1)[:, None], text)
        out: Tensor = self.fc2(torch.nn.functional.gelu(self.fc1(x)))
        return out


TOWERS: dict[str, type[nn.Module]] = {"siglip": Siglip, "smolvlm": SmolVlm, "film_conv": Film}


def make_vision(kind: str, options: Mapping[str, Any], width: int) -> nn.Module:
    """Raises RatchetError policy.unknown_vision_tower, policy.bad_config."""
    if kind not in TOWERS:
        raise RatchetError(
            "policy.unknown_vision_tower", f"no vision tower '{kind}'", fix=f"one of {', '.join(TOWERS)}"
        )
    try:
        return TOWERS[kind](width=width, **tuples_for_lists(options))
    except TypeError as error:
        raise RatchetError("policy.bad_config", f"vision_options: {error}", where=kind) from None
