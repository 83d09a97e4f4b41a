"""PPO with a value head, the recipe's actor-critic variant, in one file: GAE per chunk, clipped policy and value loss.

Knows rewards, values, log-probabilities and masks. Knows no policy, no environment, no optimiser and no file.
Shapes: E episodes, C chunks (padded), N chunk samples, K control steps in a chunk, D action dimensions, H features.

    from a rollout:        targets = ppo.targets(reward, value, present, final_value, terminated, valid, config)
                           batch = flatten(targets, old_log_prob, valid, old_value=value)
    each optimiser step:   log_prob, entropy = policy.log_prob(...);  value = value_head(features)
                           loss, diagnostics = ppo.loss(log_prob, entropy, value, batch, config)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.update.advantages import gae, require_shape
from ratchet_vla.learner.update.minibatch import Diagnostics, Minibatch, Targets, diagnose, masked_log_ratio

__all__ = ["PpoConfig", "ValueHead", "loss", "targets"]


@dataclass(frozen=True)
class PpoConfig:
    """Constants of the update; the defaults are the published recipe's PPO variant."""

    clip_low: float = 0.20
    """The ratio is clipped below at 1 - clip_low; in (0, 1)."""
    clip_high: float = 0.28
    """The ratio is clipped above at 1 + clip_high; > 0."""
    granularity: Literal["token", "chunk"] = "token"
    """One ratio per token, or one per chunk: the product over the chunk's valid tokens."""
    gamma: float = 0.99
    """Discount per chunk, in [0, 1]."""
    lam: float = 0.95
    """GAE's lambda, in [0, 1]: 0 trusts the value head, 1 trusts the returns."""
    value_clip: float = 0.2
    """The value may move this far from the value at sampling time before its loss is clipped; > 0, reward units."""
    huber_delta: float = 10.0
    """The value loss is quadratic up to this error and linear beyond; > 0, reward units."""
    value_coefficient: float = 1.0
    """Factor on the value loss; >= 0."""
    value_learning_rate: float = 3e-3
    """Learning rate of the value head, which starts from nothing and must move faster than the adapter; > 0."""
    entropy_coefficient: float = 0.0
    """Factor on the entropy bonus; >= 0, 0 for none as in the recipe."""
    normalise_advantage: bool = True
    """Centre advantages and divide by their deviation, over all chunks of the update that have a valid step."""

    def __post_init__(self) -> None:
        for setting, in_range in (
            ("clip_low", 0 < self.clip_low < 1),
            ("clip_high", self.clip_high > 0),
            ("granularity", self.granularity in ("token", "chunk")),
            ("gamma", 0 <= self.gamma <= 1),
            ("lam", 0 <= self.lam <= 1),
            ("value_clip", self.value_clip > 0),
            ("huber_delta", self.huber_delta > 0),
            ("value_coefficient", self.value_coefficient >= 0),
            ("value_learning_rate", self.value_learning_rate > 0),
            ("entropy_coefficient", self.entropy_coefficient >= 0),
        ):
            if not in_range:
                raise RatchetError(
                    "learner.bad_config", f"{setting} = {getattr(self, setting)!r} is out of range", where="PpoConfig"
                )


