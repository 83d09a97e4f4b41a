"""Where the learner stands, folded from its journal: the same events always give the same state, whatever died between.

Knows events and phases. Knows no file, no tensor and no network. See docs/link.md for the order of events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ratchet_vla.learner.service.events import (
    BatchFixed,
    Declined,
    Done,
    Finished,
    Gated,
    Moved,
    Noted,
    Ordered,
    Promoted,
    Received,
    Ruled,
    RunBegan,
    Updated,
    Waits,
    happening_of,
)
from ratchet_vla.link.session_records import EPISODE, SESSION
from ratchet_vla.storage.journal import Event

Phase = Literal["new", "collecting", "updating", "gating", "deciding", "waiting", "done"]


@dataclass
class Arrival:
    """One received episode and what was decided about it. decision: empty until ruled."""

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
class Unruled:
    """A file that nobody has looked at yet. type: see `link.session_records`."""

    type: str
    sha: str


@dataclass
class Ledger:
    """The fold. stage, update, attempt count from 0; `training` is the adapter being updated, `start` the one that the
    current task began with (promoted, or "" for the empty one)."""

    fingerprint: str = ""
    config: dict[str, Any] = field(default_factory=dict)  # the run's settings, as plain data
    phase: Phase = "new"
    stage: int = 0
    update: int = 0
    attempt: int = 0
    serial: int = 0  # orders given so far
    order: str = ""
    task: str = ""
    training: str = ""
    start: str = ""
    active: str = ""
    candidate: str = ""
    verdict: str = ""  # of the gate about `candidate`, until it was acted on
    promoted: bool = False
    waited: bool = False
    batch: list[str] = field(default_factory=list)
    checkpoint: dict[str, str] = field(default_factory=dict)  # the one that the training adapter came from
    arrivals: dict[str, Arrival] = field(default_factory=dict)
    unruled: list[Unruled] = field(default_factory=list)
    filled: dict[int, str] = field(default_factory=dict)
    labels: dict[str, tuple[bool | None, str]] = field(default_factory=dict)
    session_ended: bool = False
    updates: list[dict[str, Any]] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)  # every training adapter, oldest first
    retired: list[list[str]] = field(default_factory=list)  # batches used, oldest first

    @classmethod
    def of(cls, events: Iterable[Event]) -> Ledger:
        ledger = cls()
        for event in events:
            ledger.apply(event)
        return ledger

    def apply(self, event: Event) -> None:
        """Take one event in. Unknown kinds change nothing: a newer release may have written them."""
        match happening_of(event):
            case RunBegan() as run:
                self.fingerprint = run.fingerprint
                self.config = run.config or {}
            case Received() as received:
                self._received(received, event.n)
            case Ruled() as ruled:
                self._ruled(ruled)
            case Noted() as noted:
                self._noted(noted)
            case Ordered() as ordered:
                self._ordered(ordered)
            case BatchFixed() as batch:
                self.phase = "updating"
                self.batch = list(batch.episodes)
            case Updated() as updated:
                self._updated(updated, {**event.data, "n": event.n})
            case Gated() as gated:
                self.candidate = gated.candidate
                self.verdict = gated.decision
                self.phase = "deciding"
                self.gates.append({**event.data, "n": event.n})
            case Promoted(adapter=adapter):
                self.active = self.start = adapter
                self.verdict = "promote"
                self.promoted = True
                self.phase = "deciding"
            case Waits():
                self.waited = True
                self.phase = "waiting"
            case Declined():
                self.verdict = "reject"
                self.phase = "deciding"
            case Moved(adapter=adapter):
                self._moved(adapter)
            case Finished():
                self._finished({**event.data, "n": event.n})
            case Done():
                self.phase = "done"
                self.order = ""

    # -- what follows from it ------------------------------------------------------------------------------------

    def accepted(self) -> list[Arrival]:
        """Accepted episodes of the current adapter that no update has used, in the order in which updates take them."""
        found = [a for a in self.arrivals.values() if a.decision == "accepted" and not a.used]
        return sorted(found, key=lambda a: (a.slot, a.number))

    def counts(self) -> dict[str, int]:
        """Arrivals by decision, and `used`."""
        out = {"accepted": 0, "waiting": 0, "replay": 0, "unruled": len(self.unruled), "used": 0}
        for arrival in self.arrivals.values():
            if arrival.decision:
                out[arrival.decision] += 1
            out["used"] += arrival.used
        return out

    def reasons(self) -> dict[str, int]:
        """How many episodes were kept out of the updates, by code."""
        out: dict[str, int] = {}
        for arrival in self.arrivals.values():
            if arrival.decision == "replay":
                out[arrival.code] = out.get(arrival.code, 0) + 1
        return out

    # -- events --------------------------------------------------------------------------------------------------

    def _received(self, received: Received, number: int) -> None:
        if received.type == EPISODE:
            if received.sha in self.arrivals:
                return  # the same bytes under another key are the same episode
            self.arrivals[received.sha] = Arrival(received.sha, received.robot, received.key, received.meta, number)
        self.unruled.append(Unruled(received.type, received.sha))

    def _ruled(self, ruled: Ruled) -> None:
        arrival = self.arrivals[ruled.sha]
        arrival.decision = ruled.decision
        arrival.code = ruled.code
        arrival.reason = ruled.reason
        arrival.slot = ruled.slot
        arrival.adapter = ruled.adapter
        arrival.success = ruled.success
        arrival.source = ruled.source
        arrival.compute_dtype = ruled.compute_dtype
        if Unruled(EPISODE, arrival.sha) in self.unruled:
            self.unruled.remove(Unruled(EPISODE, arrival.sha))
        if arrival.decision == "accepted" and arrival.slot >= 0:
            self.filled[arrival.slot] = arrival.sha

    def _noted(self, noted: Noted) -> None:
        self.unruled.remove(Unruled(noted.type, noted.sha))
        if noted.type == SESSION and noted.ended:
            self.session_ended = True
        label = noted.label
        if label:
            self.labels[label["episode"]] = (label["success"], label["source"])
            if label["episode"] in self.arrivals and not self.arrivals[label["episode"]].used:
                self.unruled.append(Unruled(EPISODE, label["episode"]))

    def _ordered(self, ordered: Ordered) -> None:
        self.phase = "collecting"
        self.order = ordered.order
        self.task = ordered.task
        self.stage = ordered.stage
        self.update = ordered.update
        self.attempt = ordered.attempt
        self.training = ordered.adapter
        self.start = ordered.start
        self.serial = ordered.serial
        if ordered.checkpoint is not None:
            self.checkpoint = ordered.checkpoint
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

    def _updated(self, updated: Updated, line: dict[str, Any]) -> None:
        for sha in updated.episodes:
            self.arrivals[sha].used = True
        self.retired.append(list(updated.episodes))
        self.batch = []
        self.update += 1
        self.training = updated.adapter
        self.checkpoint = updated.checkpoint
        self._keep(self.training)
        self.updates.append(line)
        self.phase = "gating" if updated.gate else "deciding"

    def _keep(self, adapter: str) -> None:
        if adapter not in self.adapters:
            self.adapters.append(adapter)

    def _moved(self, adapter: str) -> None:
        """The current task begins again from the adapter that a person made the active one."""
        self.active = self.start = adapter
        self.update = 0
        self.batch = []
        self.verdict = "moved"
        self.phase = "done" if self.phase == "done" else "deciding"

    def _finished(self, line: dict[str, Any]) -> None:
        self.stages.append(line)
        self.stage += 1
        self.update = 0
        self.attempt = 0
        self.phase = "deciding"
        self.start = self.active
        self.verdict = "finished"
