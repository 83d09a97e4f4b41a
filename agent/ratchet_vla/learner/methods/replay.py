"""Expert replay and dark experience replay: every optimiser step also answers for stored demonstration frames.

Source: arXiv 2603.11653. Expert replay adds 0.03 x cross-entropy on the demonstrated tokens; dark experience replay
(Buzzega et al. 2020, arXiv 2004.07211) adds 0.03 x mean squared error to the base model's logits on the same frames.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.methods.base import SeqFT, require_discrete
from ratchet_vla.learner.supervised.training import Samples, soft_targets
from ratchet_vla.policy.protocol import PolicyInput
from ratchet_vla.records import Int64

WEIGHT = 0.03


class ExpertReplay(SeqFT):
    """+ weight * cross-entropy on demonstrations of tasks that are not being learned now.

    batch: frames per optimiser step. smoothing: deviation of the targets in bins, as in pretraining; 0 for one-hot.
    """

    name = "expert_replay"
    needs_demonstrations = True

    def __init__(
        self,
        demonstrations: Samples | None = None,
        *,
        weight: float = WEIGHT,
        batch: int = 64,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(demonstrations)
        self.weight, self.batch, self.smoothing = weight, batch, smoothing
        self._rows: Int64 = np.zeros(0, np.int64)
        self._stage = -1

    def begin_task(self, stage: int, seed: int) -> None:
        """Frames of earlier tasks, and of all others that are stored, but not of the tasks learned now or later."""
        assert self.demonstrations is not None
        self._stage = stage
        ahead = {*self.tasks[stage:]}
        replayed = [i for i, name in enumerate(self.demonstrations.tasks) if name not in ahead]
        self._rows = np.flatnonzero(np.isin(self.demonstrations.task, replayed))
        if not len(self._rows):
            text = "no demonstrations of other tasks to replay"
            raise RatchetError("learn.no_replay", text, fix="add demonstrations of earlier tasks")

    def extra_loss(self, generator: torch.Generator) -> Tensor | None:
        assert self.demonstrations is not None
        picks = torch.randint(0, len(self._rows), (self.batch,), generator=generator).numpy()
        rows = self._rows[picks]
        data = self.demonstrations
        state = torch.from_numpy(data.state[rows]) if data.state.shape[1] else None
        frames = PolicyInput(data.images[rows], state, [data.instructions[t] for t in data.task[rows]])
        return self.weight * self._term(frames, rows)

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self._stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["stage"] >= 0:
            self.begin_task(state["stage"], 0)

    def _term(self, frames: PolicyInput, rows: Int64) -> Tensor:
        assert self.demonstrations is not None
        policy = require_discrete(self.policy)
        tokens = policy.tokens_of(torch.from_numpy(self.demonstrations.actions[rows])).to(policy.device)
        logits = policy.logits(frames, tokens).float()
        target = soft_targets(tokens, logits.shape[-1], self.smoothing)
        return -(target * logits.log_softmax(-1)).sum(-1).mean()


class DarkReplay(ExpertReplay):
    """+ weight * mean squared error to the base model's logits on the same frames."""

    name = "dark_replay"

    def _term(self, frames: PolicyInput, rows: Int64) -> Tensor:
        assert self.demonstrations is not None
        policy = require_discrete(self.policy)
        tokens = policy.tokens_of(torch.from_numpy(self.demonstrations.actions[rows]))
        with torch.no_grad(), self.lora.disabled():
            base = policy.logits(frames, tokens).float()
        return functional.mse_loss(policy.logits(frames, tokens).float(), base)
