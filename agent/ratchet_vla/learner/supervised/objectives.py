"""What supervised training minimises, per kind of policy: cross-entropy on action tokens, or the flow-matching loss.

Knows a policy's loss and what to report of it. Knows no optimiser, no schedule and no file.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.protocol import PolicyInput

__all__ = ["FlowObjective", "Objective", "TokenObjective"]


class Objective(Protocol):
    """A loss over samples whose actions it was made with."""

    def loss(self, batch: PolicyInput, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Scalar with gradient. rows: (B,) which samples the observations are of. generator: of any randomness."""
        ...

    def measure(self, batch: PolicyInput, rows: Tensor) -> tuple[float, float, float]:
        """Loss, error and entropy on samples, without gradient.

        error: mean absolute error of the prediction, in bins or in deviations of the data. entropy: nats per token, 0
        where there is none to report.
        """
        ...


def objective_of(policy: PrismaticPolicy | FlowPolicy, actions: Tensor, smoothing: float) -> Objective:
    """actions: (M, K, D) float32, physical units, of all samples. smoothing: of tokens, in bins."""
    if isinstance(policy, FlowPolicy):
        return FlowObjective(policy, actions)
    return TokenObjective(policy, actions, smoothing)


def soft_targets(tokens: Tensor, bins: int, smoothing: float) -> Tensor:
    """(…,) int64 -> (…, bins) float32: a Gaussian around each token, normalised over the bins that exist."""
    if smoothing <= 0:
        return functional.one_hot(tokens, bins).float()
    distance = torch.arange(bins, device=tokens.device) - tokens[..., None]
    gaussian = torch.exp(-0.5 * (distance / smoothing) ** 2)
    return gaussian / gaussian.sum(-1, keepdim=True)


class TokenObjective:
    """Cross-entropy with a Gaussian over neighbouring bins."""

    def __init__(self, policy: PrismaticPolicy, actions: Tensor, smoothing: float) -> None:
        self.policy = policy
        self.smoothing = smoothing
        self.tokens = policy.tokens_of(actions)  # (M, K, D)

    def loss(self, batch: PolicyInput, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy, mean over tokens. rows: (B,)."""
        return self._of(self.policy.logits(batch, self.tokens[rows]), rows)

    def measure(self, batch: PolicyInput, rows: Tensor) -> tuple[float, float, float]:
        """Loss, error in bins and entropy; see `Objective.measure`."""
        logits = self.policy.logits(batch, self.tokens[rows]).float()
        error = (logits.argmax(-1) - self.tokens[rows].to(logits.device)).abs().float().mean()
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()  # type: ignore[no-untyped-call]
        return float(self._of(logits, rows)), float(error), float(entropy)

    def _of(self, logits: Tensor, rows: Tensor) -> Tensor:
        soft_target = soft_targets(self.tokens[rows].to(logits.device), logits.shape[-1], self.smoothing)
        return -(soft_target * functional.log_softmax(logits.float(), -1)).sum(-1).mean()


class FlowObjective:
    """Squared error of the velocity at random times, more of them near the noise: Beta(1.5, 1) as in pi0."""

    def __init__(self, policy: FlowPolicy, actions: Tensor) -> None:
        self.policy = policy
        self.actions = actions

    def loss(self, batch: PolicyInput, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Flow-matching loss, mean over samples. rows: (B,)."""
        config = self.policy.config
        noise = torch.randn((len(rows), config.horizon, config.action_width), generator=generator)
        # The inverse of Beta(1.5, 1)'s distribution function is u^(2/3); the ends 0 and 1 are left out, as in pi0.
        flow_time = torch.rand(len(rows), generator=generator) ** (2 / 3) * 0.999 + 0.001
        return self.policy.loss(batch, self.actions[rows], noise, flow_time).mean()

    def measure(self, batch: PolicyInput, rows: Tensor) -> tuple[float, float, float]:
        """Loss, error in deviations of the data, and 0; see `Objective.measure`."""
        # The same noise and times at every validation, so that the figures can be compared.
        loss = self.loss(batch, rows, torch.Generator().manual_seed(0))
        demonstrated = self.actions[rows].to(self.policy.device)
        action_scale = torch.tensor(self.policy.statistics.action_scale, device=self.policy.device)
        error = ((self.policy.predict(batch).actions - demonstrated) / action_scale).abs().mean()
        return float(loss), float(error), 0.0
