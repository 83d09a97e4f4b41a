"""Real-time chunking (arXiv 2506.07339): a new chunk that goes on where the old one is still being executed.

Knows weights over a chunk and how a flow's velocity is drawn towards given actions. Knows no network and no clock.
The first `delay` actions of the new chunk will have been executed before it is ready, so they are held to the old
one's; up to `horizon` the pull fades; beyond it the flow is free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.flow.sde import Velocity


@dataclass(frozen=True)
class Guide:
    """What the new chunk has to agree with.

    previous: (B, H', A) normalised, the old chunk from its first action that is not executed yet.
    delay: actions that will have run before the new chunk is ready. horizon: actions over which the old chunk counts.
    schedule: how the pull fades between them. limit: largest weight of the pull.
    exact: differentiate through the network, as published; False takes the velocity as constant, which needs no
        backward pass (LeRobot's variant).
    """

    previous: Tensor
    delay: int
    horizon: int = 10
    schedule: Literal["exponential", "linear", "ones", "zeros"] = "exponential"
    limit: float = 10.0
    exact: bool = False

    def __post_init__(self) -> None:
        if self.previous.ndim != 3 or not self.delay >= 0 or self.horizon < 1 or not self.limit > 0:
            raise RatchetError(
                "policy.bad_input",
                f"a guide needs (rows, steps, dimensions), a delay >= 0 and a horizon >= 1; got "
                f"{tuple(self.previous.shape)}, {self.delay}, {self.horizon}",
                where="real-time chunking",
            )


def weights(delay: int, horizon: int, total: int, schedule: str) -> Tensor:
    """(total,) in [0, 1]: 1 for the first `delay` actions, 0 from `horizon` on, fading between."""
    horizon = min(horizon, total)
    delay = min(delay, horizon)
    out = torch.zeros(total)
    out[:delay] = 1.0
    middle = horizon - delay
    if schedule == "zeros" or middle <= 0:
        return out
    if schedule == "ones":
        out[:horizon] = 1.0
        return out
    fading = torch.linspace(1, 0, middle + 2)[1:-1]
    out[delay:horizon] = fading * torch.expm1(fading) / (math.e - 1) if schedule == "exponential" else fading
    return out


def fields(guide: Guide, like: Tensor) -> tuple[Tensor, Tensor]:
    """The old chunk in the flow's shape, (B, H, A), and how much each of its actions counts, (1, H, 1)."""
    total = like.shape[1]
    previous = torch.zeros_like(like)
    length = min(guide.previous.shape[1], total)
    width = min(guide.previous.shape[2], like.shape[2])
    previous[:, :length, :width] = guide.previous[:, :length, :width].to(like)
    horizon = min(guide.horizon, guide.previous.shape[1])
    return previous, weights(guide.delay, horizon, total, guide.schedule).to(like.device)[None, :, None]


def guided(velocity: Velocity, guide: Guide) -> Velocity:
    """A velocity that draws the end of the flow towards the guide's actions."""

    def pulled(x: Tensor, time: Tensor) -> Tensor:
        previous, weight = fields(guide, x)
        return drawn(velocity, previous, weight, guide.limit, guide.exact)(x, time)

    return pulled


def drawn(velocity: Velocity, previous: Tensor, weight: Tensor, limit: float, exact: bool = False) -> Velocity:
    """`guided` with its tensors at hand; where the weight is 0 throughout, the velocity itself."""

    def pulled(x: Tensor, time: Tensor) -> Tensor:
        t = time[:, None, None]
        if exact:
            with torch.enable_grad():
                point = x.detach().requires_grad_(True)
                v = velocity(point, time)
                end = point - t * v
                error = ((previous - end) * weight).detach()
                (pull,) = torch.autograd.grad(end, point, error)
            v = v.detach()
        else:
            v = velocity(x, time)
            pull = (previous - (x - t * v)) * weight
        gone = 1 - t
        strength = torch.nan_to_num(t / gone * (t * t + gone * gone) / (t * t), posinf=limit)
        return v - strength.clamp(max=limit) * pull

    return pulled
