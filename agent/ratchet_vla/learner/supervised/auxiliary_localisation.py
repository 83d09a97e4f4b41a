"""Auxiliary localisation: the small VLA's vision tower learns where the task's objects are before it learns to act.

Knows the loss and its throw-away head. Knows no optimiser and no simulator; positions come with the samples.
A short cloning of actions finds the average motion of each task long before the objects in the image, and a policy that
replays a motion has nothing to learn from. Positions come from simulation; the policy itself never takes them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.protocol import PolicyInput
from ratchet_vla.records import Float32, Int64

MOVES = 0.015
"""Metres: a coordinate that varies less than this within its task is no target."""


def normalised_positions(scene: Float32, task: Int64) -> tuple[Float32, np.ndarray]:
    """Positions in standard deviations within their task, (M, P) float32 clipped to +-3, and (T, P) bool which of them
    vary at all.

    scene: (M, P) metres, NaN where a task has none. task: (M,) index.
    """
    out = np.zeros_like(scene)
    varies = np.zeros((int(task.max()) + 1, scene.shape[1]), bool)
    for t in np.unique(task):
        positions = scene[task == t]
        spread = positions.std(0)
        varies[t] = spread > MOVES  # False for NaN
        out[task == t] = np.where(varies[t], (positions - positions.mean(0)) / np.where(varies[t], spread, 1), 0).clip(
            -3, 3
        )
    return out, varies


class LocalisationObjective(nn.Module):
    """Smooth L1 error of the object positions that a head of two layers reads from the patches.

    scene: (M, P) float32, metres. task: (M,) index of each sample's task.

    Raises:
        RatchetError: learn.no_scene where the samples hold no positions, or nothing ever moves.
    """

    def __init__(self, policy: PrismaticPolicy, scene: Float32, task: Int64) -> None:
        super().__init__()
        targets, varies = normalised_positions(scene, task) if scene.shape[1] else (scene, np.zeros((1, 0), bool))
        if not varies.any():
            raise RatchetError(
                "learn.no_scene",
                "the demonstrations lack the positions of the task's objects, which auxiliary localisation learns",
                fix="record them anew in a suite that does, or give --localisation.steps 0",
            )
        self.policy = [policy]  # in a list: its parameters are not this module's
        self.targets, self.task = torch.from_numpy(targets), torch.from_numpy(task)
        self.varies = torch.from_numpy(varies)
        config, views = policy.config, len(policy.spec.cameras)
        patches = views * policy.network.vision_backbone.patches
        self.which = nn.Embedding(len(varies), 64)
        self.read = nn.Linear(patches * config.hidden + 64, 256)
        self.tell = nn.Linear(256, scene.shape[1])
        self.to(policy.device)

    def trained(self) -> list[nn.Parameter]:
        """What learns: the tower, its projector, the words that modulate it, and the head."""
        network = self.policy[0].network
        seeing = (network.vision_backbone, network.projector, network.language_model.model.embed_tokens, self)
        return [p for module in seeing for p in module.parameters()]

    def loss(self, batch: PolicyInput, rows: Tensor, generator: torch.Generator) -> Tensor:
        predicted, targets = self._predictions_and_targets(batch, rows)
        return functional.smooth_l1_loss(predicted, targets)

    def measure(self, batch: PolicyInput, rows: Tensor) -> tuple[float, float, float]:
        """Loss; mean absolute error in standard deviations of the position within its task, where guessing gives 0.8;
        and 0."""
        predicted, targets = self._predictions_and_targets(batch, rows)
        return float(functional.smooth_l1_loss(predicted, targets)), float((predicted - targets).abs().mean()), 0.0

    def _predictions_and_targets(self, batch: PolicyInput, rows: Tensor) -> tuple[Tensor, Tensor]:
        policy = self.policy[0]
        pixels, ids, mask, _ = policy.inputs(batch)
        with policy.autocast():
            patches = policy.network.see(pixels, ids, mask, policy.compute_dtype)
        task = self.task[rows].to(patches.device)
        features = torch.cat([patches.float().flatten(1), self.which(task)], 1)
        positions = self.tell(functional.gelu(self.read(features)))
        is_target = self.varies[self.task[rows]].to(patches.device)
        return positions[is_target], self.targets[rows].to(patches.device)[is_target]
