"""What an optimiser step sees: chunk samples flattened over episodes, and the diagnostics of a loss over them.

Knows shapes, masks and how to split samples so that gradients add up. Knows no policy, no environment and no loss.
Shapes: E episodes, C chunks (padded), N chunk samples, K control steps in a chunk, D action dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.update.advantages import require_shape


@dataclass(frozen=True)
class Targets:
    """What an estimator computed for E padded episodes; `flatten` turns it into a `Minibatch`.

    advantage: (E, C) floating, per chunk.
    weight: (E,) floating, factor on every term of the episode's policy loss; 0 drops the episode.
    slots: number that the summed loss of the whole update is divided by, in chunk samples (see `Minibatch.slots`).
    returns: (E, C) value targets, None for estimators without a value head.
    groups, masked_groups: groups compared and groups masked; 0 where there are none.
    """

    advantage: Tensor
    weight: Tensor
    slots: float
    returns: Tensor | None = None
    groups: int = 0
    masked_groups: int = 0

    @property
    def masked_share(self) -> float:
        """Share of groups without a gradient, in [0, 1]; 0 where there are no groups."""
        return self.masked_groups / self.groups if self.groups else 0.0


@dataclass(frozen=True)
class Minibatch:
    """N chunk samples.

    old_log_prob: (N, K, D) float32, log-probability of each token when it was sampled, temperature included.
    advantage: (N,) floating.
    valid: (N, K) bool, control steps that enter the loss: they ran, no later than the first success, and reached the
        robot exactly as sampled. Log-probabilities at other steps may hold anything, NaN included.
    weight: (N,) floating, the trajectory's factor.
    slots: the summed loss is divided by this number of chunk samples. It is a property of the optimiser step and not
        of this object's N, so that the losses of the parts from `micro` add up to the loss of the whole.
    index: (N, 2) int64, episode and chunk of each sample, to fetch its observation.
    old_value, returns: (N,) floating for losses with a value head, otherwise None.
    """

    old_log_prob: Tensor
    advantage: Tensor
    valid: Tensor
    weight: Tensor
    slots: float
    index: Tensor
    old_value: Tensor | None = None
    returns: Tensor | None = None

    def __post_init__(self) -> None:
        if self.old_log_prob.ndim != 3:
            raise RatchetError(
                "learner.bad_shape",
                f"old_log_prob is {tuple(self.old_log_prob.shape)}, expected (samples, steps, dimensions)",
                where="minibatch",
            )
        n, k, _ = self.old_log_prob.shape
        shapes = {"advantage": (n,), "valid": (n, k), "weight": (n,), "index": (n, 2)}
        shapes.update({"old_value": (n,), "returns": (n,)})
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None:
                require_shape(name, tensor, shape)
        if self.valid.dtype != torch.bool:
            raise RatchetError("learner.bad_mask", f"valid is {self.valid.dtype}, expected bool", where="minibatch")
        if not self.slots > 0:
            raise RatchetError("learner.bad_slots", f"slots is {self.slots}, expected > 0", where="minibatch")

    def __len__(self) -> int:
        return self.old_log_prob.shape[0]

    def to(self, device: torch.device | str) -> Minibatch:
        """The same samples on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **moved)

    def take(self, rows: Tensor, slots: float) -> Minibatch:
        """The samples at `rows` (int64), as part of an optimiser step of `slots` chunk samples."""
        taken: dict[str, Any] = {name: tensor[rows] for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, slots=slots, **taken)

    def shuffled(self, count: int, generator: torch.Generator) -> list[Minibatch]:
        """At most `count` optimiser steps of nearly equal size, in random order, every sample once.

        Each part's slots are in proportion to its samples, so each part's loss estimates the loss of the whole.
        (The published code also shuffles padding, so the number of real samples per step varies there.)
        """
        shuffled_rows = torch.randperm(len(self), generator=generator)
        row_sets = [rows for rows in torch.tensor_split(shuffled_rows, count) if len(rows)]
        return [self.take(rows, self.slots * len(rows) / len(self)) for rows in row_sets]

    def micro(self, size: int) -> Iterator[Minibatch]:
        """Parts of at most `size` samples for gradient accumulation: their losses and gradients sum to the whole's."""
        for start in range(0, len(self), size):
            yield self.take(torch.arange(start, min(start + size, len(self))), self.slots)

    def _tensors(self) -> dict[str, Tensor]:
        values = {member.name: getattr(self, member.name) for member in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def flatten(targets: Targets, old_log_prob: Tensor, valid: Tensor, old_value: Tensor | None = None) -> Minibatch:
    """Chunk samples of E padded episodes, without padding, masked episodes and chunks that have no valid step.

    Args:
        targets: from `grpo.targets` or `ppo.targets`.
        old_log_prob: (E, C, K, D) float32.
        valid: (E, C, K) bool, as in `Minibatch.valid`.
        old_value: (E, C) floating, the value head's output when the chunk was sampled.

    Raises:
        RatchetError: learner.bad_shape; learner.no_samples where nothing is left to learn from.
    """
    if old_log_prob.ndim != 4:
        raise RatchetError(
            "learner.bad_shape",
            f"old_log_prob is {tuple(old_log_prob.shape)}, expected (episodes, chunks, steps, dimensions)",
            where="flatten",
        )
    e, c, k, _ = old_log_prob.shape
    require_shape("valid", valid, (e, c, k))
    require_shape("advantage", targets.advantage, (e, c))
    require_shape("weight", targets.weight, (e,))
    chosen = valid.any(dim=2) & (targets.weight > 0)[:, None]
    index = chosen.nonzero()
    if len(index) == 0:
        raise RatchetError(
            "learner.no_samples",
            "no chunk has a gradient: every group is all success or all failure, or nothing ran as sampled",
            where="flatten",
            fix="train on tasks whose success rate is between 15 and 85 %",
        )
    return Minibatch(
        old_log_prob=old_log_prob[chosen],
        advantage=targets.advantage[chosen],
        valid=valid[chosen],
        weight=targets.weight[index[:, 0]],
        slots=targets.slots,
        index=index,
        old_value=None if old_value is None else old_value[chosen],
        returns=None if targets.returns is None else targets.returns[chosen],
    )


@dataclass(frozen=True)
class Diagnostics:
    """Sums over the tokens of one loss call; `+` merges micro-batches and minibatches exactly.

    tokens: valid tokens; terms: ratios compared with the clip (tokens, or chunks where the ratio is per chunk).
    clipped: terms whose gradient the clip removed. kl, entropy: sums over tokens, nats. ratio: sum over terms.
    ratio_max: largest ratio. policy_loss, value_loss: as they enter the loss, summed over calls.
    """

    tokens: int = 0
    terms: int = 0
    clipped: int = 0
    kl: float = 0.0
    entropy: float = 0.0
    ratio: float = 0.0
    ratio_max: float = 0.0
    policy_loss: float = 0.0
    value_loss: float = 0.0

    def __add__(self, other: Diagnostics) -> Diagnostics:
        own_sums = dataclasses.asdict(self)
        other_sums = dataclasses.asdict(other)
        merged = {name: own_sums[name] + other_sums[name] for name in own_sums}
        merged["ratio_max"] = max(self.ratio_max, other.ratio_max)
        return Diagnostics(**merged)

    def means(self) -> dict[str, float]:
        """The figures to log.

        clip_fraction: share of terms in [0, 1]. approx_kl: nats per token, the k3 estimate of KL(old || new),
        mean of ratio - 1 - log ratio (Schulman 2020, "Approximating KL divergence"). entropy: nats per token.
        """
        tokens = max(self.tokens, 1)
        terms = max(self.terms, 1)
        return {
            "policy_loss": self.policy_loss,
            "value_loss": self.value_loss,
            "clip_fraction": self.clipped / terms,
            "approx_kl": self.kl / tokens,
            "entropy": self.entropy / tokens,
            "ratio_mean": self.ratio / terms,
            "ratio_max": self.ratio_max,
        }


def masked_log_ratio(log_prob: Tensor, entropy: Tensor, batch: Minibatch) -> tuple[Tensor, Tensor]:
    """Token log-ratios, zero where masked (NaN there reaches neither loss nor gradient), and the token mask.

    Args:
        log_prob, entropy: (N, K, D), from the policy being updated.

    Returns:
        log_ratio (N, K, D) with gradient, mask (N, K, D) bool.

    Raises:
        RatchetError: learner.bad_shape; learner.not_finite where a valid log-probability is NaN or infinite.
    """
    shape = tuple(batch.old_log_prob.shape)
    require_shape("log_prob", log_prob, shape)
    require_shape("entropy", entropy, shape)
    mask = batch.valid[..., None].expand(shape)
    log_ratio = torch.where(mask, log_prob - batch.old_log_prob, torch.zeros_like(log_prob))
    if not bool(torch.isfinite(log_ratio).all()):
        raise RatchetError(
            "learner.not_finite",
            "log-probabilities of executed actions are not finite",
            where="log_prob",
            fix="the policy must give probabilities for the tokens it sampled; check head and temperature",
        )
    return log_ratio, mask


def diagnose(
    log_ratio: Tensor, entropy: Tensor, mask: Tensor, ratio: Tensor, counted: Tensor, advantage: Tensor,
    clip: tuple[float, float], policy_loss: Tensor, value_loss: Tensor | None = None,
) -> Diagnostics:  # fmt: skip
    """Diagnostics of one loss call; without gradient.

    Args:
        log_ratio, entropy, mask: (N, K, D), token level.
        ratio, counted: one shape, the terms compared with the clip and which of them count; advantage broadcasts.
        clip: (low, high), the ratio stays in [1 - low, 1 + high].
    """
    with torch.no_grad():
        # The clip removes a gradient only where it binds: too high with a positive advantage, too low with a negative.
        binds = ((advantage > 0) & (ratio > 1 + clip[1])) | ((advantage < 0) & (ratio < 1 - clip[0]))
        nothing = torch.zeros((), dtype=log_ratio.dtype, device=log_ratio.device)
        k3 = log_ratio.exp() - 1 - log_ratio
        return Diagnostics(
            tokens=int(mask.sum()),
            terms=int(counted.sum()),
            clipped=int((binds & counted).sum()),
            kl=float(torch.where(mask, k3, nothing).sum()),
            entropy=float(torch.where(mask, entropy, nothing).sum()),
            ratio=float(torch.where(counted, ratio, nothing).sum()),
            ratio_max=float(torch.where(counted, ratio, nothing).max()),
            policy_loss=float(policy_loss),
            value_loss=float(value_loss) if value_loss is not None else 0.0,
        )
