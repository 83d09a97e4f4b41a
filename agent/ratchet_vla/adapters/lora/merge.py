"""Merge of the running LoRA adapter into the base weights, for the base's own speed, and exact unmerging.

Knows weights and PEFT's merged flag. Knows no lock: `hotswap` calls `apply` and `revert` between forwards.
The base's tensors are never written: merged weights are new tensors that the layers point at, so unmerging restores the
base bit for bit. The price is one more copy of every adapted weight while merged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ratchet_vla.adapters.lora.arena import Arena
from ratchet_vla.adapters.lora.layers import SLOT, Lora, tensor_name
from ratchet_vla.errors import RatchetError


class Merge:
    """Merged weights of one adapter, ready to be pointed at."""

    def __init__(self, lora: Lora, arena: Arena) -> None:
        """Compute W + scaling * B A per layer, in float32, rounded once to W's dtype.

        Raises:
            RatchetError: adapter.tied_weights where an adapted weight is shared with a module that is not adapted.
        """
        self.weights: dict[str, Tensor] = {}
        # One storage under several names (tied embeddings): merging one of them would change the others.
        paths_by_storage: dict[int, list[str]] = {}
        for parameter_path, parameter in lora.module.named_parameters(remove_duplicate=False):
            paths_by_storage.setdefault(id(parameter), []).append(parameter_path)
        for layer_path, lora_layer in lora.layers.items():
            weight = lora_layer.get_base_layer().weight
            other_paths = [
                parameter_path
                for parameter_path in paths_by_storage[id(weight)]
                if parameter_path != f"{layer_path}.base_layer.weight"
            ]
            if other_paths:
                raise RatchetError(
                    "adapter.tied_weights",
                    f"its weight is also {other_paths[0]}, which merging would change",
                    where=layer_path,
                    fix="run this adapter unmerged",
                )
            # (r, in) and (out, r); a convolution's kernel is flattened to the same form.
            lora_a_ri = arena.views[tensor_name(layer_path, "lora_A")].flatten(1).float()
            lora_b_or = arena.views[tensor_name(layer_path, "lora_B")].flatten(1).float()
            weight_change = (lora_b_or @ lora_a_ri).reshape(weight.shape) * lora.scaling[layer_path]
            self.weights[layer_path] = (weight.detach().float() + weight_change).to(weight.dtype)
        # Looked up now, so that pointing takes no longer than it must.
        self._layers = [(lora_layer, lora_layer.get_base_layer().weight) for lora_layer in lora.layers.values()]
        self._base = [weight.data for _, weight in self._layers]

    @property
    def finite(self) -> bool:
        """Whether every merged weight is finite in its dtype (a float16 sum may overflow)."""
        return all(bool(torch.isfinite(weight).all()) for weight in self.weights.values())

    def apply(self) -> None:
        """Point the layers at the merged weights."""
        for (lora_layer, weight), merged_weight in zip(self._layers, self.weights.values(), strict=True):
            weight.data = merged_weight
            lora_layer.merged_adapters = [SLOT]

    def revert(self) -> None:
        """Point the layers back at the base."""
        for (lora_layer, weight), base_weight in zip(self._layers, self._base, strict=True):
            weight.data = base_weight
            lora_layer.merged_adapters = []
