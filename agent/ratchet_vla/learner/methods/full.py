"""Full fine-tuning: the control without LoRA. All weights of the policy move; what is published is a whole model.

Knows the policy's own weights. There is no adapter to swap, so the policy being trained is the one that is evaluated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ratchet_vla.adapters.protocol import AdapterStore, Provenance
from ratchet_vla.learner.methods.base import SeqFT
from ratchet_vla.policy.protocol import Policy


class FullFineTuning(SeqFT):
    """Seq. FT on every weight."""

    name = "full_ft"
    whole_model = True
    can_retain = False

    def start(self, seed: int) -> None:
        super().start(seed)  # an empty adapter: it adds nothing and is not trained
        self._unfreeze()

    def _unfreeze(self) -> None:
        adapter = {id(p) for p in self.lora.trainable()}
        for parameter in self.lora.trainable():
            parameter.requires_grad_(False)
        self._own: list[nn.Parameter] = []
        self._names: list[str] = []
        for name, parameter in self.policy.module.named_parameters():
            if id(parameter) not in adapter and parameter.is_floating_point():
                parameter.requires_grad_(True)
                self._own.append(parameter)
                self._names.append(name.replace(".base_layer.", "."))

    def parameters(self) -> list[nn.Parameter]:
        return self._own

    def identity(self) -> str:
        """SHA-256 over all weights; there is no adapter whose id could tell."""
        total = hashlib.sha256(b"ratchet.full.v1")
        for parameter in self._own:
            total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def publish(self, store: AdapterStore, provenance: Provenance) -> str:
        """The id alone: whole models do not belong in a store of adapters; the run's checkpoint holds the weights."""
        return self.identity()

    def serve(self, serve: Callable[[str], Policy], ids: Sequence[str], stage: int, task: str) -> Policy:
        return self.policy

    def acting(self, ids: Sequence[str], stage: int, task: str) -> str:
        return self.identity()

    def state_dict(self) -> dict[str, Any]:
        return {"weights": [p.detach() for p in self._own], "names": self._names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._unfreeze()
        with torch.no_grad():
            for mine, theirs in zip(self._own, state["weights"], strict=True):
                mine.copy_(theirs)
