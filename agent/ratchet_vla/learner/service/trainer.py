"""The adapter under training and its optimiser: from a checkpoint, through one update, to the next checkpoint.

Knows policy, LoRA, updater and files that hold their state. Knows no network, no order of tasks and no gate.
With several processes rank 0 holds the state; the others (`assist`) get it with each batch and keep nothing.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ratchet_vla.adapters.identity import Adapter, binding_of
from ratchet_vla.adapters.lora.layers import Lora
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.samples import log_prob_gap, to_batch
from ratchet_vla.learner.service.config import ServiceConfig
from ratchet_vla.learner.update.ranks import Ranks, pack, unpack
from ratchet_vla.learner.update.step import Updater
from ratchet_vla.policy.noise import derive_seed
from ratchet_vla.policy.protocol import Policy
from ratchet_vla.records import Episode
from ratchet_vla.storage.disk import disk_errors
from ratchet_vla.storage.documents import hash_file
from ratchet_vla.storage.files import Files

log = logging.getLogger("ratchet.learner")
_LOOK = b"look"


class Trainer:
    """Owns the learner's policy, its module carrying `lora`. Between calls it is exactly what the last one left."""

    def __init__(
        self,
        policy: Policy,
        lora: Lora,
        config: ServiceConfig,
        files: Files | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.policy = policy
        self.lora = lora
        self.config = config
        self._ranks = ranks
        self._files = files or Files()
        self._binding = binding_of(policy)
        self._updater: Updater | None = None

    def adapter(self) -> Adapter:
        """The adapter as it is now."""
        return self.lora.adapter(self._binding)

    def initial(self) -> Adapter:
        """The empty adapter that a line begins with (B = 0: it acts as the base), the same at every call."""
        self.lora.reset(derive_seed(self.config.seed, "lora") % 2**31)
        self._updater = None
        return self.adapter()

    def begin(self, adapter: Adapter, stage: int, attempt: int) -> None:
        """Start a task from an adapter, with a fresh optimiser."""
        self.lora.load(adapter.tensors, adapter.config)
        self._updater = self._new(stage, attempt)

    def restore(self, path: Path, sha: str, stage: int, attempt: int) -> None:
        """Go back to a checkpoint: adapter, optimiser, schedule, random numbers.

        Raises:
            RatchetError: learner.bad_checkpoint where the file is gone or not what the journal says.
        """
        if not path.is_file() or hash_file(path) != sha:
            raise RatchetError(
                "learner.bad_checkpoint",
                "the checkpoint is not the one that the journal names",
                where=str(path),
                fix="the update is repeated from the one before",
            )
        self._take(path, stage, attempt)

    def train(self, episodes: Sequence[Episode], groups: Sequence[int]) -> dict[str, Any]:
        """One update. Facts to log; `skipped` among them where nothing was learned and nothing has changed.

        Raises:
            RatchetError: learner.not_finite, after which the caller restores the last checkpoint.
        """
        assert self._updater is not None
        adapter_id = self.adapter().id
        if self._ranks is not None:
            self._ranks.broadcast(_LOOK)
        with self._ranks.whole() if self._ranks is not None else nullcontext():
            batch = to_batch(episodes, groups, self.policy, features=self.config.update.algorithm == "ppo")
            if batch.adapter_id != adapter_id:
                raise RatchetError(
                    "learner.off_policy",
                    f"episodes of {batch.adapter_id[:12]}",
                    where=adapter_id[:12],
                    fix="nothing was changed",
                )
            gap = log_prob_gap(batch, self.policy)
        figures: dict[str, Any] = {
            "log_prob_gap": gap,
            "decisions": len(batch.tokens),
            "compute_dtype": batch.compute_dtype,
        }
        if not gap <= self.config.tolerance:
            reason = f"robot and learner disagree by {gap:.3f} nats per token under one adapter"
            return {**figures, "skipped": reason, "code": "learner.policy_mismatch"}
        if self._ranks is not None:
            self._ranks.broadcast(self._state())
            self._ranks.broadcast(pack(batch))
        try:
            return {**figures, **self._updater.update(batch)}
        except RatchetError as error:
            if error.code != "learner.no_samples":
                raise
            return {**figures, "skipped": error.what, "code": error.code}

    def save(self, path: Path) -> str:
        """Write a checkpoint; it survives a power cut when this returns. Returns its SHA-256."""
        assert self._updater is not None
        scratch = path.with_suffix(".tmp")
        with disk_errors(path):
            self._files.folder(path.parent)
            self._files.step("write", scratch)
            with scratch.open("wb") as file:
                file.write(self._state())
                file.flush()
                self._files.step("fsync", scratch)
                os.fsync(file.fileno())
            sha = hash_file(scratch)
            self._files.rename(scratch, path)
        return sha

    def assist(self) -> None:
        """What the other ranks do while rank 0 runs the service: their share of every update, until `dismiss`."""
        assert self._ranks is not None
        while message := self._ranks.broadcast(b""):
            if message == _LOOK:
                with self._ranks.whole():
                    pass  # rank 0 looks at the episodes with the whole base
                continue
            self._take(message, 0, 0)
            batch = unpack(self._ranks.broadcast(b""))
            assert self._updater is not None
            try:
                self._updater.update(batch)
            except RatchetError as error:
                if error.code not in ("learner.no_samples", "learner.not_finite"):
                    raise  # rank 0 came to the same two refusals; anything else is this rank's own

    def dismiss(self) -> None:
        """Let the assisting ranks end."""
        if self._ranks is None:
            return
        try:
            self._ranks.broadcast(b"")
        except RuntimeError as error:
            log.warning("the other ranks are gone already: %s", str(error).splitlines()[0])

    def _state(self) -> bytes:
        """Everything that the next update depends on."""
        assert self._updater is not None
        buffer = io.BytesIO()
        torch.save({"lora": self.lora.export(), "updater": self._updater.state_dict()}, buffer)
        return buffer.getvalue()

    def _take(self, state: bytes | Path, stage: int, attempt: int) -> None:
        source = io.BytesIO(state) if isinstance(state, bytes) else state
        loaded = torch.load(source, map_location="cpu", weights_only=True)
        self.lora.load(loaded["lora"])
        self._updater = self._new(stage, attempt)
        self._updater.load_state_dict(loaded["updater"])

    def _new(self, stage: int, attempt: int) -> Updater:
        seed_path = ("shuffle", stage) if attempt == 0 else ("shuffle", stage, attempt)
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, *seed_path))
        return Updater(self.policy, self.lora.trainable(), self.config.update, generator, self._ranks)
