"""Elastic weight consolidation: a quadratic pull back to the last task's adapter, weighted by the diagonal Fisher.

Source: Kirkpatrick et al. 2017 (arXiv 1612.00796), equation 3, with the settings of arXiv 2603.11653: lambda 1e6,
Fisher from the gradients of each task's last update, summed over tasks, clamped at 1e4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ratchet_vla.learner.methods.base import SeqFT
from ratchet_vla.learner.supervised.training import Samples

LAMBDA = 1e6
CLAMP = 1e4


class EWC(SeqFT):
    """loss + lambda / 2 * sum_i F_i (theta_i - theta*_i)^2."""

    name = "ewc"

    def __init__(
        self, demonstrations: Samples | None = None, *, strength: float = LAMBDA, clamp: float = CLAMP
    ) -> None:
        super().__init__(demonstrations)
        self.strength, self.clamp = strength, clamp
        self.fisher: list[Tensor] = []
        self.anchor: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._steps = 0
        self._fresh = False

    def begin_task(self, stage: int, seed: int) -> None:
        self._squares, self._steps = [], 0

    def begin_update(self) -> None:
        """Only the last update of a task that taught anything counts: the next gradient starts the sums anew."""
        self._fresh = True

    def on_gradient(self) -> None:
        if self._fresh:
            self._squares, self._steps = [torch.zeros_like(p) for p in self.parameters()], 0
            self._fresh = False
        for total, parameter in zip(self._squares, self.parameters(), strict=True):
            if parameter.grad is not None:
                total += parameter.grad.detach() ** 2
        self._steps += 1

    def extra_loss(self, generator: torch.Generator) -> Tensor | None:
        if not self.fisher:
            return None
        terms = [(f * (p - a) ** 2).sum() for f, p, a in zip(self.fisher, self.parameters(), self.anchor, strict=True)]
        return self.strength / 2 * torch.stack(terms).sum()

    def end_task(self, stage: int) -> None:
        if self._steps:
            found = [s / self._steps for s in self._squares]
            earlier = self.fisher or [torch.zeros_like(f) for f in found]
            self.fisher = [(f + e).clamp(max=self.clamp) for f, e in zip(found, earlier, strict=True)]
        elif not self.fisher:
            return  # nothing was learned yet, so there is nothing to hold on to
        self.anchor = [p.detach().clone() for p in self.parameters()]

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": self.fisher, "anchor": self.anchor, "squares": self._squares, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fisher, self.anchor = list(state["fisher"]), list(state["anchor"])
        self._squares, self._steps = list(state["squares"]), int(state["steps"])
