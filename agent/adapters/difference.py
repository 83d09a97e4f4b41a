"""How far two adapters are apart, layer by layer, without ever forming the full weight change.

Knows LoRA pairs and their scale. Knows no module: it works on stored adapters of any base.
With W = s B A, inner products need only r x r matrices: <W1, W2> = s1 s2 tr((B2^T B1)(A1 A2^T)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.adapters.identity import Adapter
from agent.adapters.lora import scaling_of, split_name
from agent.errors import RatchetError


@dataclass(frozen=True)
class Change:
    """One layer: Frobenius norms of both weight changes and of their difference, and the cosine between them.

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
    sides = [_layers(first), _layers(second)]
    found = []
    for layer in sorted({*sides[0], *sides[1]}):
        one, two = (side.get(layer) for side in sides)
        n1, n2 = (_inner(x, x) if x else 0.0 for x in (one, two))
        cross = _inner(one, two) if one and two else 0.0
        norms = math.sqrt(max(n1, 0.0)), math.sqrt(max(n2, 0.0))
        apart = math.sqrt(max(n1 + n2 - 2.0 * cross, 0.0))
        cosine = cross / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0
        found.append(Change(layer, norms[0], norms[1], apart, max(-1.0, min(1.0, cosine))))
    return sorted(found, key=lambda c: -c.difference)


Pair = tuple[Tensor, Tensor, float]


def _layers(adapter: Adapter) -> dict[str, Pair]:
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        layer, half = split_name(name)
        halves.setdefault(layer, {})[half] = tensor.double().flatten(1)
    return {
        layer: (pair["lora_A"], pair["lora_B"], scaling_of(adapter.config, layer)) for layer, pair in halves.items()
    }


def _inner(one: Pair, two: Pair) -> float:
    (a1, b1, s1), (a2, b2, s2) = one, two
    return float(s1 * s2 * torch.trace((b2.T @ b1) @ (a1 @ a2.T)))
