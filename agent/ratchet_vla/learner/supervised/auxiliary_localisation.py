"""Eyes before hands: the small VLA's tower learns where the task's objects are, before anything learns to act.

Knows the loss and its throw-away head. Knows no optimiser and no simulator; where things are comes with the samples.
A short cloning of actions finds the average motion of each task long before the objects in the picture, and a policy
that moves by heart has nothing to learn from. Positions come from simulation; the policy itself never takes them.
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


def moving(scene: Float32, task: Int64) -> tuple[Float32, np.ndarray]:
    """Positions in standard deviations within their task, (M, P) float32 clipped to +-3, and (T, P) bool which of them
    vary at all.

    scene: (M, P) metres, NaN where a task has none. task: (M,) index.
    """
    out = np.zeros_like(scene)
    varies = np.zeros((int(task.max()) + 1, scene.shape[1]), bool)
    for t in np.unique(task):
        mine = scene[task == t]
        spread = mine.std(0)
        varies[t] = spread > MOVES  # False for NaN
        out[task == t] = np.where(varies[t], (mine - mine.mean(0)) / np.where(varies[t], spread, 1), 0).clip(-3, 3)
    return out, varies


class SceneObjective(nn.Module):
    """Smooth L1 error of the positions that a head of two layers reads from the patches.

    scene: (M, P) float32, metres. task: (M,) index of each sample's task.

    Raises:
        RatchetError: learn.no_scene where the samples do not tell, or nothing ever moves.
    """

    def __init__(self, policy: PrismaticPolicy, scene: Float32, task: Int64) -> None:
        super().__init__()
        targets, varies = moving(scene, task) if scene.shape[1] else (scene, np.zeros((1, 0), bool))
        if not varies.any():
            raise RatchetError(
                "learn.no_scene",
                "the demonstrations do not say where the task's objects are, so that eyes could learn it",
                fix="record them anew in a suite that does, or give --eyes.steps 0",
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
        told, wanted = self._both(batch, rows)
        return functional.smooth_l1_loss(told, wanted)

    def measure(self, batch: PolicyInput, rows: Tensor) -> tuple[float, float, float]:
        """Loss; mean absolute error in standard deviations of the position within its task, where guessing gives 0.8;
        and 0."""
        told, wanted = self._both(batch, rows)
        return float(functional.smooth_l1_loss(told, wanted)), float((told - wanted).abs().mean()), 0.0

    def _both(self, batch: PolicyInput, rows: Tensor) -> tuple[Tensor, Tensor]:
        policy = self.policy[0]
        pixels, ids, mask, _ = policy.inputs(batch)
        with policy.autocast():
            seen = policy.network.see(pixels, ids, mask, policy.compute_dtype)
        task = self.task[rows].to(seen.device)
        features = torch.cat([seen.float().flatten(1), self.which(task)], 1)
        told = self.tell(functional.gelu(self.read(features)))
        asked = self.varies[self.task[rows]].to(seen.device)
        return told[asked], self.targets[rows].to(seen.device)[asked]
