"""Flow matching as a sampler with known probabilities: from noise at time 1 to actions at time 0.

Knows velocities, times and Gaussian transitions. Knows no network, no action space and no learning algorithm.
x_t = t noise + (1 - t) actions, velocity v = noise - actions (pi0, SmolVLA). The ordinary equation dx = v dt gives one
answer per noise. The stochastic one has the same distribution at every time (arXiv 2505.05470, 2510.25889): going from
t to t - h, x' = x - h (v + sigma^2 / (2 t) (x + (1 - t) v)) + sigma sqrt(h) epsilon, with sigma = level sqrt(t / (1 -
t)). Each of its steps is Gaussian, so the probability of a whole chain of steps is known exactly, whatever the network
is, also where the shocks of a chunk's actions are correlated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(B, H, A) and times (B,) -> velocity (B, H, A), all float32."""


def times(steps: int) -> list[float]:
    """Where each step begins: 1, 1 - 1/n, ..., 1/n."""
    return [1.0 - i / steps for i in range(steps)]


def integrate(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Euler's method: (B, H, A) noise -> actions."""
    x = noise
    for t in times(steps):
        x = x - velocity(x, _at(t, x)) / steps
    return x


def sigma(t: float, steps: int, level: float) -> float:
    """Noise rate at the step that begins at t. The rate has no value at t = 1: there it is that of the next step."""
    t = min(t, 1.0 - 1.0 / steps) if steps > 1 else 0.5
    return level * math.sqrt(t / (1.0 - t))


def mean_of(x: Tensor, v: Tensor, t: float, steps: int, level: float) -> tuple[Tensor, float]:
    """Mean (B, H, A) and standard deviation of the next point."""
    h = 1.0 / steps
    rate = sigma(t, steps, level)
    drift = v + rate * rate / (2 * t) * (x + (1 - t) * v)
    return x - h * drift, rate * math.sqrt(h)


def mixing(horizon: int, correlation: float) -> Tensor:
    """(H, H) lower triangle that makes H independent shocks correlate by `correlation` with each other, each of them
    standard normal still: the Cholesky factor of their correlation matrix."""
    matrix = torch.full((horizon, horizon), correlation, dtype=torch.float64)
    factor: Tensor = torch.linalg.cholesky(matrix.fill_diagonal_(1.0))
    return factor.float()


def sample(velocity: Velocity, noise: Tensor, shocks: Tensor, level: float, mix: Tensor) -> tuple[Tensor, Tensor]:
    """A chain (B, N + 1, H, A) from its first point (B, H, A) and standard normal shocks (B, N, H, A), and the
    log-density (B, H, A) of its transitions, which `log_density` finds again. mix: (H, H), of `mixing`."""
    steps = shocks.shape[1]
    chain = [noise]
    total = torch.zeros_like(noise)
    for i, t in enumerate(times(steps)):
        mean, deviation = mean_of(chain[-1], velocity(chain[-1], _at(t, noise)), t, steps, level)
        chain.append(mean + deviation * (mix @ shocks[:, i]))
        total = total + _log_normal(chain[-1] - mean, deviation, mix)
    return torch.stack(chain, 1), total


def log_density(velocity: Velocity, chain: Tensor, level: float, mix: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density and entropy (B, H, A), nats, of the N transitions of a chain (B, N + 1, H, A), given its first point.

    Each action's is given the point before and the chunk's earlier actions, so that all of them add up to the chain's
    own. The first point's density does not depend on any weight. mix: as it was sampled with.
    """
    steps = chain.shape[1] - 1
    total = torch.zeros_like(chain[:, 0])
    entropy = 0.0
    for i, t in enumerate(times(steps)):
        x = chain[:, i]
        mean, deviation = mean_of(x, velocity(x, _at(t, x)), t, steps, level)
        total = total + _log_normal(chain[:, i + 1] - mean, deviation, mix)
        entropy += _constant(deviation) + 0.5
    own = entropy + steps * mix.diagonal().log()
    return total, own[:, None].expand_as(total)


def matching_loss(velocity: Velocity, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """(B, H, A) squared error of the velocity between given noise and actions (B, H, A) at times (B,)."""
    t = time[:, None, None]
    return (velocity(t * noise + (1 - t) * actions, time) - (noise - actions)).square()


def _log_normal(offset: Tensor, deviation: float, mix: Tensor) -> Tensor:
    """(B, H, A) log-density of correlated normal offsets, each action's given those before it in the chunk."""
    own: Tensor = torch.linalg.solve_triangular(mix, offset, upper=False) / deviation
    return -0.5 * own.square() - _constant(deviation) - mix.diagonal().log()[:, None]


def _constant(deviation: float) -> float:
    return math.log(deviation) + 0.5 * math.log(2 * math.pi)


def _at(t: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), t, device=like.device)
