"""RETAIN, merging of weights: each task gets a fresh adapter on top of the base plus a share of all earlier ones.

Source: arXiv 2603.11653, W = W0 + c * sum of earlier adapters, c in 0.5-0.8. The sum of adapters is itself an adapter,
of the sum of their ranks, so what is published is one ordinary adapter that any policy with that rank can load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ratchet_vla.adapters.identity import Adapter, binding_of
from ratchet_vla.adapters.lora.layers import scaling_of, split_name, tensor_name
from ratchet_vla.learner.methods.base import SeqFT
from ratchet_vla.learner.supervised.training import Samples

COEFFICIENT = 0.65


class Retain(SeqFT):
    """A new adapter per task; earlier ones are frozen into the weights, scaled by `coefficient`."""

    name = "retain"

    def __init__(self, demonstrations: Samples | None = None, *, coefficient: float = COEFFICIENT) -> None:
        super().__init__(demonstrations)
        self.coefficient = coefficient
        self.earlier: list[dict[str, Tensor]] = []
        self._frozen = 0  # how many of them the weights hold at this moment

    @classmethod
    def serving_rank(cls, rank: int, tasks: int) -> int:
        return rank * tasks

    def begin_task(self, stage: int, seed: int) -> None:
        if stage:
            self.earlier.append({n: t.detach().clone() for n, t in self.lora.export().items()})
            self._freeze()
            self.lora.reset(seed % 2**31)

    @torch.no_grad()
    def _freeze(self) -> None:
        for tensors in self.earlier[self._frozen :]:
            for layer, module in self.lora.layers.items():
                a, b = (tensors[tensor_name(layer, half)] for half in ("lora_A", "lora_B"))
                weight = module.get_base_layer().weight
                change = self.coefficient * self.lora.scaling[layer] * (b.flatten(1).float() @ a.flatten(1).float())
                weight += change.view_as(weight).to(weight.dtype)
        self._frozen = len(self.earlier)

    def adapter(self) -> Adapter:
        """c * every earlier adapter plus the one being trained, as one adapter of their ranks' sum."""
        latest = self.lora.adapter(binding_of(self.policy))
        if not self.earlier:
            return latest
        return joined([*((self.coefficient, t) for t in self.earlier), (1.0, dict(latest.tensors))], latest)

    def state_dict(self) -> dict[str, Any]:
        return {"earlier": self.earlier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.earlier = list(state["earlier"])
        self._freeze()


def joined(parts: list[tuple[float, dict[str, Tensor]]], like: Adapter) -> Adapter:
    """sum_i c_i s B_i A_i as one adapter: A stacked, B side by side, the factors in B; rank is the sum of the ranks.

    like: gives configuration and binding; every part has its shapes.
    """
    rank = int(like.config["r"])
    total = rank * len(parts)
    tensors: dict[str, Tensor] = {}
    config = dict(like.config) | {"r": total, "lora_alpha": total, "rank_pattern": {}, "alpha_pattern": {}}
    config["use_rslora"] = False  # with alpha = r the scale of the joined adapter is one
    for name in like.tensors:
        layer, half = split_name(name)
        if half == "lora_A":
            tensors[name] = torch.cat([t[name] for _, t in parts], dim=0)
        else:
            scale = scaling_of(like.config, layer)
            tensors[name] = torch.cat([(c * scale * t[name].float()).to(t[name].dtype) for c, t in parts], dim=1)
    return Adapter(tensors, config, like.binding)
