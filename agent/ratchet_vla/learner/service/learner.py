"""The learner as a service: takes episodes in, updates, asks the gate, promotes, and says what it wants next.

Knows the order of steps; each is written to the journal before or after it happens, so that a kill between any two
changes nothing but time. Knows no simulator, no robot and no socket: reading episodes, the gate and telling robots are
arguments. `step` does one thing; whoever runs the service calls it until it returns False.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.gate.decision import Verdict
from ratchet_vla.learner.rollouts.specs import Task
from ratchet_vla.learner.service.config import ServiceConfig
from ratchet_vla.learner.service.events import (
    BatchFixed,
    Declined,
    Done,
    Finished,
    Gated,
    Happening,
    Moved,
    Ordered,
    Promoted,
    RunBegan,
    Waits,
)
from ratchet_vla.learner.service.ingest import note_of, ruling_on
from ratchet_vla.learner.service.state import Ledger, Unruled
from ratchet_vla.learner.service.trainer import Trainer
from ratchet_vla.learner.service.update_runner import Workshop
from ratchet_vla.link.session_records import EPISODE
from ratchet_vla.records import Episode
from ratchet_vla.storage.files import Files
from ratchet_vla.storage.journal import Journal

Gate = Callable[[str, str, tuple[str, ...]], Verdict]


class LearnerService:
    """One line of learning in one folder.

    Args:
        path_of: where the inbox keeps the file with this hash.
        read: reads an episode's file.
        gate: given (candidate, active or "", held-out tasks), the verdict; it also keeps it on the card.
        tasks: by name, at least those of the configuration.
    """

    def __init__(
        self,
        folder: Path,
        config: ServiceConfig,
        trainer: Trainer,
        store: FolderStore,
        journal: Journal,
        path_of: Callable[[str], Path],
        read: Callable[[Path], Episode],
        gate: Gate,
        tasks: Mapping[str, Task],
        *,
        files: Files | None = None,
    ) -> None:
        for name in (*config.tasks, *config.held_out):
            if name not in tasks:
                raise RatchetError("learn.unknown_task", f"no task '{name}'", fix=f"tasks: {', '.join(sorted(tasks))}")
        self.folder, self.config, self.trainer, self.store = folder, config, trainer, store
        self._journal, self._path_of, self._read, self._gate, self._tasks = journal, path_of, read, gate, tasks
        self._files = files or Files()
        self.ledger = Ledger()
        self._folded = 0
        self._workshop = Workshop(folder, config, trainer, store, path_of, read, self._files)
        self._fold()
        if not self.ledger.fingerprint:
            self._write(RunBegan(self._fingerprint(), trainer.policy.base_hash, self._plain()))
        elif self.ledger.fingerprint != self._fingerprint():
            raise RatchetError(
                "learn.changed_run",
                "this folder holds a run with another configuration or base model",
                where=str(folder),
                fix="use a new folder, or the same options as before",
            )
        active = self._active()
        if not self.ledger.adapters and active:
            self._write(Moved(active, by="the store at the start"))

    # -- what robots are told ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The state to publish: small plain data."""
        ledger, config = self.ledger, self.config
        tags = {name: self.store.tags().get(name, "") for name in ("active", "previous")}
        # A candidate that nobody has decided about goes to the robots too: a person may have to try it.
        judged = {"gating": ledger.training, "deciding": ledger.candidate, "waiting": ledger.candidate}
        tags["candidate"] = judged.get(ledger.phase, "")
        order: dict[str, Any] | None = None
        if ledger.order and ledger.phase == "collecting":
            task = self._tasks[ledger.task]
            order = {
                "id": ledger.order,
                "task": ledger.task,
                "instruction": task.instruction,
                "adapter": ledger.training,
                "temperature": config.temperature,
                "noise_correlation": config.noise_correlation,
                "stage": ledger.stage,
                "update": ledger.update + ledger.attempt * config.updates,
                "groups": config.groups if config.slots else config.batch,
                "group_size": config.group_size if config.slots else 1,
                "horizon": config.horizon or task.horizon,
                "seed": config.seed,
                "slots": config.slots,
                "have": len(ledger.accepted()),
            }
        wanted = [tags["previous"], tags["active"], tags["candidate"], ledger.training if order else ""]
        return {
            "run": ledger.fingerprint[:12],
            "mode": config.mode,
            "phase": ledger.phase,
            "base": self.trainer.policy.base_hash,
            "tags": tags,
            "adapters": [a for a in dict.fromkeys(wanted) if a not in ("", BASE)],
            "order": order,
        }

    # -- steps ---------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do the next thing, if there is one. False: nothing to do until something arrives.

        Raises:
            RatchetError: link.disk_full, adapter.disk_full and other refusals; the same step is tried again next time.
        """
        self._fold()
        ledger = self.ledger
        if ledger.unruled:
            self._look(ledger.unruled[0])
        elif self._moved():
            pass
        elif ledger.phase == "new":
            self._order(stage=0, update=0, attempt=0, fresh=True)
        elif ledger.phase == "collecting":
            return self._complete()
        elif ledger.phase == "updating":
            self._write(self._workshop.update(ledger))
            self._workshop.prune(ledger)
        elif ledger.phase == "gating":
            self._ask()
        elif ledger.phase == "deciding":
            self._decide()
        elif ledger.phase == "waiting":
            return self._person()
        else:
            return False
        return True

    def _look(self, file: Unruled) -> None:
        """Rule on an episode, or take in another file."""
        arrival = self.ledger.arrivals.get(file.sha) if file.type == EPISODE else None
        if arrival is not None and not arrival.used:
            task = self._tasks.get(self.ledger.task)
            instruction = task.instruction if task is not None else ""
            path = self._path_of(file.sha)
            self._write(ruling_on(arrival, path, self.ledger, self.config, instruction, self._read))
        else:
            self._write(note_of(file, self._path_of(file.sha)))

    def _order(self, *, stage: int, update: int, attempt: int, fresh: bool) -> None:
        """Say what is collected next. fresh: from the task's start adapter with a new optimiser."""
        ledger = self.ledger
        if stage >= len(self.config.tasks):
            self._write(Done(ledger.active))
            return
        start, adapter = ledger.start, ledger.training
        checkpoint: dict[str, str] | None = None
        if fresh:
            start = start or self._workshop.empty_adapter()
            adapter, checkpoint = start, {}
        self._write(
            Ordered(
                order=f"{ledger.fingerprint[:12]}/{stage + 1}/{attempt + 1}/{update + 1}/{ledger.serial + 1}",
                serial=ledger.serial + 1,
                stage=stage,
                update=update,
                attempt=attempt,
                task=self.config.tasks[stage],
                adapter=adapter,
                start=start,
                checkpoint=checkpoint,
            )
        )

    def _complete(self) -> bool:
        """Fix the batch once it is complete, before anything is computed from it."""
        ledger, config = self.ledger, self.config
        accepted = ledger.accepted()
        if config.mode == "simulation":
            ready = len(accepted) == config.slots
        elif config.batch_when == "full":
            ready = len(accepted) >= config.batch
            accepted = accepted[: config.batch]
        else:
            ready = ledger.session_ended and len(accepted) >= config.batch
        if ready:
            self._write(BatchFixed(ledger.order, [a.sha for a in accepted]))
        return ready

    def _ask(self) -> None:
        """The gate. It keeps its own measurements, so one that was cut off goes on."""
        ledger = self.ledger
        candidate = ledger.training
        self.store.tag("candidate", candidate, reason=f"after {ledger.task}")
        self._files.step("phase", self.folder / "gate")
        verdict = self._gate(candidate, ledger.active, self.config.held_out)
        self._files.step("phase", self.folder / "gated")
        self._write(
            Gated(
                candidate=candidate,
                active=ledger.active,
                task=ledger.task,
                decision=verdict.decision,
                reasons=[{"code": r.code, "task": r.task, "text": r.text} for r in verdict.reasons],
                rows=json.loads(json.dumps(verdict.rows())),
            )
        )

    def _decide(self) -> None:
        """What follows from the gate's verdict, or from there being none."""
        ledger, config = self.ledger, self.config
        verdict, over = ledger.verdict, ledger.update >= config.updates
        again = {"stage": ledger.stage, "attempt": ledger.attempt}
        if verdict == "promote" and not ledger.promoted:
            if self.store.tags().get("active") != ledger.candidate:
                self.store.promote(ledger.candidate, f"passed the gate after {ledger.task}")
            self._files.step("phase", self.folder / "promoted")
            self._write(Promoted(ledger.candidate, by="the gate"))
        elif verdict == "promote":
            if over or config.gate_each == "task":
                self._write(Finished(ledger.task, ledger.stage, True, ledger.active))
            else:
                self._order(**again, update=ledger.update, fresh=False)
        elif verdict == "hold" and config.on_hold == "wait" and not ledger.waited:
            self._write(Waits(ledger.candidate))
        elif verdict in ("hold", "reject"):
            if config.gate_each == "update" and not over:
                self._order(**again, update=ledger.update, fresh=True)
            elif config.gate_each == "task" and ledger.attempt + 1 < config.attempts:
                self._order(stage=ledger.stage, attempt=ledger.attempt + 1, update=0, fresh=verdict == "reject")
            else:
                self._write(Finished(ledger.task, ledger.stage, False, ledger.active))
        elif verdict in ("finished", "moved"):
            self._order(**again, update=0, fresh=True)
        elif over:
            # Every update was skipped: nothing was learned that could be measured.
            self._write(Finished(ledger.task, ledger.stage, False, ledger.active))
        else:
            self._order(**again, update=ledger.update, fresh=False)

    def _moved(self) -> bool:
        """Whether a person moved `active` in the store; then the current task begins again from there."""
        active, ledger = self._active(), self.ledger
        deciding = ledger.verdict == "promote" and not ledger.promoted
        if active == ledger.active or (deciding and active == ledger.candidate):
            return False
        if ledger.phase == "waiting" and active == ledger.candidate:
            return False  # `_person` takes it as the promotion that was waited for
        self._write(Moved(active, by="a person"))
        return True

    def _person(self) -> bool:
        """A held candidate waits for a person: promoted with a reason, or tagged `declined`."""
        tags, candidate = self.store.tags(), self.ledger.candidate
        if tags.get("active") == candidate:
            self._write(Promoted(candidate, by="a person"))
        elif tags.get("declined") == candidate:
            self._write(Declined(candidate))
        else:
            return False
        return True

    # -- inside --------------------------------------------------------------------------------------------------

    def _active(self) -> str:
        """The id of the active adapter, "" for the base. Raises RatchetError adapter.unknown for a damaged tag."""
        active = self.store.resolve("active")
        return "" if active == BASE else active

    def _fold(self) -> None:
        """Take in events that another thread wrote (`received`)."""
        events = self._journal.events
        while self._folded < len(events):
            self.ledger.apply(events[self._folded])
            self._folded += 1

    def _write(self, happening: Happening) -> None:
        self._journal.append(happening.kind, **happening.data())
        self._fold()

    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self.config)))
        return plain

    def _fingerprint(self) -> str:
        facts = {"config": self._plain(), "base": self.trainer.policy.base_hash}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
