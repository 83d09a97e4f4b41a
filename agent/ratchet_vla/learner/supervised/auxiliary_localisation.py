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
    """Normalise positions within their task.

    Returns (M, P) float32 in standard deviations clipped to +-3, and (T, P) bool, which coordinates vary at all.

    scene: (M, P) metres, NaN where a task has none. task: (M,) index.
    """
    normalised = np.zeros_like(scene)
    varies = np.zeros((int(task.max()) + 1, scene.shape[1]), bool)
    for task_index in np.unique(task):
        positions = scene[task == task_index]
        deviation = positions.std(0)
        varies[task_index] = deviation > MOVES  # False for NaN
        divisor = np.where(varies[task_index], deviation, 1)  # 1 only avoids 0 / 0; those coordinates become 0
        scaled = (positions - positions.mean(0)) / divisor
        normalised[task == task_index] = np.where(varies[task_index], scaled, 0).clip(-3, 3)
    return normalised, varies


class LocalisationObjective(nn.Module):
    """Smooth L1 error of the object positions that a head of two layers reads from the patches.

    scene: (M, P) float32, metres. task: (M,) index of each sample's task.

    Raises:
        RatchetError: learn.no_scene where the samples hold no positions, or nothing ever moves.
    """

    def __init__(self, policy: PrismaticPolicy, scene: Float32, task: Int64) -> None:
        super().__init__()
        targets = scene
        varies = np.zeros((1, 0), bool)
        if scene.shape[1]:
            targets, varies = normalised_positions(scene, task)
        if not varies.any():
            raise RatchetError(
                "learn.no_scene",
                "the demonstrations lack the positions of the task's objects, which auxiliary localisation learns",
                fix="record them anew in a suite that does, or give --localisation.steps 0",
            )
        self.policy = [policy]  # in a list: its parameters are not this module's
        self.targets = torch.from_numpy(targets)
        self.task = torch.from_numpy(task)
        self.varies = torch.from_numpy(varies)
        network_config = policy.config
        views = len(policy.spec.cameras)
        patches = views * policy.network.vision_backbone.patches
        self.which = nn.Embedding(len(varies), 64)
        self.read = nn.Linear(patches * network_config.hidden + 64, 256)
        self.tell = nn.Linear(256, scene.shape[1])
        self.to(policy.device)

    def trained(self) -> list[nn.Parameter]:
        """What learns: the tower, its projector, the words that modulate it, and the head."""
        network = self.policy[0].network
        trained_modules = (network.vision_backbone, network.projector, network.language_model.model.embed_tokens, self)
        return [parameter for module in trained_modules for parameter in module.parameters()]

    def loss(self, batch: PolicyInput, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Smooth L1 error, mean over the coordinates that vary. rows: (B,)."""
        predicted, targets = self._predictions_and_targets(batch, rows)
        return functional.smooth_l1_loss(predicted, targets)

    def measure(self, batch: PolicyInput, rows: Tensor) -> tuple[float, float, float]:
        """Loss, error and 0, because positions have no entropy.

        error: mean absolute, in standard deviations of the position within its task; guessing the mean gives 0.8.
        """
        predicted, targets = self._predictions_and_targets(batch, rows)
        return float(functional.smooth_l1_loss(predicted, targets)), float((predicted - targets).abs().mean()), 0.0

    def _predictions_and_targets(self, batch: PolicyInput, rows: Tensor) -> tuple[Tensor, Tensor]:
        policy = self.policy[0]
        pixels, token_ids, token_mask, _ = policy.inputs(batch)
        with policy.autocast():
            patches = policy.network.see(pixels, token_ids, token_mask, policy.compute_dtype)
        task_index = self.task[rows].to(patches.device)
        # (B, patches * hidden + 64): the head is told the task, because positions are normalised within it.
        features = torch.cat([patches.float().flatten(1), self.which(task_index)], 1)
        positions = self.tell(functional.gelu(self.read(features)))  # (B, P)
        is_target = self.varies[self.task[rows]].to(patches.device)
        return positions[is_target], self.targets[rows].to(patches.device)[is_target]
