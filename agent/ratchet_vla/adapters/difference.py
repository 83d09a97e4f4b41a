"""Distance between two LoRA adapters, layer by layer, without ever forming the full weight change.

Knows LoRA pairs and their scale. Knows no module: it works on stored adapters of any base.
With W = s B A, inner products need only r x r matrices: <W1, W2> = s1 s2 tr((B2^T B1)(A1 A2^T)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ratchet_vla.adapters.identity import Adapter
from ratchet_vla.adapters.lora.layers import scaling_of, split_name
from ratchet_vla.errors import RatchetError


@dataclass(frozen=True)
class Change:
    """One layer: Frobenius norms of both weight changes and of their difference, and the cosine between them.

    Attributes:
        cosine: in [-1, 1]; 0 where one of them is zero.
    """

    layer: str
    first: float
    second: float
    difference: float
    cosine: float


def change(first: Adapter, second: Adapter) -> list[Change]:
    """Every layer that either adapter changes, largest difference first.

    Raises:
        RatchetError: adapter.wrong_base where they belong to different bases.
    """
    if first.binding.base_hash != second.binding.base_hash:
        raise RatchetError(
            "adapter.wrong_base", "the adapters belong to different bases", fix="compare within one base"
        )
    first_pairs = _layers(first)
    second_pairs = _layers(second)
    changes = []
    for layer in sorted({*first_pairs, *second_pairs}):
        first_pair = first_pairs.get(layer)
        second_pair = second_pairs.get(layer)
        # A layer that only one adapter changes counts as zero in the other.
        first_squared = _inner(first_pair, first_pair) if first_pair else 0.0
        second_squared = _inner(second_pair, second_pair) if second_pair else 0.0
        cross = _inner(first_pair, second_pair) if first_pair and second_pair else 0.0
        # Rounding may leave a squared norm a little below zero.
        first_norm = math.sqrt(max(first_squared, 0.0))
        second_norm = math.sqrt(max(second_squared, 0.0))
        difference_norm = math.sqrt(max(first_squared + second_squared - 2.0 * cross, 0.0))
        cosine = cross / (first_norm * second_norm) if first_norm and second_norm else 0.0
        changes.append(Change(layer, first_norm, second_norm, difference_norm, max(-1.0, min(1.0, cosine))))
    return sorted(changes, key=lambda entry: -entry.difference)


Pair = tuple[Tensor, Tensor, float]


def _layers(adapter: Adapter) -> dict[str, Pair]:
    halves_by_layer: dict[str, dict[str, Tensor]] = {}
    for tensor_name, tensor in adapter.tensors.items():
        layer, half_name = split_name(tensor_name)
        # float64: the squared norms below are differences of nearly equal numbers.
        halves_by_layer.setdefault(layer, {})[half_name] = tensor.double().flatten(1)
    return {
        layer: (halves["lora_A"], halves["lora_B"], scaling_of(adapter.config, layer))
        for layer, halves in halves_by_layer.items()
    }


def _inner(first: Pair, second: Pair) -> float:
    """<W1, W2> of the module's head: A (r, in), B (out, r), scale s."""
    (a1, b1, s1) = first
    (a2, b2, s2) = second
    return float(s1 * s2 * torch.trace((b2.T @ b1) @ (a1 @ a2.T)))
