"""Why an update does or does not forget: its rank and size layer by layer, and how much of it the base is sensitive to.

Knows adapters, the base's weights and gradients. Knows no environment: gradients come from samples or episodes given.
Source: the analysis of arXiv 2603.11653 (effective rank and norm of the update, Fisher energy of new-task gradients).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agent.adapters.identity import Adapter
from agent.adapters.lora import scaling_of, split_name


@dataclass(frozen=True)
class LayerUpdate:
    """One layer's change of weights. effective_rank: exponential of the entropy of its normalised singular values."""

    layer: str
    norm: float
    effective_rank: float
    shape: tuple[int, int]


def effective_rank(singular: Tensor) -> float:
    """exp(-sum p ln p) with p = s / sum s; 0 for a zero matrix. Source: Roy and Vetterli 2007, EUSIPCO."""
    total = float(singular.sum())
    if total <= 0.0:
        return 0.0
    share = (singular / total).clamp_min(1e-30)
    return math.exp(-float((share * share.log()).sum()))


def adapter_update(adapter: Adapter) -> list[LayerUpdate]:
    """Norm and effective rank of s B A per layer, from the r x r factors: the full product is never built."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        layer, half = split_name(name)
        halves.setdefault(layer, {})[half] = tensor.double().flatten(1)
    out = []
    for layer, pair in sorted(halves.items()):
        a, b = pair["lora_A"], pair["lora_B"]
        # Singular values of B A are those of R_b R_a^T, with B = Q_b R_b and A^T = Q_a R_a.
        small = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
        singular = torch.linalg.svdvals(small) * scaling_of(adapter.config, layer)
        out.append(LayerUpdate(layer, float(singular.norm()), effective_rank(singular), (b.shape[0], a.shape[1])))
    return out


def weight_update(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[LayerUpdate]:
    """The same for whole matrices: what full fine-tuning changed. Tensors of fewer than 2 dimensions are left out."""
    out = []
    for name in sorted(before):
        if before[name].ndim < 2:
            continue
        change = (after[name].double() - before[name].double()).flatten(1)
        singular = torch.linalg.svdvals(change)
        shape = (change.shape[0], change.shape[1])
        out.append(LayerUpdate(name, float(singular.norm()), effective_rank(singular), shape))
    return out


def fisher(losses: Iterable[Callable[[], Tensor]], parameters: list[nn.Parameter]) -> list[Tensor]:
    """Diagonal empirical Fisher information: mean of squared gradients of negative log-likelihoods.

    losses: one callable per sample (or small batch) that gives the loss with its graph.
    """
    total = [torch.zeros_like(p) for p in parameters]
    count = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        for t, g in zip(total, gradients, strict=True):
            if g is not None:
                t += g.detach() ** 2
        count += 1
    return [t / max(count, 1) for t in total]


def fisher_energy(gradient: list[Tensor], information: list[Tensor]) -> float:
    """Share of the gradient's energy that falls where the base is sensitive, in [0, 1].

        sum_i g_i^2 F_i / (sum_i g_i^2 * max_i F_i)

    0: the new task pulls only on weights that the old tasks do not care about; 1: only on the one they care most about.
    """
    squared = torch.cat([(g.double() ** 2).flatten() for g in gradient])
    weight = torch.cat([f.double().flatten() for f in information])
    energy, largest = float(squared.sum()), float(weight.max())
    if energy <= 0.0 or largest <= 0.0:
        return 0.0
    return float((squared * weight).sum()) / (energy * largest)
