"""Merging the running adapter into the base weights, for the base's own speed, and exact unmerging.

Knows weights and PEFT's merged flag. Knows no lock: `hotswap` calls `apply` and `revert` between forwards.
The base's tensors are never written: merged weights are new tensors that the layers point at, so unmerging restores the
base bit for bit. The price is one more copy of every adapted weight while merged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agent.adapters.arena import Arena
from agent.adapters.lora import SLOT, Lora, tensor_name
from agent.errors import RatchetError


class Merge:
    """Merged weights of one adapter, ready to be pointed at."""

    def __init__(self, lora: Lora, arena: Arena) -> None:
        """Compute W + scaling * B A per layer, in float32, rounded once to W's dtype.

        Raises:
            RatchetError: adapter.tied_weights where an adapted weight is shared with a module that is not adapted.
        """
        self._lora = lora
        self.weights: dict[str, Tensor] = {}
        owners: dict[int, list[str]] = {}
        for name, parameter in lora.module.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        for path, layer in lora.layers.items():
            weight = layer.get_base_layer().weight
            shared = [n for n in owners[id(weight)] if n != f"{path}.base_layer.weight"]
            if shared:
                raise RatchetError(
                    "adapter.tied_weights",
                    f"its weight is also {shared[0]}, which merging would change",
                    where=path,
                    fix="run this adapter unmerged",
                )
            a = arena.views[tensor_name(path, "lora_A")].flatten(1).float()
            b = arena.views[tensor_name(path, "lora_B")].flatten(1).float()
            delta = (b @ a).reshape(weight.shape) * lora.scaling[path]
            self.weights[path] = (weight.detach().float() + delta).to(weight.dtype)
        self._base = {path: layer.get_base_layer().weight.data for path, layer in lora.layers.items()}

    @property
    def finite(self) -> bool:
        """Whether every merged weight is finite in its dtype (a float16 sum may overflow)."""
        return all(bool(torch.isfinite(weight).all()) for weight in self.weights.values())

    def apply(self) -> None:
        """Point the layers at the merged weights."""
        for path, layer in self._lora.layers.items():
            layer.get_base_layer().weight.data = self.weights[path]
            layer.merged_adapters = [SLOT]

    def revert(self) -> None:
        """Point the layers back at the base."""
        for path, layer in self._lora.layers.items():
            layer.get_base_layer().weight.data = self._base[path]
            layer.merged_adapters = []
