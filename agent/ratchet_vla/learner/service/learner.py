"""The learner as a service: takes episodes in, updates, asks the gate, promotes, and requests the next rollouts.

Knows the sequence of steps; each is written to the journal before or after it happens, so that a kill between any two
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
from ratchet_vla.learner.gate.decision import GateDecision
from ratchet_vla.learner.rollouts.specs import Task
from ratchet_vla.learner.service.config import ServiceConfig
from ratchet_vla.learner.service.events import (
    ActiveTagMoved,
    AdapterPromoted,
    BatchFixed,
    CandidateDeclined,
    CandidateHeld,
    GateDecided,
    LearnerEvent,
    QueueFinished,
    RolloutsRequested,
    RunStarted,
    TaskFinished,
)
from ratchet_vla.learner.service.ingest import decide_admission, ingest_record
from ratchet_vla.learner.service.state import LearnerState, PendingFile
from ratchet_vla.learner.service.trainer import Trainer
from ratchet_vla.learner.service.update_runner import UpdateRunner
from ratchet_vla.link.session_records import EPISODE
from ratchet_vla.records import Episode
from ratchet_vla.storage.files import Files
from ratchet_vla.storage.journal import Journal

Gate = Callable[[str, str, tuple[str, ...]], GateDecision]


class LearnerService:
    """One line of learning in one folder.

    Args:
        path_of: where the inbox keeps the file with this hash.
        read: reads an episode's file.
        gate: given (candidate, active or "", held-out tasks), the decision; it also keeps it on the card.
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
        for task_name in (*config.tasks, *config.held_out):
            if task_name not in tasks:
                raise RatchetError(
                    "learn.unknown_task", f"no task '{task_name}'", fix=f"tasks: {', '.join(sorted(tasks))}"
                )
        self.folder = folder
        self.config = config
        self.trainer = trainer
        self.store = store
        self._journal = journal
        self._path_of = path_of
        self._read = read
        self._gate = gate
        self._tasks = tasks
        self._files = files or Files()
        self.state = LearnerState()
        self._folded = 0
        self._update_runner = UpdateRunner(folder, config, trainer, store, path_of, read, self._files)
        self._fold()
        if not self.state.fingerprint:
            self._write(RunStarted(self._fingerprint(), trainer.policy.base_hash, self._plain()))
        elif self.state.fingerprint != self._fingerprint():
            raise RatchetError(
                "learn.changed_run",
                "this folder holds a run with another configuration or base model",
                where=str(folder),
                fix="use a new folder, or the same options as before",
            )
        active = self._active()
        if not self.state.adapters and active:
            self._write(ActiveTagMoved(active, by="the store at the start"))

    # -- what robots are told ------------------------------------------------------------------------------------

    def published_state(self) -> dict[str, Any]:
        """The state to publish: small plain data."""
        state = self.state
        config = self.config
        tags = {name: self.store.tags().get(name, "") for name in ("active", "previous")}
        # A candidate that nobody has decided about goes to the robots too: a person may have to try it.
        undecided = {"gating": state.training, "deciding": state.candidate, "waiting": state.candidate}
        tags["candidate"] = undecided.get(state.phase, "")
        request: dict[str, Any] | None = None
        if state.order and state.phase == "collecting":
            task = self._tasks[state.task]
            request = {
                "id": state.order,
                "task": state.task,
                "instruction": task.instruction,
                "adapter": state.training,
                "temperature": config.temperature,
                "noise_correlation": config.noise_correlation,
                "stage": state.stage,
                "update": state.update + state.attempt * config.updates,
                "groups": config.groups if config.slots else config.batch,
                "group_size": config.group_size if config.slots else 1,
                "horizon": config.horizon or task.horizon,
                "seed": config.seed,
                "slots": config.slots,
                "have": len(state.accepted()),
            }
        needed_adapters = [tags["previous"], tags["active"], tags["candidate"], state.training if request else ""]
        return {
            "run": state.fingerprint[:12],
            "mode": config.mode,
            "phase": state.phase,
            "base": self.trainer.policy.base_hash,
            "tags": tags,
            "adapters": [adapter_id for adapter_id in dict.fromkeys(needed_adapters) if adapter_id not in ("", BASE)],
            "order": request,
        }

    # -- steps ---------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do the next thing, if there is one. False: nothing to do until something arrives.

        Raises:
            RatchetError: link.disk_full, adapter.disk_full and other refusals; the same step is tried again next time.
        """
        self._fold()
        state = self.state
        if state.unruled:
            self._ingest(state.unruled[0])
        elif self._moved():
            pass
        elif state.phase == "new":
            self._request_rollouts(stage=0, update=0, attempt=0, fresh=True)
        elif state.phase == "collecting":
            return self._complete()
        elif state.phase == "updating":
            self._write(self._update_runner.update(state))
            self._update_runner.prune(state)
        elif state.phase == "gating":
            self._run_gate()
        elif state.phase == "deciding":
            self._decide()
        elif state.phase == "waiting":
            return self._person()
        else:
            return False
        return True

    def _ingest(self, file: PendingFile) -> None:
        """Decide on the admission of an episode, or take in another file."""
        arrival = self.state.arrivals.get(file.sha) if file.type == EPISODE else None
        if arrival is not None and not arrival.used:
            task = self._tasks.get(self.state.task)
            instruction = task.instruction if task is not None else ""
            path = self._path_of(file.sha)
            self._write(decide_admission(arrival, path, self.state, self.config, instruction, self._read))
        else:
            self._write(ingest_record(file, self._path_of(file.sha)))

    def _request_rollouts(self, *, stage: int, update: int, attempt: int, fresh: bool) -> None:
        """Request the next rollouts. fresh: from the task's start adapter with a new optimiser."""
        state = self.state
        if stage >= len(self.config.tasks):
            self._write(QueueFinished(state.active))
            return
        start = state.start
        adapter = state.training
        checkpoint: dict[str, str] | None = None
        if fresh:
            start = start or self._update_runner.empty_adapter()
            adapter = start
            checkpoint = {}
        self._write(
            RolloutsRequested(
                order=f"{state.fingerprint[:12]}/{stage + 1}/{attempt + 1}/{update + 1}/{state.serial + 1}",
                serial=state.serial + 1,
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
        state = self.state
        config = self.config
        accepted = state.accepted()
        if config.mode == "simulation":
            ready = len(accepted) == config.slots
        elif config.batch_when == "full":
            ready = len(accepted) >= config.batch
            accepted = accepted[: config.batch]
        else:
            ready = state.session_ended and len(accepted) >= config.batch
        if ready:
            self._write(BatchFixed(state.order, [arrival.sha for arrival in accepted]))
        return ready

    def _run_gate(self) -> None:
        """Ask the gate. It keeps its own measurements, so one that was cut off goes on."""
        state = self.state
        candidate = state.training
        self.store.tag("candidate", candidate, reason=f"after {state.task}")
        self._files.step("phase", self.folder / "gate")
        gate_decision = self._gate(candidate, state.active, self.config.held_out)
        self._files.step("phase", self.folder / "gated")
        self._write(
            GateDecided(
                candidate=candidate,
                active=state.active,
                task=state.task,
                decision=gate_decision.decision,
                reasons=[
                    {"code": reason.code, "task": reason.task, "text": reason.text} for reason in gate_decision.reasons
                ],
                rows=json.loads(json.dumps(gate_decision.rows())),
            )
        )

    def _decide(self) -> None:
        """What follows from the gate's decision, or from there being none."""
        state = self.state
        config = self.config
        decision = state.verdict
        over = state.update >= config.updates
        again = {"stage": state.stage, "attempt": state.attempt}
        if decision == "promote" and not state.promoted:
            if self.store.tags().get("active") != state.candidate:
                self.store.promote(state.candidate, f"passed the gate after {state.task}")
            self._files.step("phase", self.folder / "promoted")
            self._write(AdapterPromoted(state.candidate, by="the gate"))
        elif decision == "promote":
            if over or config.gate_each == "task":
                self._write(TaskFinished(state.task, state.stage, True, state.active))
            else:
                self._request_rollouts(**again, update=state.update, fresh=False)
        elif decision == "hold" and config.on_hold == "wait" and not state.waited:
            self._write(CandidateHeld(state.candidate))
        elif decision in ("hold", "reject"):
            if config.gate_each == "update" and not over:
                self._request_rollouts(**again, update=state.update, fresh=True)
            elif config.gate_each == "task" and state.attempt + 1 < config.attempts:
                self._request_rollouts(
                    stage=state.stage, attempt=state.attempt + 1, update=0, fresh=decision == "reject"
                )
            else:
                self._write(TaskFinished(state.task, state.stage, False, state.active))
        elif decision in ("finished", "moved"):
            self._request_rollouts(**again, update=0, fresh=True)
        elif over:
            # Every update was skipped: nothing was learned that could be measured.
            self._write(TaskFinished(state.task, state.stage, False, state.active))
        else:
            self._request_rollouts(**again, update=state.update, fresh=False)

    def _moved(self) -> bool:
        """Whether a person moved `active` in the store; then the current task begins again from there."""
        active = self._active()
        state = self.state
        deciding = state.verdict == "promote" and not state.promoted
        if active == state.active or (deciding and active == state.candidate):
            return False
        if state.phase == "waiting" and active == state.candidate:
            return False  # `_person` takes it as the promotion that was waited for
        self._write(ActiveTagMoved(active, by="a person"))
        return True

    def _person(self) -> bool:
        """A held candidate waits for a person: promoted with a reason, or tagged `declined`."""
        tags = self.store.tags()
        candidate = self.state.candidate
        if tags.get("active") == candidate:
            self._write(AdapterPromoted(candidate, by="a person"))
        elif tags.get("declined") == candidate:
            self._write(CandidateDeclined(candidate))
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
            self.state.apply(events[self._folded])
            self._folded += 1

    def _write(self, event: LearnerEvent) -> None:
        self._journal.append(event.kind, **event.data())
        self._fold()

    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self.config)))
        return plain

    def _fingerprint(self) -> str:
        identity = {"config": self._plain(), "base": self.trainer.policy.base_hash}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
