"""Why an update does or does not forget: its rank and size layer by layer, and how much of it the base is sensitive to.

Knows adapters, the base's weights and gradients. Knows no environment: gradients come from samples or episodes given.
Source: the analysis of arXiv 2603.11653 (effective rank and norm of the update, Fisher energy of new-task gradients).
How that paper normalises the energy is not known here, so its figures are not on the same scale as these: compare
networks that were measured by this module with each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ratchet_vla.adapters.identity import Adapter
from ratchet_vla.adapters.lora.layers import scaling_of, split_name
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.supervised.training import Samples, observations, rows_of_tasks
from ratchet_vla.learner.update.step import UpdateConfig, Updater
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.protocol import Policy
from ratchet_vla.records import Int64


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
    updates = []
    for layer, pair in sorted(halves.items()):
        a = pair["lora_A"]
        b = pair["lora_B"]
        # Singular values of B A are those of R_b R_a^T, with B = Q_b R_b and A^T = Q_a R_a.
        core = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
        singular = torch.linalg.svdvals(core) * scaling_of(adapter.config, layer)
        updates.append(LayerUpdate(layer, float(singular.norm()), effective_rank(singular), (b.shape[0], a.shape[1])))
    return updates


def weight_update(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[LayerUpdate]:
    """The same for whole matrices: what full fine-tuning changed. Tensors of fewer than 2 dimensions are left out."""
    updates = []
    for name in sorted(before):
        if before[name].ndim < 2:
            continue
        change = (after[name].double() - before[name].double()).flatten(1)
        singular = torch.linalg.svdvals(change)
        shape = (change.shape[0], change.shape[1])
        updates.append(LayerUpdate(name, float(singular.norm()), effective_rank(singular), shape))
    return updates


def fisher(losses: Iterable[Callable[[], Tensor]], parameters: list[nn.Parameter]) -> list[Tensor]:
    """Diagonal empirical Fisher information: mean of squared gradients of negative log-likelihoods.

    losses: one callable per sample (or small batch) that gives the loss with its graph.
    """
    total = [torch.zeros_like(parameter) for parameter in parameters]
    count = 0
    for loss in losses:
        sample_gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        for squares, gradient in zip(total, sample_gradients, strict=True):
            if gradient is not None:
                squares.add_(gradient.detach() ** 2)
        count += 1
    return [squares / max(count, 1) for squares in total]


def fisher_energy(gradient: list[Tensor], information: list[Tensor]) -> float:
    """Share of the gradient's energy that falls where the base is sensitive, in [0, 1].

        sum_i g_i^2 F_i / (sum_i g_i^2 * max_i F_i)

    0: the new task pulls only on weights that the old tasks do not care about; 1: only on the one they care most about.
    """
    squared, sensitivity = _flat(gradient, information)
    energy = float(squared.sum())
    largest = float(sensitivity.max())
    if energy <= 0.0 or largest <= 0.0:
        return 0.0
    return float((squared * sensitivity).sum()) / (energy * largest)


def energy_in_top(gradient: list[Tensor], information: list[Tensor], share: float) -> float:
    """Share of the gradient's energy on the `share` of weights with the most information, in [0, 1].

    A gradient that knows nothing of the base has `share` there; unlike `fisher_energy` it does not hang on one weight.
    """
    squared, sensitivity = _flat(gradient, information)
    energy = float(squared.sum())
    if energy <= 0.0:
        return 0.0
    count = max(1, round(share * len(sensitivity)))
    return float(squared[sensitivity.topk(count).indices].sum()) / energy


def _flat(gradient: list[Tensor], information: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Squared gradient and information of every weight, (W,) float64 each: squares underflow in float32."""
    squared = torch.cat([(layer.double() ** 2).flatten() for layer in gradient])
    sensitivity = torch.cat([layer.double().flatten() for layer in information])
    return squared, sensitivity


def policy_gradient(
    policy: Policy, parameters: list[nn.Parameter], batch: RolloutBatch, config: UpdateConfig
) -> list[Tensor]:
    """Gradient of the policy loss over a whole batch of episodes; nothing is changed.

    Raises:
        RatchetError: learner.no_samples where nothing distinguishes the episodes.
    """
    gradients: list[Tensor] = []

    def keep() -> None:
        for parameter in parameters:
            gradient = parameter.grad
            gradients.append(torch.zeros_like(parameter) if gradient is None else gradient.detach().clone())

    # Learning rate 0: the updater runs as in training, and every weight stays bit for bit what it was.
    still = replace(config, minibatches=1, passes=1, learning_rate=0.0, weight_decay=0.0)
    Updater(policy, parameters, still, torch.Generator().manual_seed(0), on_gradient=keep).update(batch)
    for parameter in parameters:
        parameter.grad = None
    return gradients


def demonstration_losses(
    policy: PrismaticPolicy, data: Samples, *, exclude: str, count: int, seed: int
) -> list[Callable[[], Tensor]]:
    """Negative log-likelihoods of the demonstrated tokens, one frame each, of all tasks but one.

    Raises:
        RatchetError: learn.no_replay where there are no other tasks.
    """
    rows = rows_of_tasks(data, {*data.tasks} - {exclude})
    if not len(rows):
        raise RatchetError("learn.no_replay", f"demonstrations of '{exclude}' only", fix="add other tasks")
    chosen = np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False)
    return [lambda row=int(row): _imitation(policy, data, np.array([row])) for row in chosen]  # type: ignore[misc]


def demonstration_gradients(
    policy: PrismaticPolicy, parameters: list[nn.Parameter], data: Samples, task: str, count: int
) -> list[Tensor]:
    """Gradient of the mean imitation loss on one task. Raises RatchetError learn.no_samples_of_task."""
    rows = rows_of_tasks(data, {task})
    if not len(rows):
        raise RatchetError("learn.no_samples_of_task", f"no demonstrations of '{task}'", fix="record some")
    chosen = np.random.default_rng(0).choice(rows, min(count, len(rows)), replace=False)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    # 32 frames per forward; the shares add up to the mean over all of them.
    for part in np.array_split(chosen, -(-len(chosen) // 32)):
        loss = _imitation(policy, data, part) * (len(part) / len(chosen))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for gradient_sum, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                gradient_sum.add_(gradient)
    return total


def _imitation(policy: PrismaticPolicy, data: Samples, rows: Int64) -> Tensor:
    """Mean over frames of the chunk's negative log-likelihood."""
    tokens = policy.tokens_of(torch.from_numpy(data.actions[rows]))
    log_prob, _ = policy.log_prob(observations(data, rows), tokens, 1.0)  # (R, K, D)
    return -log_prob.flatten(1).sum(1).mean()
