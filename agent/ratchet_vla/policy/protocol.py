"""The Policy protocol: what the runtime and the learner may ask of any VLA.

Knows batches, tokens and log-probabilities. Knows nothing of robots, adapters' storage or learning algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ratchet_vla.contract import PolicySpec
from ratchet_vla.records import UInt8

__all__ = ["Chunks", "Policy", "PolicyInput"]


@dataclass
class PolicyInput:
    """A batch of B observations as the policy takes them.

    images: (B, V, H, W, 3) uint8, RGB, upright, V cameras in the order of `PolicySpec.cameras`; numpy or torch.
    state: (B, S) float32, the fields of `PolicySpec.state` concatenated, physical units; None where S = 0.
    instructions: B task descriptions in words.
    """

    images: UInt8 | Tensor
    state: Tensor | None
    instructions: Sequence[str]

    def __len__(self) -> int:
        return len(self.instructions)


@dataclass
class Chunks:
    """A batch of B action chunks.

    actions: (B, K, D) float32, physical units.
    tokens: (B, K, D) int64 in [0, bins); None for policies without tokens.
    log_prob: (B, K, D) float32 under the sampling distribution; zeros for greedy prediction.
    feature: (B, H) float32, mean of the final hidden states at the action positions, without gradient: what a value
        head reads. None for policies without one.
    """

    actions: Tensor
    tokens: Tensor | None
    log_prob: Tensor | None
    feature: Tensor | None = None


@runtime_checkable
class Policy(Protocol):
    """A VLA. Methods run without gradient except `log_prob`."""

    @property
    def spec(self) -> PolicySpec: ...

    @property
    def base_hash(self) -> str:
        """SHA-256 over the frozen base: configuration, statistics, tokenizer and tensors."""
        ...

    @property
    def module(self) -> torch.nn.Module:
        """The network whose linear layers carry adapters."""
        ...

    @property
    def takes_any_size(self) -> bool:
        """Whether images of any size go in, to be resized as in training."""
        ...

    @property
    def gives_probabilities(self) -> bool:
        """Whether samples can be learned from; False for a head that gives actions alone."""
        ...

    @property
    def sampled_shape(self) -> tuple[int, ...]:
        """Shape of one decision in `Chunks.tokens`: (K, D) bins, or a flow's chain (steps + 1, H, A)."""
        ...

    def actions_of(self, sampled: Tensor) -> Tensor:
        """What was sampled as actions (B, K, D) float32, physical units. sampled: (B, K, D) bins, or the last points
        (B, H, A) of chains."""
        ...

    def predict(self, batch: PolicyInput) -> Chunks:
        """Most likely chunk."""
        ...

    def sample(self, batch: PolicyInput, temperature: float, noise: Tensor) -> Chunks:
        """Sampled chunk.

        temperature: > 0; logits are divided by it, and log_prob is of the divided distribution.
        noise: (B, K, D) float32 uniform in [0, 1); the only source of randomness, so that an episode's actions depend
            on its own seed and not on what else is in the batch.
        """
        ...

    def log_prob(self, batch: PolicyInput, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy, both (B, K, D) float32, of given tokens, with gradient."""
        ...
