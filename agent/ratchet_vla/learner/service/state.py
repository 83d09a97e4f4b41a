"""The learner's state, folded from its journal: the same events always give the same state, whatever died between.

Knows events and phases. Knows no file, no tensor and no network. See docs/link.md for the sequence of events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ratchet_vla.learner.service.events import (
    ActiveTagMoved,
    AdapterPromoted,
    AdmissionDecided,
    BatchFixed,
    CandidateDeclined,
    CandidateHeld,
    FileReceived,
    GateDecided,
    LearnerEvent,
    QueueFinished,
    RecordIngested,
    RolloutsRequested,
    RunStarted,
    TaskFinished,
    UpdateFinished,
    learner_event,
)
from ratchet_vla.link.session_records import EPISODE, SESSION
from ratchet_vla.storage.journal import Event

Phase = Literal["new", "collecting", "updating", "gating", "deciding", "waiting", "done"]


@dataclass
class Arrival:
    """One received episode and what was decided about it. decision: empty until it is taken."""

    sha: str
    robot: str
    key: str
    meta: dict[str, Any]
    number: int  # of the journal's line: order of arrival
    decision: str = ""
    code: str = ""
    reason: str = ""
    slot: int = -1
    adapter: str = ""
    success: bool | None = None
    source: str = ""
    compute_dtype: str = ""
    used: bool = False


@dataclass(frozen=True)
class PendingFile:
    """A received file that is not ingested yet. type: see `link.session_records`."""

    type: str
    sha: str


@dataclass
class LearnerState:
    """The fold of all events so far.

    stage, update, attempt count from 0; `training` is the adapter being updated, `start` the one that the current task
    began with (promoted, or "" for the empty one). `order`, `verdict` and `unruled` are named as in journals and status
    files: the rollout request's id, the gate's decision, and files that are not ingested yet.
    """

    fingerprint: str = ""
    config: dict[str, Any] = field(default_factory=dict)  # the run's settings, as plain data
    phase: Phase = "new"
    stage: int = 0
    update: int = 0
    attempt: int = 0
    serial: int = 0  # rollout requests so far
    order: str = ""
    task: str = ""
    training: str = ""
    start: str = ""
    active: str = ""
    candidate: str = ""
    verdict: str = ""  # of the gate on `candidate`, until it was acted on
    promoted: bool = False
    waited: bool = False
    batch: list[str] = field(default_factory=list)
    checkpoint: dict[str, str] = field(default_factory=dict)  # the one that the training adapter came from
    arrivals: dict[str, Arrival] = field(default_factory=dict)
    unruled: list[PendingFile] = field(default_factory=list)
    filled: dict[int, str] = field(default_factory=dict)
    labels: dict[str, tuple[bool | None, str]] = field(default_factory=dict)
    session_ended: bool = False
    updates: list[dict[str, Any]] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)  # every training adapter, oldest first
    retired: list[list[str]] = field(default_factory=list)  # batches used, oldest first

    @classmethod
    def of(cls, events: Iterable[Event]) -> LearnerState:
        """The state after these events, oldest first."""
        state = cls()
        for event in events:
            state.apply(event)
        return state

    def apply(self, event: Event) -> None:
        """Take one event in. Unknown kinds change nothing: a newer release may have written them."""
        match learner_event(event):
            case RunStarted() as run:
                self.fingerprint = run.fingerprint
                self.config = run.config or {}
            case FileReceived() as received:
                self._file_received(received, event.n)
            case AdmissionDecided() as admission:
                self._admission_decided(admission)
            case RecordIngested() as record:
                self._record_ingested(record)
            case RolloutsRequested() as request:
                self._rollouts_requested(request)
            case BatchFixed() as batch:
                self.phase = "updating"
                self.batch = list(batch.episodes)
            case UpdateFinished() as update:
                self._update_finished(update, {**event.data, "n": event.n})
            case TaskFinished():
                self._task_finished({**event.data, "n": event.n})
            case QueueFinished():
                self.phase = "done"
                self.order = ""
            case decision:
                self._decision_taken(decision, {**event.data, "n": event.n})

    # -- what follows from it ------------------------------------------------------------------------------------

    def accepted(self) -> list[Arrival]:
        """Accepted episodes of the current adapter that no update has used, in the order in which updates take them."""
        accepted_arrivals = [
            arrival for arrival in self.arrivals.values() if arrival.decision == "accepted" and not arrival.used
        ]
        return sorted(accepted_arrivals, key=lambda arrival: (arrival.slot, arrival.number))

    def counts(self) -> dict[str, int]:
        """Arrivals by decision, and `used`."""
        counts = {"accepted": 0, "waiting": 0, "replay": 0, "unruled": len(self.unruled), "used": 0}
        for arrival in self.arrivals.values():
            if arrival.decision:
                counts[arrival.decision] += 1
            counts["used"] += arrival.used
        return counts

    def reasons(self) -> dict[str, int]:
        """How many episodes were kept out of the updates, by code."""
        count_of_code: dict[str, int] = {}
        for arrival in self.arrivals.values():
            if arrival.decision == "replay":
                count_of_code[arrival.code] = count_of_code.get(arrival.code, 0) + 1
        return count_of_code

    # -- events --------------------------------------------------------------------------------------------------

    def _file_received(self, received: FileReceived, number: int) -> None:
        if received.type == EPISODE:
            if received.sha in self.arrivals:
                return  # the same bytes under another key are the same episode
            self.arrivals[received.sha] = Arrival(received.sha, received.robot, received.key, received.meta, number)
        self.unruled.append(PendingFile(received.type, received.sha))

    def _admission_decided(self, admission: AdmissionDecided) -> None:
        arrival = self.arrivals[admission.sha]
        arrival.decision = admission.decision
        arrival.code = admission.code
        arrival.reason = admission.reason
        arrival.slot = admission.slot
        arrival.adapter = admission.adapter
        arrival.success = admission.success
        arrival.source = admission.source
        arrival.compute_dtype = admission.compute_dtype
        if PendingFile(EPISODE, arrival.sha) in self.unruled:
            self.unruled.remove(PendingFile(EPISODE, arrival.sha))
        if arrival.decision == "accepted" and arrival.slot >= 0:
            self.filled[arrival.slot] = arrival.sha

    def _record_ingested(self, record: RecordIngested) -> None:
        self.unruled.remove(PendingFile(record.type, record.sha))
        if record.type == SESSION and record.ended:
            self.session_ended = True
        label = record.label
        if label:
            self.labels[label["episode"]] = (label["success"], label["source"])
            if label["episode"] in self.arrivals and not self.arrivals[label["episode"]].used:
                self.unruled.append(PendingFile(EPISODE, label["episode"]))

    def _rollouts_requested(self, request: RolloutsRequested) -> None:
        self.phase = "collecting"
        self.order = request.order
        self.task = request.task
        self.stage = request.stage
        self.update = request.update
        self.attempt = request.attempt
        self.training = request.adapter
        self.start = request.start
        self.serial = request.serial
        if request.checkpoint is not None:
            self.checkpoint = request.checkpoint
        self.filled = {}
        self.session_ended = False
        self.verdict = ""
        self.promoted = False
        self.waited = False
        self._keep(self.training)
        for arrival in self.arrivals.values():
            stale = arrival.decision in ("accepted", "waiting") and not arrival.used
            if stale and (arrival.adapter != self.training or arrival.slot >= 0):
                arrival.decision = "replay"
                arrival.code = "inbox.other_adapter"
                arrival.reason = "the adapter moved on before it was used"

    def _update_finished(self, update: UpdateFinished, line: dict[str, Any]) -> None:
        for sha in update.episodes:
            self.arrivals[sha].used = True
        self.retired.append(list(update.episodes))
        self.batch = []
        self.update += 1
        self.training = update.adapter
        self.checkpoint = update.checkpoint
        self._keep(self.training)
        self.updates.append(line)
        self.phase = "gating" if update.gate else "deciding"

    def _decision_taken(self, decision: LearnerEvent | None, line: dict[str, Any]) -> None:
        """Take in what the gate or a person decided about a candidate."""
        match decision:
            case GateDecided() as gate:
                self.candidate = gate.candidate
                self.verdict = gate.decision
                self.phase = "deciding"
                self.gates.append(line)
            case AdapterPromoted(adapter=adapter):
                self.active = adapter
                self.start = adapter
                self.verdict = "promote"
                self.promoted = True
                self.phase = "deciding"
            case CandidateHeld():
                self.waited = True
                self.phase = "waiting"
            case CandidateDeclined():
                self.verdict = "reject"
                self.phase = "deciding"
            case ActiveTagMoved(adapter=adapter):
                self._active_tag_moved(adapter)

    def _keep(self, adapter: str) -> None:
        if adapter not in self.adapters:
            self.adapters.append(adapter)

    def _active_tag_moved(self, adapter: str) -> None:
        """The current task begins again from the adapter that a person made the active one."""
        self.active = self.start = adapter
        self.update = 0
        self.batch = []
        self.verdict = "moved"
        self.phase = "done" if self.phase == "done" else "deciding"

    def _task_finished(self, line: dict[str, Any]) -> None:
        self.stages.append(line)
        self.stage += 1
        self.update = 0
        self.attempt = 0
        self.phase = "deciding"
        self.start = self.active
        self.verdict = "finished"
