"""Advantage estimators: within a group (GRPO), leave-one-out (RLOO) and generalised advantage estimation (GAE).

Knows scores, groups, rewards, values and padding masks. Knows no policy, no ratio and no loss.
Shapes: E episodes, C chunks (padded at the end), M groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ratchet_vla.errors import RatchetError


@dataclass(frozen=True)
class GroupAdvantage:
    """Advantages of whole episodes, compared with the episodes that began in the same initial state.

    advantage: (E,) the dtype of the scores; exactly zero for every episode of a masked group.
    keep: (E,) bool, False for episodes of groups whose scores are all equal (all success or all failure): nothing
        distinguishes their episodes, so they are masked and not resampled.
    groups, masked_groups: how many groups there were and how many of them were masked.
    """

    advantage: Tensor
    keep: Tensor
    groups: int
    masked_groups: int


def group_normalised(score: Tensor, group: Tensor, epsilon: float = 1e-6) -> GroupAdvantage:
    """GRPO: (score - group mean) / (unbiased group standard deviation + epsilon).

    Source: DeepSeekMath (arXiv 2402.03300), section 4.1, with the unbiased deviation of the published recipe
    (arXiv 2603.11653).

    Args:
        score: (E,) floating, total reward of each episode.
        group: (E,) int64, any labels; episodes with one label started in the same initial state.
        epsilon: > 0, keeps the division finite; in units of the score.

    Raises:
        RatchetError: learner.bad_shape, learner.not_finite.
    """
    label, group_size, groups = _labels(score, group)
    group_mean = _group_sum(score, label, groups) / group_size
    centred = score - group_mean[label]
    # A group of one has no deviation; it is masked below, the clamp only avoids 0 / 0.
    deviation = (_group_sum(centred**2, label, groups) / (group_size - 1).clamp(min=1)).sqrt()
    return _masked(centred / (deviation[label] + epsilon), score, label, groups)


def leave_one_out(score: Tensor, group: Tensor) -> GroupAdvantage:
    """RLOO: score minus the mean score of the other episodes of the group; not divided by a deviation.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free"; Ahmadian et al. (arXiv 2402.14740).
    Arguments, masking and errors as in `group_normalised`.
    """
    label, group_size, groups = _labels(score, group)
    mean_of_others = (_group_sum(score, label, groups)[label] - score) / (group_size[label] - 1).clamp(min=1)
    return _masked(score - mean_of_others, score, label, groups)


def gae(
    reward: Tensor,
    value: Tensor,
    present: Tensor,
    final_value: Tensor,
    terminated: Tensor,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over chunks: one decision is one chunk, discounted once per chunk.

        delta_c = reward_c + gamma * next_c - value_c
        advantage_c = delta_c + gamma * lam * advantage_{c+1}        return_c = advantage_c + value_c

    What follows the last present chunk: zero where the episode terminated (success, or a failure that is final),
    `final_value` where it was only cut off. No advantage flows over an episode's end. Whether the horizon is an end or
    a cut is the caller's decision, stated in `terminated`.

    Source: Schulman et al. (arXiv 1506.02438), equation 16.

    Args:
        reward, value: (E, C) floating; entries outside `present` are ignored and may hold anything.
        present: (E, C) bool, True for chunks that were run; per episode a prefix, at least one chunk.
        final_value: (E,) value of the observation after the last chunk; ignored where terminated.
        terminated: (E,) bool.
        gamma, lam: in [0, 1].

    Returns:
        Advantage and return, both (E, C), zero outside `present`.

    Raises:
        RatchetError: learner.bad_shape, learner.bad_mask, learner.not_finite.
    """
    episodes, chunks = _two_dimensions(reward, "reward")
    for name, tensor, shape in (
        ("value", value, (episodes, chunks)),
        ("present", present, (episodes, chunks)),
        ("final_value", final_value, (episodes,)),
        ("terminated", terminated, (episodes,)),
    ):
        require_shape(name, tensor, shape)
    if present.dtype != torch.bool or terminated.dtype != torch.bool:
        raise RatchetError("learner.bad_mask", "present and terminated must be bool", where="gae")
    if not bool(present[:, 0].all()) or bool((present[:, 1:] & ~present[:, :-1]).any()):
        raise RatchetError(
            "learner.bad_mask",
            "present must be True for the first chunks of each episode and False after them",
            where="gae",
            fix="pad episodes at the end",
        )
    nothing = torch.zeros((), dtype=reward.dtype, device=reward.device)
    reward = torch.where(present, reward, nothing)
    value = torch.where(present, value, nothing)
    bootstrap = torch.where(terminated, nothing, final_value)
    if not bool(torch.isfinite(reward).all() & torch.isfinite(value).all() & torch.isfinite(bootstrap).all()):
        raise RatchetError("learner.not_finite", "rewards or values are not finite", where="gae")

    is_last = present & ~torch.cat([present[:, 1:], torch.zeros_like(present[:, :1])], dim=1)
    advantage = torch.zeros_like(value)
    accumulated = torch.zeros_like(bootstrap)
    for chunk in reversed(range(chunks)):
        next_value = value[:, chunk + 1] if chunk + 1 < chunks else bootstrap
        next_value = torch.where(is_last[:, chunk], bootstrap, next_value)
        delta = reward[:, chunk] + gamma * next_value - value[:, chunk]
        accumulated = torch.where(present[:, chunk], delta + gamma * lam * accumulated, nothing)
        advantage[:, chunk] = accumulated
    return advantage, torch.where(present, advantage + value, nothing)


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        RatchetError: learner.bad_shape.
    """
    if tuple(tensor.shape) != shape:
        raise RatchetError("learner.bad_shape", f"{name} is {tuple(tensor.shape)}, expected {shape}", where=name)


def _two_dimensions(tensor: Tensor, name: str) -> tuple[int, int]:
    if tensor.ndim != 2 or tensor.shape[0] == 0 or tensor.shape[1] == 0:
        raise RatchetError(
            "learner.bad_shape", f"{name} is {tuple(tensor.shape)}, expected (episodes, chunks)", where=name
        )
    return tensor.shape[0], tensor.shape[1]


def _labels(score: Tensor, group: Tensor) -> tuple[Tensor, Tensor, int]:
    """Group labels renumbered 0..M-1 (E,), group sizes (M,) in the score's dtype, and M."""
    if score.ndim != 1 or score.shape != group.shape or score.shape[0] == 0:
        raise RatchetError(
            "learner.bad_shape",
            f"scores {tuple(score.shape)} and groups {tuple(group.shape)} must both be (episodes,)",
            where="group advantage",
        )
    if not bool(torch.isfinite(score).all()):
        raise RatchetError("learner.not_finite", "episode scores are not finite", where="group advantage")
    _, label, group_size = torch.unique(group, return_inverse=True, return_counts=True)
    return label, group_size.to(score.dtype), group_size.shape[0]


def _group_sum(per_episode: Tensor, label: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=per_episode.dtype, device=per_episode.device).index_add_(0, label, per_episode)


def _masked(advantage: Tensor, score: Tensor, label: Tensor, groups: int) -> GroupAdvantage:
    highest = torch.full((groups,), -torch.inf, dtype=score.dtype, device=score.device)
    highest = highest.scatter_reduce(0, label, score, "amax")
    lowest = torch.full((groups,), torch.inf, dtype=score.dtype, device=score.device)
    lowest = lowest.scatter_reduce(0, label, score, "amin")
    is_mixed = highest > lowest
    keep = is_mixed[label]
    # Rounding of the mean may leave a residue in groups of equal scores; masked means exactly zero.
    advantage = torch.where(keep, advantage, torch.zeros_like(advantage))
    return GroupAdvantage(advantage, keep, groups, int((~is_mixed).sum()))
