"""SLCA: slow learners, a learning rate per component; the representation moves more slowly than the head.

Source: Zhang et al. 2023 (arXiv 2303.05118), with the components of arXiv 2603.11653: vision and projector, language
model, head.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ratchet_vla.learner.methods.base import SeqFT
from ratchet_vla.learner.supervised.training import Samples


class SLCA(SeqFT):
    """Seq. FT whose optimiser has one group per component. vision, language, head: factors on the learning rate."""

    name = "slca"

    def __init__(
        self, demonstrations: Samples | None = None, *, vision: float = 0.1, language: float = 0.5, head: float = 1.0
    ) -> None:
        super().__init__(demonstrations)
        self.vision, self.language, self.head = vision, language, head

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        trained = {id(p): p for p in self.parameters()}
        rates = {"vision": self.vision, "language": self.language, "head": self.head}
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
        for name, parameter in self.policy.module.named_parameters():
            if id(parameter) in trained:
                groups[component(name)].append(trained.pop(id(parameter)))
        groups["language"] += trained.values()  # what the module does not name belongs to the trunk
        return [{"params": p, "lr": learning_rate * rates[n]} for n, p in groups.items() if p]


def component(name: str) -> str:
    """Which component a parameter belongs to, by its name in the module."""
    if "lm_head" in name or "action_head" in name:
        return "head"
    if "language_model" in name:
        return "language"
    return "vision"
