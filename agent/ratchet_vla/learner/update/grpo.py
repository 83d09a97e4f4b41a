"""GRPO, the update of the published recipe (arXiv 2603.11653), in one file: advantages of groups, then a clipped loss.

Knows scores, groups, log-probabilities and masks. Knows no policy, no environment, no optimiser and no file.
Shapes: E episodes, C chunks (padded), N chunk samples, K control steps in a chunk, D action dimensions.

    from a rollout:        targets = grpo.targets(score, group, valid, config)
                           batch = flatten(targets, old_log_prob, valid)
    each optimiser step:   log_prob, entropy = policy.log_prob(...)
                           loss, diagnostics = grpo.loss(log_prob, entropy, batch, config)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.update.advantages import group_normalised, leave_one_out, require_shape
from ratchet_vla.learner.update.minibatch import Diagnostics, Minibatch, Targets, diagnose, masked_log_ratio

__all__ = ["GrpoConfig", "loss", "targets"]


@dataclass(frozen=True)
class GrpoConfig:
    """Constants of the update; the defaults are the published recipe's. No KL term and no entropy term exist."""

    clip_low: float = 0.20
    """The ratio is clipped below at 1 - clip_low; in (0, 1)."""
    clip_high: float = 0.28
    """The ratio is clipped above at 1 + clip_high; > 0. Above clip_low, so that rare actions can become likely."""
    horizon: int = 512
    """Control steps before an attempt counts as failed; a trajectory's loss is divided by (valid steps / horizon)."""
    estimator: Literal["group", "leave_one_out"] = "group"
    """An episode against its group: normalised by the group's deviation (GRPO), or leave-one-out (RLOO)."""
    epsilon: float = 1e-6
    """Added to the group's standard deviation, in units of the score; > 0. Not used by leave_one_out."""

    def __post_init__(self) -> None:
        for setting, in_range in (
            ("clip_low", 0 < self.clip_low < 1),
            ("clip_high", self.clip_high > 0),
            ("horizon", self.horizon >= 1),
            ("estimator", self.estimator in ("group", "leave_one_out")),
            ("epsilon", self.epsilon > 0),
        ):
            if not in_range:
                raise RatchetError(
                    "learner.bad_config", f"{setting} = {getattr(self, setting)!r} is out of range", where="GrpoConfig"
                )


def targets(score: Tensor, group: Tensor, valid: Tensor, config: GrpoConfig) -> Targets:
    """Advantages and trajectory weights of one update.

    Args:
        score: (E,) floating, total reward of each episode (the recipe gives 5 for success, 0 for failure).
        group: (E,) int64; episodes with one label started in the same initial state.
        valid: (E, C, K) bool, control steps that enter the loss: run, not after the first success, executed exactly
            as sampled.

    Returns:
        advantage: (E, C), the episode's advantage on each chunk.
        weight: (E,), horizon / valid steps; 0 for masked groups and for episodes without a valid step.
        slots: E * horizon / K, the chunk samples of E unfinished episodes. Masked episodes stay in the mean.

    The horizon cancels: the loss over all samples is the mean over episodes of each episode's mean token loss, so a
    short success counts as much as a long failure.

    Raises:
        RatchetError: learner.bad_shape, learner.not_finite.
    """
    if valid.ndim != 3:
        raise RatchetError(
            "learner.bad_shape", f"valid is {tuple(valid.shape)}, expected (episodes, chunks, steps)", where="valid"
        )
    episodes, chunks, chunk_steps = valid.shape
    require_shape("score", score, (episodes,))
    if config.estimator == "group":
        comparison = group_normalised(score, group, config.epsilon)
    else:
        comparison = leave_one_out(score, group)

    valid_steps = valid.sum(dim=(1, 2)).to(score.dtype)  # (E,)
    is_kept = comparison.keep & (valid_steps > 0)
    weight = torch.where(is_kept, config.horizon / valid_steps.clamp(min=1), 0.0)
    return Targets(
        advantage=comparison.advantage[:, None].expand(episodes, chunks),
        weight=weight,
        slots=episodes * config.horizon / chunk_steps,
        groups=comparison.groups,
        masked_groups=comparison.masked_groups,
    )


def loss(log_prob: Tensor, entropy: Tensor, batch: Minibatch, config: GrpoConfig) -> tuple[Tensor, Diagnostics]:
    """The clipped policy loss, one ratio per token.

        ratio = exp(log_prob - old_log_prob)
        term = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
        loss = sum over valid tokens of (horizon / valid steps of the trajectory) * term  /  (slots * K * D)

    Args:
        log_prob: (N, K, D) floating with gradient, log-probability of the sampled tokens under the policy now.
        entropy: (N, K, D) floating, entropy of each token's distribution; a diagnostic only.
        batch: the samples; see `Minibatch`.

    Returns:
        Scalar loss with gradient, and its diagnostics.

    Raises:
        RatchetError: learner.bad_shape, learner.not_finite.
    """
    log_ratio, token_mask = masked_log_ratio(log_prob, entropy, batch)
    ratio = log_ratio.exp()  # (N, K, D)
    advantage = batch.advantage[:, None, None]  # (N, 1, 1)

    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    term = torch.maximum(unclipped, clipped)  # the maximum, because both carry the minus of the formula

    weighted = torch.where(token_mask, term * batch.weight[:, None, None], torch.zeros_like(term))
    # Divided by the slots of the whole optimiser step and not by these tokens, so that micro-batches' losses add up.
    _, chunk_steps, dims = log_prob.shape
    policy_loss = weighted.sum() / (batch.slots * chunk_steps * dims)

    clip = (config.clip_low, config.clip_high)
    return policy_loss, diagnose(log_ratio, entropy, token_mask, ratio, token_mask, advantage, clip, policy_loss)
