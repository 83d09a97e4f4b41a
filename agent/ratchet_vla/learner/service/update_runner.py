"""Update runner of the service: from a complete batch to a checkpoint and an adapter in the store.

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
from ratchet_vla.learner.service.events import UpdateFinished
from ratchet_vla.learner.service.state import Arrival, LearnerState
from ratchet_vla.learner.service.trainer import Trainer
from ratchet_vla.records import Episode
from ratchet_vla.storage.disk import disk_errors
from ratchet_vla.storage.files import Files

log = logging.getLogger("ratchet.learner")


class UpdateRunner:
    """Keeps the trainer where the learner's state says it is, and runs one update after the other."""

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
        self.folder = folder
        self.config = config
        self.trainer = trainer
        self.store = store
        self._path_of = path_of
        self._read = read
        self._files = files
        self._loaded: tuple[str, str, int, int] | tuple[()] = ()  # which state the trainer holds

    def empty_adapter(self) -> str:
        """The adapter that a line begins with, in the store; its id."""
        first = self.trainer.initial()
        self._loaded = ()
        self.store.put(first, Provenance(effect=0.0, notes="empty: acts as the base"))
        return first.id

    def update(self, state: LearnerState) -> UpdateFinished:
        """Train on the current batch, write checkpoint and adapter; what there is to write down."""
        started = time.perf_counter()
        self._load(state)
        arrivals = [state.arrivals[sha] for sha in state.batch]
        episodes = self._episodes(arrivals)
        self._files.step("phase", self.folder / "update")
        self._loaded = ()  # until the update is written down, what the trainer holds is nobody's
        try:
            figures = self.trainer.train(episodes, self._groups(arrivals, episodes))
        except RatchetError as error:
            if error.code not in ("learner.not_finite", "learner.bad_episode"):
                raise
            figures = {"skipped": error.what, "code": error.code}
        skipped = "skipped" in figures
        self._files.step("phase", self.folder / "updated")
        if skipped:
            self._load(state)
        path = self.folder / "checkpoints" / f"{state.serial}.pt"
        checkpoint = {"file": path.name, "sha": self.trainer.save(path)}
        adapter = self.trainer.adapter()
        if not skipped:
            effect = self.trainer.lora.effect().overall
            provenance = Provenance(parent=state.start, task=state.task, stage=state.stage + 1, effect=effect)
            self.store.put(adapter, provenance)
            self.store.tag("training", adapter.id, reason=state.order)
        last = state.update + 1 >= self.config.updates
        changed = adapter.id != state.start
        gate = changed and (last or (self.config.gate_each == "update" and not skipped))
        self._loaded = (adapter.id, checkpoint["sha"], state.stage, state.attempt)
        return UpdateFinished(
            order=state.order,
            stage=state.stage,
            task=state.task,
            update=state.update,
            attempt=state.attempt,
            episodes=list(state.batch),
            successes=sum(bool(arrival.success) for arrival in arrivals),
            before=state.training,
            began=state.checkpoint,
            adapter=adapter.id,
            checkpoint=checkpoint,
            gate=gate,
            facts={**_finite(figures), "seconds": time.perf_counter() - started},
        )

    def _episodes(self, arrivals: list[Arrival]) -> list[Episode]:
        """The files of a batch, with the success that was decided on."""
        episodes = []
        for arrival in arrivals:
            episode = self._read(self._path_of(arrival.sha))
            episode.success = arrival.success
            episode.success_source = arrival.source
            episodes.append(episode)
        return episodes

    def _groups(self, arrivals: list[Arrival], episodes: list[Episode]) -> list[int]:
        """Comparison groups, one label per episode.

        In simulation the episodes of one initial state; on a robot the whole task, where no state can be repeated.
        """
        if self.config.mode == "simulation":
            return [arrival.slot // self.config.group_size for arrival in arrivals]
        repeated = Counter(episode.initial_state for episode in episodes if episode.initial_state >= 0)
        return [episode.initial_state if repeated[episode.initial_state] > 1 else -1 for episode in episodes]

    def _load(self, state: LearnerState) -> None:
        """Bring the trainer to where the journal says it was."""
        key = (state.training, state.checkpoint.get("sha", ""), state.stage, state.attempt)
        if self._loaded == key:
            return
        self._load_from(state, state.training, state.checkpoint)
        if self.trainer.adapter().id != state.training:
            raise RatchetError(
                "learner.bad_checkpoint",
                f"it holds {self.trainer.adapter().id[:12]}, the journal says {state.training[:12]}",
                where=str(self.folder),
                fix="restore the folder from a copy",
            )
        self._loaded = key

    def _load_from(self, state: LearnerState, adapter: str, checkpoint: Mapping[str, str]) -> None:
        """Bring back the trainer's state behind an adapter.

        A damaged checkpoint is computed again from the one before and the same episodes, which is exact: the journal
        holds the batch.
        """
        stage = state.stage
        attempt = state.attempt
        if not checkpoint:
            self.trainer.begin(self.store.get(adapter), stage, attempt)
            return
        try:
            self.trainer.restore(self.folder / "checkpoints" / checkpoint["file"], checkpoint["sha"], stage, attempt)
        except RatchetError as error:
            matching_updates = [update for update in state.updates if update["checkpoint"] == checkpoint]
            if error.code != "learner.bad_checkpoint" or not matching_updates:
                raise
            log.warning("%s", error)
            update = matching_updates[-1]
            self._load_from(state, update["before"], update["began"])
            if update["adapter"] != update["before"]:
                arrivals = [state.arrivals[sha] for sha in update["episodes"]]
                episodes = self._episodes(arrivals)
                self.trainer.train(episodes, self._groups(arrivals, episodes))

    def prune(self, state: LearnerState) -> None:
        """Remove what nothing can need any more: old checkpoints, intermediate adapters and used batches."""
        config = self.config
        with disk_errors(self.folder):
            for path in (self.folder / "checkpoints").glob("*.pt"):
                if path.stem.isdigit() and int(path.stem) < state.serial - 1:
                    self._files.remove(path)
            if config.keep_batches:
                for shas in state.retired[: -config.keep_batches]:
                    for sha in shas:
                        self._files.remove(self._path_of(sha))
        kept_adapters = (
            {gate_line["candidate"] for gate_line in state.gates} | set(self.store.tags().values()) | {state.start}
        )
        stored_adapters = set(self.store.ids())
        for adapter in state.adapters[: -config.keep_updates]:
            if adapter in stored_adapters and adapter not in kept_adapters and adapter != state.adapters[0]:
                self.store.remove(adapter)


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as the journal can hold them: a figure that is not finite becomes text."""
    return {
        figure_name: value if not isinstance(value, float) or value - value == 0 else str(value)
        for figure_name, value in figures.items()
    }
