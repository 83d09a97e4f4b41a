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
        """Ranks add up: after the last task the published adapter is the sum of all."""
        return rank * tasks

    def begin_task(self, stage: int, seed: int) -> None:
        """Freeze the last task's adapter into the weights and begin a fresh one."""
        if stage:
            self.earlier.append({name: tensor.detach().clone() for name, tensor in self.lora.export().items()})
            self._freeze()
            self.lora.reset(seed % 2**31)

    @torch.no_grad()
    def _freeze(self) -> None:
        """Add what is not in the weights yet; after a resumption that is all of it."""
        for tensors in self.earlier[self._frozen :]:
            for layer, module in self.lora.layers.items():
                down = tensors[tensor_name(layer, "lora_A")].flatten(1).float()  # (r, in)
                up = tensors[tensor_name(layer, "lora_B")].flatten(1).float()  # (out, r)
                weight = module.get_base_layer().weight
                change = self.coefficient * self.lora.scaling[layer] * (up @ down)  # (out, in)
                weight += change.view_as(weight).to(weight.dtype)
        self._frozen = len(self.earlier)

    def adapter(self) -> Adapter:
        """c * every earlier adapter plus the one being trained, as one adapter of their ranks' sum."""
        latest = self.lora.adapter(binding_of(self.policy))
        if not self.earlier:
            return latest
        weighted = [(self.coefficient, tensors) for tensors in self.earlier]
        return joined([*weighted, (1.0, dict(latest.tensors))], latest)

    def state_dict(self) -> dict[str, Any]:
        """Earlier tasks' adapters; the weights follow from them."""
        return {"earlier": self.earlier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the earlier adapters back and freeze them into the weights."""
        self.earlier = list(state["earlier"])
        self._freeze()


def joined(parts: list[tuple[float, dict[str, Tensor]]], like: Adapter) -> Adapter:
    """sum_i c_i s B_i A_i as one adapter: A stacked, B side by side, the factors in B; rank is the sum of the ranks.

    like: gives configuration and binding; every part has its shapes.
    """
    rank = int(like.config["r"])
    total_rank = rank * len(parts)
    tensors: dict[str, Tensor] = {}
    config = dict(like.config) | {"r": total_rank, "lora_alpha": total_rank, "rank_pattern": {}, "alpha_pattern": {}}
    config["use_rslora"] = False  # with alpha = r the scale of the joined adapter is one
    for name in like.tensors:
        layer, half = split_name(name)
        if half == "lora_A":
            tensors[name] = torch.cat([summand[name] for _, summand in parts], dim=0)
        else:
            # The factors are multiplied in float32 and rounded once.
            scale = scaling_of(like.config, layer)
            scaled = [(factor * scale * summand[name].float()).to(summand[name].dtype) for factor, summand in parts]
            tensors[name] = torch.cat(scaled, dim=1)
    return Adapter(tensors, config, like.binding)
