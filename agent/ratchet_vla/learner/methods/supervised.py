"""Supervised instead of reinforcement learning: the control for on-policy data. Each update imitates the task's
demonstrations.

Source: arXiv 2603.11653, where sequential supervised fine-tuning forgets. No replay here: that is the point.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.methods.base import SeqFT, TaskUpdater, require_discrete
from ratchet_vla.learner.supervised.training import Samples, soft_targets
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
        self.steps, self.batch, self.learning_rate, self.smoothing = steps, batch, learning_rate, smoothing
        self._rows: Int64 = np.zeros(0, np.int64)
        self._stage = -1

    def begin_task(self, stage: int, seed: int) -> None:
        assert self.demonstrations is not None
        self._stage = stage
        name = self.tasks[stage]
        wanted = [i for i, n in enumerate(self.demonstrations.tasks) if n == name]
        self._rows = np.flatnonzero(np.isin(self.demonstrations.task, wanted))
        if not len(self._rows):
            raise RatchetError("learn.no_samples_of_task", f"no demonstrations of '{name}'", fix="record some")

    def make_updater(self, config: UpdateConfig, generator: torch.Generator, ranks: Ranks | None = None) -> TaskUpdater:
        """All ranks take the same steps on the same samples: imitation is cheap."""
        return _Imitation(self, config, generator)

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self._stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["stage"] >= 0:
            self.begin_task(state["stage"], 0)

    def frames(self, generator: torch.Generator) -> tuple[PolicyInput, Int64]:
        """A random batch of the current task's samples."""
        data = self.demonstrations
        assert data is not None
        rows = self._rows[torch.randint(0, len(self._rows), (self.batch,), generator=generator).numpy()]
        state = torch.from_numpy(data.state[rows]) if data.state.shape[1] else None
        return PolicyInput(data.images[rows], state, [data.instructions[t] for t in data.task[rows]]), rows


class _Imitation:
    def __init__(self, method: Supervised, config: UpdateConfig, generator: torch.Generator) -> None:
        self.method, self.config, self.generator = method, config, generator
        self.optimizer = torch.optim.AdamW(
            method.parameters(), lr=method.learning_rate, weight_decay=config.weight_decay, eps=config.adam_epsilon
        )

    def update(self, batch: Any) -> dict[str, float]:
        policy = require_discrete(self.method.policy)
        data = self.method.demonstrations
        assert data is not None
        losses = []
        for _ in range(self.method.steps):
            frames, rows = self.method.frames(self.generator)
            tokens = policy.tokens_of(torch.from_numpy(data.actions[rows])).to(policy.device)
            logits = policy.logits(frames, tokens).float()
            target = soft_targets(tokens, logits.shape[-1], self.method.smoothing)
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
        return {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
