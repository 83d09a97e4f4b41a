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
        self.strength = strength
        self.clamp = clamp
        self.fisher: list[Tensor] = []
        self.anchor: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._steps = 0
        self._fresh = False  # whether the next gradient is the first of an update

    def begin_task(self, stage: int, seed: int) -> None:
        """Forget the last task's gradients."""
        self._squares = []
        self._steps = 0

    def begin_update(self) -> None:
        """Only the last update of a task that taught anything counts: the next gradient starts the sums anew."""
        self._fresh = True

    def on_gradient(self) -> None:
        """Add the squares of one optimiser step's gradients."""
        if self._fresh:
            self._squares = [torch.zeros_like(parameter) for parameter in self.parameters()]
            self._steps = 0
            self._fresh = False
        for squares, parameter in zip(self._squares, self.parameters(), strict=True):
            if parameter.grad is not None:
                squares.add_(parameter.grad.detach() ** 2)
        self._steps += 1

    def extra_loss(self, generator: torch.Generator) -> Tensor | None:
        """The quadratic pull; None before the first task is over."""
        if not self.fisher:
            return None
        terms = [
            (information * (parameter - anchor) ** 2).sum()
            for information, parameter, anchor in zip(self.fisher, self.parameters(), self.anchor, strict=True)
        ]
        return self.strength / 2 * torch.stack(terms).sum()

    def end_task(self, stage: int) -> None:
        """Add the task's Fisher information to that of the earlier ones and move the anchor to where it ended."""
        if self._steps:
            task_fisher = [squares / self._steps for squares in self._squares]
            earlier_fisher = self.fisher or [torch.zeros_like(information) for information in task_fisher]
            pairs = zip(task_fisher, earlier_fisher, strict=True)
            self.fisher = [(task + earlier).clamp(max=self.clamp) for task, earlier in pairs]
        elif not self.fisher:
            return  # nothing was learned yet, so there is nothing to hold on to
        self.anchor = [parameter.detach().clone() for parameter in self.parameters()]

    def state_dict(self) -> dict[str, Any]:
        """Information, anchor and the sums of the task under way."""
        return {"fisher": self.fisher, "anchor": self.anchor, "squares": self._squares, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.fisher = list(state["fisher"])
        self.anchor = list(state["anchor"])
        self._squares = list(state["squares"])
        self._steps = int(state["steps"])
