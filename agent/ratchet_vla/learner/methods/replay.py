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
from ratchet_vla.learner.supervised.training import Samples, observations, rows_of_tasks, soft_targets
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
        self.weight = weight
        self.batch = batch
        self.smoothing = smoothing
        self._rows: Int64 = np.zeros(0, np.int64)
        self._stage = -1

    def begin_task(self, stage: int, seed: int) -> None:
        """Frames of earlier tasks, and of all others that are stored, but not of the tasks learned now or later."""
        assert self.demonstrations is not None
        self._stage = stage
        replayed = {*self.demonstrations.tasks} - {*self.tasks[stage:]}
        self._rows = rows_of_tasks(self.demonstrations, replayed)
        if not len(self._rows):
            text = "no demonstrations of other tasks to replay"
            raise RatchetError("learn.no_replay", text, fix="add demonstrations of earlier tasks")

    def extra_loss(self, generator: torch.Generator) -> Tensor | None:
        """The weighted replay term of one optimiser step, on a random batch of stored frames."""
        assert self.demonstrations is not None
        picks = torch.randint(0, len(self._rows), (self.batch,), generator=generator).numpy()
        rows = self._rows[picks]
        return self.weight * self._term(observations(self.demonstrations, rows), rows)

    def state_dict(self) -> dict[str, Any]:
        """The stage, from which the rows to replay follow."""
        return {"stage": self._stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        if state["stage"] >= 0:
            self.begin_task(state["stage"], 0)

    def _term(self, frames: PolicyInput, rows: Int64) -> Tensor:
        assert self.demonstrations is not None
        policy = require_discrete(self.policy)
        tokens = policy.tokens_of(torch.from_numpy(self.demonstrations.actions[rows])).to(policy.device)
        logits = policy.logits(frames, tokens).float()  # (B, K, D, bins)
        target = soft_targets(tokens, logits.shape[-1], self.smoothing)
        return -(target * logits.log_softmax(-1)).sum(-1).mean()


class DarkReplay(ExpertReplay):
    """+ weight * mean squared error to the base model's logits on the same frames."""

    name = "dark_replay"

    def _term(self, frames: PolicyInput, rows: Int64) -> Tensor:
        assert self.demonstrations is not None
        policy = require_discrete(self.policy)
        tokens = policy.tokens_of(torch.from_numpy(self.demonstrations.actions[rows]))
        # The base is the policy with its adapter switched off: no second copy of the weights is kept.
        with torch.no_grad(), self.lora.disabled():
            base = policy.logits(frames, tokens).float()
        return functional.mse_loss(policy.logits(frames, tokens).float(), base)
