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
        """Freeze the adapter and let every other weight move."""
        super().start(seed)  # an empty adapter: it adds nothing and is not trained
        self._unfreeze()

    def _unfreeze(self) -> None:
        adapter_ids = {id(parameter) for parameter in self.lora.trainable()}
        for parameter in self.lora.trainable():
            parameter.requires_grad_(False)
        self._own: list[nn.Parameter] = []
        self._names: list[str] = []
        for name, parameter in self.policy.module.named_parameters():
            if id(parameter) not in adapter_ids and parameter.is_floating_point():
                parameter.requires_grad_(True)
                self._own.append(parameter)
                # A layer that carries an adapter is wrapped; its weight is stored under the name that it had before.
                self._names.append(name.replace(".base_layer.", "."))

    def parameters(self) -> list[nn.Parameter]:
        """All weights but the adapter's."""
        return self._own

    def identity(self) -> str:
        """SHA-256 over all weights; there is no adapter whose id could tell."""
        digest = hashlib.sha256(b"ratchet.full.v1")
        for parameter in self._own:
            # As bytes, because numpy has no bfloat16.
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def publish(self, store: AdapterStore, provenance: Provenance) -> str:
        """The id alone: whole models do not belong in a store of adapters; the run's checkpoint holds the weights."""
        return self.identity()

    def serve(self, serve: Callable[[str], Policy], ids: Sequence[str], stage: int, task: str) -> Policy:
        """The policy being trained, whatever the stage."""
        return self.policy

    def acting(self, ids: Sequence[str], stage: int, task: str) -> str:
        """Hash of the weights as they are now."""
        return self.identity()

    def state_dict(self) -> dict[str, Any]:
        """All weights, in the order of the module."""
        return {"weights": [parameter.detach() for parameter in self._own], "names": self._names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Write the weights into the policy in place."""
        self._unfreeze()
        with torch.no_grad():
            for parameter, stored in zip(self._own, state["weights"], strict=True):
                parameter.copy_(stored)
