"""A small convolutional policy over action tokens, without pretraining: what a VLA is held against.

Knows pixels, words as a bag, and one distribution per action of the chunk. Has no language model and no attention.
Normalisation, sampling and log-probabilities are those of the policy that it is made like, so that a comparison of the
two compares networks and nothing else.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from ratchet_vla.policy.discrete.action_tokens import BINS
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.layers.vision import make_tower

CHANNELS = (32, 64, 96, 128)


class CnnNetwork(nn.Module):
    """Convolutions that the instruction modulates, two linear layers, one token head that all positions share.

    views: cameras. actions: K x D positions. state: values of the robot's state, 0 for none. width: of hidden layers.
    """

    def __init__(
        self, *, image_size: int, views: int, vocabulary: int, actions: int, state: int, width: int, channels: list[int]
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.vision_backbone = make_tower("film_conv", {"image_size": image_size, "channels": channels, "text": width})
        seen = views * self.vision_backbone.patches * self.vision_backbone.features
        self.trunk = nn.Linear(seen + width + state, width)
        self.position = nn.Parameter(0.5 * torch.randn(actions, width))
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, BINS)

    def forward(
        self,
        pixels: Tensor,
        ids: Tensor,
        mask: Tensor,
        state: Tensor | None,
        dtype: torch.dtype,
        given: Tensor | None = None,
    ) -> Tensor:
        """As `PrismaticNetwork.forward`: (B, K*D, width), one hidden state per action of the chunk; all at once, so
        that `given` is not read."""
        present = mask[..., None].to(self.words.weight.dtype)
        text = (self.words(ids) * present).sum(1) / present.sum(1).clamp(min=1)
        parts = [self.vision_backbone(pixels, text).flatten(1), text]
        if state is not None:
            parts.append(state)
        hidden = functional.gelu(self.trunk(torch.cat([p.float() for p in parts], 1)))
        out: Tensor = functional.gelu(self.mix(functional.gelu(hidden[:, None] + self.position)))
        return out

    def action_logits(self, hidden: Tensor) -> Tensor:
        """(…, width) -> (…, 256) float32."""
        out: Tensor = self.head(hidden)
        return out.float()


def small_cnn(like: PrismaticPolicy, *, seed: int, width: int = 512) -> PrismaticPolicy:
    """A policy with random convolutional weights that takes and gives what `like` does.

    Its size follows the frames: with width 512 about 4 million parameters at 96 pixels, 14 million at 224, and the
    table of words.
    """
    made = copy.copy(like)  # shares specification, statistics, tokenizer and prompt, which are never written
    made.config = dataclasses.replace(like.config, decoding="parallel", head="tokens")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CnnNetwork(
            image_size=like.spec.image_size,
            views=len(like.spec.cameras),
            vocabulary=like.config.padded_vocabulary,
            actions=like.actions,
            state=like.spec.state_size if like.spec.state else 0,
            width=width,
            channels=list(CHANNELS),
        )
    made.network = network.to(like.device).eval()  # type: ignore[assignment]  # another network behind the same calls
    made.base_changed()
    return made
