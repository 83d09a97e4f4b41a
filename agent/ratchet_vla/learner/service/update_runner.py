"""One update of the service, from the ledger's batch to a checkpoint and an adapter in the store.

Knows trainer, checkpoints, store and what may be removed. Knows no journal: it gives the facts of the line to be
written, and what it left on the disk before that line is simply made again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ratchet_vla.adapters.protocol import Provenance
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.service.config import ServiceConfig
from ratchet_vla.learner.service.events import Updated
from ratchet_vla.learner.service.state import Arrival, Ledger
from ratchet_vla.learner.service.trainer import Trainer
from ratchet_vla.records import Episode
from ratchet_vla.storage.disk import disk_errors
from ratchet_vla.storage.files import Files

log = logging.getLogger("ratchet.learner")


class Workshop:
    """Keeps the trainer where the ledger says it is."""

    def __init__(
        self,
        folder: Path,
        config: ServiceConfig,
        trainer: Trainer,
        store: FolderStore,
        path_of: Callable[[str], Path],
        read: Callable[[Path], Episode],
        files: Files,
    ) -> None:
        self.folder, self.config, self.trainer, self.store = folder, config, trainer, store
        self._path_of, self._read, self._files = path_of, read, files
        self._loaded: tuple[str, str, int, int] | tuple[()] = ()  # which state the trainer holds

    def empty_adapter(self) -> str:
        """The adapter that a line begins with, in the store; its id."""
        first = self.trainer.initial()
        self._loaded = ()
        self.store.put(first, Provenance(effect=0.0, notes="empty: acts as the base"))
        return first.id

    def update(self, ledger: Ledger) -> Updated:
        """Train on the ledger's batch, write checkpoint and adapter; what there is to write down."""
        started = time.perf_counter()
        self._load(ledger)
        arrivals = [ledger.arrivals[sha] for sha in ledger.batch]
        episodes = self._episodes(arrivals)
        self._files.step("phase", self.folder / "update")
        self._loaded = ()  # until the update is written down, what the trainer holds is nobody's
        try:
            facts = self.trainer.train(episodes, self._groups(arrivals, episodes))
        except RatchetError as error:
            if error.code not in ("learner.not_finite", "learner.bad_episode"):
                raise
            facts = {"skipped": error.what, "code": error.code}
        skipped = "skipped" in facts
        self._files.step("phase", self.folder / "updated")
        if skipped:
            self._load(ledger)
        path = self.folder / "checkpoints" / f"{ledger.serial}.pt"
        checkpoint = {"file": path.name, "sha": self.trainer.save(path)}
        adapter = self.trainer.adapter()
        if not skipped:
            effect = self.trainer.lora.effect().overall
            provenance = Provenance(parent=ledger.start, task=ledger.task, stage=ledger.stage + 1, effect=effect)
            self.store.put(adapter, provenance)
            self.store.tag("training", adapter.id, reason=ledger.order)
        last = ledger.update + 1 >= self.config.updates
        changed = adapter.id != ledger.start
        gate = changed and (last or (self.config.gate_each == "update" and not skipped))
        self._loaded = (adapter.id, checkpoint["sha"], ledger.stage, ledger.attempt)
        return Updated(
            order=ledger.order,
            stage=ledger.stage,
            task=ledger.task,
            update=ledger.update,
            attempt=ledger.attempt,
            episodes=list(ledger.batch),
            successes=sum(bool(a.success) for a in arrivals),
            before=ledger.training,
            began=ledger.checkpoint,
            adapter=adapter.id,
            checkpoint=checkpoint,
            gate=gate,
            facts={**_finite(facts), "seconds": time.perf_counter() - started},
        )

    def _episodes(self, arrivals: list[Arrival]) -> list[Episode]:
        """The files of a batch, with the success that was ruled on."""
        episodes = []
        for arrival in arrivals:
            episode = self._read(self._path_of(arrival.sha))
            episode.success, episode.success_source = arrival.success, arrival.source
            episodes.append(episode)
        return episodes

    def _groups(self, arrivals: list[Arrival], episodes: list[Episode]) -> list[int]:
        """Comparison groups: one initial state in simulation; on a robot the whole task, where no state can be
        repeated."""
        if self.config.mode == "simulation":
            return [a.slot // self.config.group_size for a in arrivals]
        repeated = Counter(e.initial_state for e in episodes if e.initial_state >= 0)
        return [e.initial_state if repeated[e.initial_state] > 1 else -1 for e in episodes]

    def _load(self, ledger: Ledger) -> None:
        """Bring the trainer to where the journal says it was."""
        key = (ledger.training, ledger.checkpoint.get("sha", ""), ledger.stage, ledger.attempt)
        if self._loaded == key:
            return
        self._load_from(ledger, ledger.training, ledger.checkpoint)
        if self.trainer.adapter().id != ledger.training:
            raise RatchetError(
                "learner.bad_checkpoint",
                f"it holds {self.trainer.adapter().id[:12]}, the journal says {ledger.training[:12]}",
                where=str(self.folder),
                fix="restore the folder from a copy",
            )
        self._loaded = key

    def _load_from(self, ledger: Ledger, adapter: str, checkpoint: Mapping[str, str]) -> None:
        """The trainer's state behind an adapter. A damaged checkpoint is computed again from the one before and the
        same episodes, which is exact: the journal holds the batch."""
        stage, attempt = ledger.stage, ledger.attempt
        if not checkpoint:
            self.trainer.begin(self.store.get(adapter), stage, attempt)
            return
        try:
            self.trainer.restore(self.folder / "checkpoints" / checkpoint["file"], checkpoint["sha"], stage, attempt)
        except RatchetError as error:
            made = [u for u in ledger.updates if u["checkpoint"] == checkpoint]
            if error.code != "learner.bad_checkpoint" or not made:
                raise
            log.warning("%s", error)
            update = made[-1]
            self._load_from(ledger, update["before"], update["began"])
            if update["adapter"] != update["before"]:
                arrivals = [ledger.arrivals[sha] for sha in update["episodes"]]
                episodes = self._episodes(arrivals)
                self.trainer.train(episodes, self._groups(arrivals, episodes))

    def prune(self, ledger: Ledger) -> None:
        """Remove what nothing can need any more: old checkpoints, intermediate adapters and used batches."""
        config = self.config
        with disk_errors(self.folder):
            for path in (self.folder / "checkpoints").glob("*.pt"):
                if path.stem.isdigit() and int(path.stem) < ledger.serial - 1:
                    self._files.remove(path)
            if config.keep_batches:
                for shas in ledger.retired[: -config.keep_batches]:
                    for sha in shas:
                        self._files.remove(self._path_of(sha))
        kept = {g["candidate"] for g in ledger.gates} | set(self.store.tags().values()) | {ledger.start}
        stored = set(self.store.ids())
        for adapter in ledger.adapters[: -config.keep_updates]:
            if adapter in stored and adapter not in kept and adapter != ledger.adapters[0]:
                self.store.remove(adapter)


def _finite(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as the journal can hold them: a figure that is not finite becomes text."""
    return {k: v if not isinstance(v, float) or v - v == 0 else str(v) for k, v in facts.items()}
