"""Flow matching as a sampler with known probabilities: from noise at time 1 to actions at time 0.

Knows velocities, times and Gaussian transitions. Knows no network, no action space and no learning algorithm.
x_t = t noise + (1 - t) actions, velocity v = noise - actions (pi0, SmolVLA). The ordinary equation dx = v dt gives one
answer per noise. The stochastic one has the same distribution at every time (arXiv 2505.05470, 2510.25889): going from
t to t - h, x' = x - h (v + sigma^2 / (2 t) (x + (1 - t) v)) + sigma sqrt(h) epsilon, with sigma = level sqrt(t / (1 -
t)). Each of its steps is Gaussian, so the probability of a whole chain of steps is known exactly, whatever the network
is.
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
    h, rate = 1.0 / steps, sigma(t, steps, level)
    drift = v + rate * rate / (2 * t) * (x + (1 - t) * v)
    return x - h * drift, rate * math.sqrt(h)


def sample(velocity: Velocity, noise: Tensor, shocks: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """A chain (B, N + 1, H, A) from its first point (B, H, A) and standard normal shocks (B, N, H, A), and the
    log-density (B, H, A) of its transitions, which `log_density` finds again."""
    steps = shocks.shape[1]
    chain, total = [noise], torch.zeros_like(noise)
    for i, t in enumerate(times(steps)):
        mean, deviation = mean_of(chain[-1], velocity(chain[-1], _at(t, noise)), t, steps, level)
        chain.append(mean + deviation * shocks[:, i])
        total = total - 0.5 * ((chain[-1] - mean) / deviation).square() - _constant(deviation)
    return torch.stack(chain, 1), total


def log_density(velocity: Velocity, chain: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Log-density and entropy (B, H, A), nats, of the N transitions of a chain (B, N + 1, H, A), given its first point.

    Elements are independent given the point before, so these add up to the chain's own. The first point's density
    does not depend on any weight.
    """
    steps = chain.shape[1] - 1
    total = torch.zeros_like(chain[:, 0])
    entropy = 0.0
    for i, t in enumerate(times(steps)):
        x = chain[:, i]
        mean, deviation = mean_of(x, velocity(x, _at(t, x)), t, steps, level)
        constant = _constant(deviation)
        total = total - 0.5 * ((chain[:, i + 1] - mean) / deviation).square() - constant
        entropy += constant + 0.5
    return total, torch.full_like(total, entropy)


def matching_loss(velocity: Velocity, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """(B, H, A) squared error of the velocity between given noise and actions (B, H, A) at times (B,)."""
    t = time[:, None, None]
    return (velocity(t * noise + (1 - t) * actions, time) - (noise - actions)).square()


def _constant(deviation: float) -> float:
    return math.log(deviation) + 0.5 * math.log(2 * math.pi)


def _at(t: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), t, device=like.device)
