"""SLCA: slow learners, a learning rate per component; the representation moves more slowly than the head.

Source: Zhang et al. 2023 (arXiv 2303.05118), with the components of arXiv 2603.11653: vision and projector, language
model, head.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from agent.learner.methods.base import SeqFT
from agent.learner.pretrain import Samples

RATES = {"vision": 0.1, "language": 0.5, "head": 1.0}
"""Factors on the learning rate."""


class SLCA(SeqFT):
    """Seq. FT whose optimiser has one group per component."""

    name = "slca"

    def __init__(self, demonstrations: Samples | None = None, *, rates: dict[str, float] | None = None) -> None:
        super().__init__(demonstrations)
        self.rates = dict(rates or RATES)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        trained = {id(p): p for p in self.parameters()}
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in self.rates}
        for name, parameter in self.policy.module.named_parameters():
            if id(parameter) in trained:
                groups[component(name)].append(trained.pop(id(parameter)))
        groups["language"] += trained.values()  # what the module does not name belongs to the trunk
        return [{"params": p, "lr": learning_rate * self.rates[n]} for n, p in groups.items() if p]


def component(name: str) -> str:
    """Which component a parameter belongs to, by its name in the module."""
    if "lm_head" in name or "action_head" in name:
        return "head"
    if "language_model" in name:
        return "language"
    return "vision"
