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
        self.vision = vision
        self.language = language
        self.head = head

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """One group per component that has trained parameters."""
        trained_by_id = {id(parameter): parameter for parameter in self.parameters()}
        rate_factors = {"vision": self.vision, "language": self.language, "head": self.head}
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in rate_factors}
        for name, parameter in self.policy.module.named_parameters():
            # By identity: tensors compare element by element.
            if id(parameter) in trained_by_id:
                groups[component(name)].append(trained_by_id.pop(id(parameter)))
        groups["language"] += trained_by_id.values()  # what the module does not name belongs to the trunk
        used = {name: parameters for name, parameters in groups.items() if parameters}
        return [{"params": used[name], "lr": learning_rate * rate_factors[name]} for name in used]


def component(name: str) -> str:
    """Which component a parameter belongs to, by its name in the module."""
    if "lm_head" in name or "action_head" in name:
        return "head"
    if "language_model" in name:
        return "language"
    return "vision"
