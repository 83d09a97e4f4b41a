"""How far a policy is from what it was, on given observations: KL(earlier || now), in nats per action token.

Knows the two forms of a decision's distribution. Knows no weights, no schedule and no file. Discrete policies have 256
probabilities per token. A flow policy's chain is a product of Gaussian steps of known deviation, so that
KL(earlier || now) of a step is |mean - earlier mean|^2 / (2 variance); one step, drawn at random, stands for all.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.flow import sde
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.protocol import Policy, PolicyInput


class Divergence(Protocol):
    """KL from stored distributions of one kind of policy."""

    def targets(self, observations: PolicyInput, sampled: Tensor) -> Tensor:
        """The policy's distribution as it is now, (B, …) float16 on the CPU, without gradient."""
        ...

    def loss(self, observations: PolicyInput, sampled: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """KL(targets || now), nats per action token, mean over B decisions, with gradient.

        sampled: (B, …), see `Decisions`. targets: of the same decisions. generator: of what is drawn at random.
        """
        ...


class CategoricalDivergence:
    """For policies with action tokens; targets are log-probabilities (B, K, D, 256)."""

    def __init__(self, policy: PrismaticPolicy) -> None:
        self._policy = policy

    @torch.no_grad()
    def targets(self, observations: PolicyInput, sampled: Tensor) -> Tensor:
        """See `Divergence.targets`."""
        return self._policy.logits(observations, sampled).float().log_softmax(-1).half().cpu()

    def loss(self, observations: PolicyInput, sampled: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """See `Divergence.loss`."""
        current = self._policy.logits(observations, sampled).float().log_softmax(-1)
        earlier = targets.to(current.device).float()
        per_token: Tensor = (earlier.exp() * (earlier - current)).sum(-1)
        return per_token.mean()


class FlowDivergence:
    """For flow policies; targets are velocities (B, steps, H, A) at the points of the sampled chain."""

    def __init__(self, policy: FlowPolicy) -> None:
        self._policy = policy
        config = policy.config
        self._mixing = sde.mixing(config.horizon, config.shock_correlation)

    @torch.no_grad()
    def targets(self, observations: PolicyInput, sampled: Tensor) -> Tensor:
        """See `Divergence.targets`."""
        policy = self._policy
        velocity = policy.velocity(policy.prefix(observations))
        chain = sampled.to(policy.device, torch.float32)
        steps = chain.shape[1] - 1
        at_points = [
            velocity(chain[:, index], torch.full((len(chain),), time, device=policy.device))
            for index, time in enumerate(sde.times(steps))
        ]
        return torch.stack(at_points, 1).half().cpu()

    def loss(self, observations: PolicyInput, sampled: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """See `Divergence.loss`."""
        policy = self._policy
        chain = sampled.to(policy.device, torch.float32)
        steps = chain.shape[1] - 1
        index = int(torch.randint(0, steps, (1,), generator=generator))
        time = sde.times(steps)[index]
        point = chain[:, index]
        velocity = policy.velocity(policy.prefix(observations))
        current = velocity(point, torch.full((len(chain),), time, device=policy.device))
        earlier = targets[:, index].to(policy.device).float()
        level = policy.config.noise_level
        current_mean, deviation = sde.mean_of(point, current, time, steps, level)
        earlier_mean, _ = sde.mean_of(point, earlier, time, steps, level)
        offset = torch.linalg.solve_triangular(self._mixing.to(policy.device), current_mean - earlier_mean, upper=False)
        per_chain: Tensor = 0.5 * (offset / deviation).square().sum((1, 2)) * steps
        tokens = policy.spec.chunk * len(policy.spec.action_names)
        return per_chain.mean() / tokens


def divergence_of(policy: Policy) -> Divergence:
    """The divergence that fits a policy.

    Raises:
        RatchetError: learn.cannot_retain for a policy whose decisions have no distribution.
    """
    if isinstance(policy, FlowPolicy):
        return FlowDivergence(policy)
    if isinstance(policy, PrismaticPolicy) and policy.gives_probabilities:
        return CategoricalDivergence(policy)
    raise RatchetError(
        "learn.cannot_retain",
        "this policy gives actions without probabilities, so no reference set can hold it",
        where=policy.spec.statistics_key,
        fix="--reference none",
    )
