"""Supervised instead of reinforcement learning, the control for on-policy data: each update imitates demonstrations.

Source: arXiv 2603.11653, where sequential supervised fine-tuning forgets. No replay here: that is the point.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.methods.base import SeqFT, TaskUpdater, require_discrete
from ratchet_vla.learner.supervised.training import Samples, observations, rows_of_tasks, soft_targets
from ratchet_vla.learner.update.ranks import Ranks
from ratchet_vla.learner.update.step import UpdateConfig
from ratchet_vla.policy.protocol import PolicyInput
from ratchet_vla.records import Int64


class Supervised(SeqFT):
    """Cross-entropy on demonstrations of the current task.

    steps: optimiser steps per update, so that a task takes `updates * steps`. batch: samples per step.
    smoothing: deviation of the targets in bins.
    """

    name = "supervised"
    needs_demonstrations = True
    needs_rollouts = False
    can_retain = False

    def __init__(
        self,
        demonstrations: Samples | None = None,
        *,
        steps: int = 20,
        batch: int = 64,
        learning_rate: float = 1e-3,
        smoothing: float = 4.0,
    ) -> None:
        super().__init__(demonstrations)
        self.steps = steps
        self.batch = batch
        self.learning_rate = learning_rate
        self.smoothing = smoothing
        self._rows: Int64 = np.zeros(0, np.int64)
        self._stage = -1

    def begin_task(self, stage: int, seed: int) -> None:
        """Look up the task's demonstrations. Raises RatchetError learn.no_samples_of_task."""
        assert self.demonstrations is not None
        self._stage = stage
        task_name = self.tasks[stage]
        self._rows = rows_of_tasks(self.demonstrations, {task_name})
        if not len(self._rows):
            raise RatchetError("learn.no_samples_of_task", f"no demonstrations of '{task_name}'", fix="record some")

    def make_updater(self, config: UpdateConfig, generator: torch.Generator, ranks: Ranks | None = None) -> TaskUpdater:
        """All ranks take the same steps on the same samples: imitation is cheap."""
        return _Imitation(self, config, generator)

    def state_dict(self) -> dict[str, Any]:
        """The stage, from which the rows to imitate follow."""
        return {"stage": self._stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        if state["stage"] >= 0:
            self.begin_task(state["stage"], 0)

    def frames(self, generator: torch.Generator) -> tuple[PolicyInput, Int64]:
        """A random batch of the current task's samples."""
        data = self.demonstrations
        assert data is not None
        rows = self._rows[torch.randint(0, len(self._rows), (self.batch,), generator=generator).numpy()]
        return observations(data, rows), rows


class _Imitation:
    """Optimiser steps on demonstrations, behind the interface of an on-policy update."""

    def __init__(self, method: Supervised, config: UpdateConfig, generator: torch.Generator) -> None:
        self.method = method
        self.config = config
        self.generator = generator
        self.optimizer = torch.optim.AdamW(
            method.parameters(), lr=method.learning_rate, weight_decay=config.weight_decay, eps=config.adam_epsilon
        )

    def update(self, batch: Any) -> dict[str, float]:
        """Take `steps` steps; the batch is None."""
        policy = require_discrete(self.method.policy)
        data = self.method.demonstrations
        assert data is not None
        losses = []
        for _ in range(self.method.steps):
            frames, rows = self.method.frames(self.generator)
            tokens = policy.tokens_of(torch.from_numpy(data.actions[rows])).to(policy.device)
            logits = policy.logits(frames, tokens).float()
            target = soft_targets(tokens, logits.shape[-1], self.method.smoothing)  # (B, K, D, bins)
            loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.method.parameters(), self.config.gradient_clip)
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return {
            "loss": float(np.mean(losses)),
            "optimizer_steps": len(losses),
            "samples": len(losses) * self.method.batch,
        }

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, besides the weights."""
        return {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