class ValueHead(nn.Module):
    """Value of an observation from the policy's feature: LayerNorm, one hidden layer, one number.

    The last layer starts at zero, so that the first advantages are those of the returns alone.
    """

    def __init__(self, features: int, hidden: int = 256) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.hidden = nn.Linear(features, hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """feature: (B, H) floating, any dtype; returns (B,) in the head's own dtype (keep it float32)."""
        normalised = self.norm(feature.to(self.norm.weight.dtype))
        value: Tensor = self.out(nn.functional.silu(self.hidden(normalised))).squeeze(-1)
        return value


def parameter_groups(
    adapter: Iterable[nn.Parameter], head: ValueHead, learning_rate: float, config: PpoConfig
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimiser: the adapter at `learning_rate`, the value head at its own."""
    return [
        {"params": list(adapter), "lr": learning_rate},
        {"params": list(head.parameters()), "lr": config.value_learning_rate},
    ]


def targets(
    reward: Tensor, value: Tensor, present: Tensor, final_value: Tensor, terminated: Tensor, valid: Tensor,
    config: PpoConfig,
) -> Targets:  # fmt: skip
    """Advantages, returns and weights of one update.

    Args:
        reward: (E, C) floating, sum over each chunk's control steps.
        value: (E, C) floating, the value head's output when the chunk was sampled.
        present, final_value, terminated: as in `advantages.gae`, which states the bootstrapping rules.
        valid: (E, C, K) bool, control steps that enter the loss; subset of the chunks present.

    Returns:
        advantage, returns: (E, C). weight: (E,), all 1. slots: chunks with a valid step, so the loss is their mean.

    Raises:
        RatchetError: learner.bad_shape, learner.bad_mask, learner.not_finite.
    """
    advantage, returns = gae(reward, value, present, final_value, terminated, gamma=config.gamma, lam=config.lam)
    require_shape("valid", valid, (*present.shape, valid.shape[-1]))
    is_counted = valid.any(dim=2)
    if bool((is_counted & ~present).any()):
        raise RatchetError("learner.bad_mask", "valid control steps in a chunk that is not present", where="valid")
    if config.normalise_advantage and int(is_counted.sum()) > 1:
        # Over the chunks that count alone: padding would pull the mean towards 0.
        counted_advantages = advantage[is_counted]
        advantage = torch.where(
            is_counted, (advantage - counted_advantages.mean()) / (counted_advantages.std() + 1e-8), 0.0
        )
    weight = torch.ones_like(final_value)
    return Targets(advantage=advantage, weight=weight, slots=max(float(is_counted.sum()), 1.0), returns=returns)


def loss(
    log_prob: Tensor, entropy: Tensor, value: Tensor, batch: Minibatch, config: PpoConfig
) -> tuple[Tensor, Diagnostics]:
    """Policy loss + value_coefficient * value loss - entropy_coefficient * entropy; each a mean over chunks.

        token:  ratio = exp(log_prob - old_log_prob) per token; a chunk's term is the mean over its valid tokens
        chunk:  ratio = exp(sum over the chunk's valid tokens of (log_prob - old_log_prob)); one term per chunk
        term = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
        value term = max(huber(value - return), huber(old_value + clip(value - old_value, +-value_clip) - return))
        loss = sum over chunks of weight * (...)  /  slots

    Source: Schulman et al. (arXiv 1707.06347), equation 7; value clipping as in OpenAI's baselines (ppo2).

    Args:
        log_prob: (N, K, D) floating with gradient, log-probability of the sampled tokens under the policy now.
        entropy: (N, K, D) floating; needs a gradient only where entropy_coefficient > 0.
        value: (N,) floating with gradient, the value head's output now.
        batch: the samples, with old_value and returns; a chunk without a valid step contributes nothing.

    Raises:
        RatchetError: learner.bad_shape, learner.not_finite; learner.no_value where the batch has no value targets.
    """
    if batch.old_value is None or batch.returns is None:
        raise RatchetError(
            "learner.no_value",
            "PPO needs values and returns",
            where="minibatch",
            fix="make the batch with ppo.targets and pass old_value to flatten",
        )
    require_shape("value", value, (len(batch),))
    log_ratio, token_mask = masked_log_ratio(log_prob, entropy, batch)
    is_counted = batch.valid.any(dim=1)
    nothing = torch.zeros((), dtype=log_prob.dtype, device=log_prob.device)

    if config.granularity == "chunk":
        ratio = log_ratio.sum(dim=(1, 2)).exp()
        advantage = batch.advantage
        is_term = is_counted
    else:
        ratio = log_ratio.exp()
        advantage = batch.advantage[:, None, None]
        is_term = token_mask
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    term = torch.maximum(unclipped, clipped)
    policy_term = term if config.granularity == "chunk" else _token_mean(term, token_mask)
    policy_loss = _chunk_mean(policy_term, is_counted, batch)

    error = value - batch.returns
    clipped_error = (
        batch.old_value + (value - batch.old_value).clamp(-config.value_clip, config.value_clip) - batch.returns
    )
    value_term = torch.maximum(huber(error, config.huber_delta), huber(clipped_error, config.huber_delta))
    value_loss = _chunk_mean(value_term, is_counted, batch)

    total = policy_loss + config.value_coefficient * value_loss
    if config.entropy_coefficient > 0:
        bonus = _chunk_mean(_token_mean(torch.where(token_mask, entropy, nothing), token_mask), is_counted, batch)
        total = total - config.entropy_coefficient * bonus
    clip = (config.clip_low, config.clip_high)
    return total, diagnose(log_ratio, entropy, token_mask, ratio, is_term, advantage, clip, policy_loss, value_loss)


def huber(error: Tensor, delta: float) -> Tensor:
    """0.5 e^2 where |e| <= delta, delta (|e| - delta / 2) beyond; same shape as `error`. Source: Huber 1964."""
    magnitude = error.abs()
    return torch.where(magnitude <= delta, 0.5 * error**2, delta * (magnitude - 0.5 * delta))


def _token_mean(per_token: Tensor, token_mask: Tensor) -> Tensor:
    """(N, K, D) -> (N,): mean over each chunk's valid tokens, zero for chunks without any."""
    token_sums = torch.where(token_mask, per_token, torch.zeros_like(per_token)).sum(dim=(1, 2))
    return token_sums / token_mask.sum(dim=(1, 2)).clamp(min=1)


def _chunk_mean(per_chunk: Tensor, is_counted: Tensor, batch: Minibatch) -> Tensor:
    """(N,) -> scalar: weighted sum over counted chunks, divided by the optimiser step's slots."""
    return torch.where(is_counted, per_chunk * batch.weight, torch.zeros_like(per_chunk)).sum() / batch.slots
