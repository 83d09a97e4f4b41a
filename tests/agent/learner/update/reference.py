"""An independent float64 reference of the updates: plain Python floats and loops, written from the paper's formulas.

Shares no code and no vectorisation trick with `ratchet_vla.learner`, so that a common mistake is unlikely.
"""

from __future__ import annotations

import math

Chunk = list[list[float]]  # K control steps of D token log-probabilities


def group_advantages(scores: list[float], groups: list[int], epsilon: float) -> list[float | None]:
    """GRPO advantage per episode; None where the group has nothing to compare."""
    out: list[float | None] = []
    for score, label in zip(scores, groups, strict=True):
        mates = [s for s, g in zip(scores, groups, strict=True) if g == label]
        if all(s == mates[0] for s in mates):
            out.append(None)
            continue
        mean = math.fsum(mates) / len(mates)
        variance = math.fsum((s - mean) ** 2 for s in mates) / (len(mates) - 1)
        out.append((score - mean) / (math.sqrt(variance) + epsilon))
    return out


def leave_one_out(scores: list[float], groups: list[int]) -> list[float | None]:
    out: list[float | None] = []
    for i, (score, label) in enumerate(zip(scores, groups, strict=True)):
        others = [s for j, (s, g) in enumerate(zip(scores, groups, strict=True)) if g == label and j != i]
        if all(s == score for s in others):
            out.append(None)
            continue
        out.append(score - math.fsum(others) / len(others))
    return out


def clipped_term(ratio: float, advantage: float, low: float, high: float) -> float:
    bounded = min(max(ratio, 1 - low), 1 + high)
    return -min(ratio * advantage, bounded * advantage)


def grpo_loss(
    new: list[list[Chunk]],
    old: list[list[Chunk]],
    valid: list[list[list[bool]]],
    advantages: list[float | None],
    low: float,
    high: float,
) -> float:
    """Mean over episodes of each episode's mean clipped term over its valid tokens (the horizon cancels)."""
    total = 0.0
    for e, advantage in enumerate(advantages):
        if advantage is None:
            continue
        terms = []
        for c, mask in enumerate(valid[e]):
            for k, counts in enumerate(mask):
                if counts:
                    for d in range(len(new[e][c][k])):
                        ratio = math.exp(new[e][c][k][d] - old[e][c][k][d])
                        terms.append(clipped_term(ratio, advantage, low, high))
        if terms:
            total += math.fsum(terms) / len(terms)
    return total / len(advantages)


def gae_explicit(
    rewards: list[float], values: list[float], after: float, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """One episode, straight from the definition: advantage_c = sum_l (gamma lam)^l delta_{c+l}; `after` follows it."""
    following = [*values[1:], after]
    delta = [r + gamma * f - v for r, f, v in zip(rewards, following, values, strict=True)]
    advantages = [
        math.fsum((gamma * lam) ** (m - c) * delta[m] for m in range(c, len(delta))) for c in range(len(delta))
    ]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def ppo_loss(
    new: list[Chunk],
    old: list[Chunk],
    valid: list[list[bool]],
    advantages: list[float],
    values: list[float],
    old_values: list[float],
    returns: list[float],
    entropies: list[Chunk],
    *,
    low: float,
    high: float,
    per_chunk: bool,
    value_clip: float,
    delta: float,
    value_coefficient: float,
    entropy_coefficient: float,
) -> float:
    """Mean over chunk samples that have a valid step."""

    def huber(error: float) -> float:
        return 0.5 * error * error if abs(error) <= delta else delta * (abs(error) - 0.5 * delta)

    terms = []
    for n, mask in enumerate(valid):
        differences, entropy = [], []
        for k, counts in enumerate(mask):
            if counts:
                differences += [a - b for a, b in zip(new[n][k], old[n][k], strict=True)]
                entropy += entropies[n][k]
        if not differences:
            continue
        if per_chunk:
            policy = clipped_term(math.exp(math.fsum(differences)), advantages[n], low, high)
        else:
            each = [clipped_term(math.exp(x), advantages[n], low, high) for x in differences]
            policy = math.fsum(each) / len(each)
        step = values[n] - old_values[n]
        step = max(-value_clip, min(value_clip, step))
        value = max(huber(values[n] - returns[n]), huber(old_values[n] + step - returns[n]))
        terms.append(
            policy + value_coefficient * value - entropy_coefficient * math.fsum(entropy) / max(len(entropy), 1)
        )
    return math.fsum(terms) / len(terms)


def numerical_gradient(function, x: list[float], step: float = 1e-6) -> list[float]:  # type: ignore[no-untyped-def]
    """Central differences of a scalar function of a flat list."""
    out = []
    for i in range(len(x)):
        up, down = list(x), list(x)
        up[i] += step
        down[i] -= step
        out.append((function(up) - function(down)) / (2 * step))
    return out
