"""Where the learner stands, folded from its journal: the same events always give the same state, whatever died between.

Knows events and phases. Knows no file, no tensor and no network. See docs/link.md for the order of events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from agent.link.journal import Event

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
    unruled: list[str] = field(default_factory=list)
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
        handler = getattr(self, f"_{event.kind}", None)
        if handler is not None:
            handler(event.data, event.n)

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

    def _run(self, data: dict[str, Any], n: int) -> None:
        self.fingerprint, self.config = data["fingerprint"], data.get("config") or {}

    def _received(self, data: dict[str, Any], n: int) -> None:
        if data["type"] == "episode":
            if data["sha"] in self.arrivals:
                return  # the same bytes under another key are the same episode
            self.arrivals[data["sha"]] = Arrival(data["sha"], data["robot"], data["key"], data["meta"], n)
        self.unruled.append(f"{data['type']} {data['sha']}")

    def _ruled(self, data: dict[str, Any], n: int) -> None:
        arrival = self.arrivals[data["sha"]]
        for name in ("decision", "code", "reason", "slot", "adapter", "success", "source"):
            setattr(arrival, name, data[name])
        arrival.compute_dtype = data.get("compute_dtype", "")  # journals before it was recorded lack it
        if f"episode {arrival.sha}" in self.unruled:
            self.unruled.remove(f"episode {arrival.sha}")
        if arrival.decision == "accepted" and arrival.slot >= 0:
            self.filled[arrival.slot] = arrival.sha

    def _noted(self, data: dict[str, Any], n: int) -> None:
        """A file that is no episode was looked at: a label, the end of a session, or something unreadable."""
        self.unruled.remove(f"{data['type']} {data['sha']}")
        if data["type"] == "session" and data.get("ended"):
            self.session_ended = True
        label = data.get("label")
        if label:
            self.labels[label["episode"]] = (label["success"], label["source"])
            if label["episode"] in self.arrivals and not self.arrivals[label["episode"]].used:
                self.unruled.append(f"episode {label['episode']}")

    def _ordered(self, data: dict[str, Any], n: int) -> None:
        self.phase, self.order, self.task = "collecting", data["order"], data["task"]
        self.stage, self.update, self.attempt = data["stage"], data["update"], data["attempt"]
        self.training, self.start, self.serial = data["adapter"], data["start"], data["serial"]
        if data.get("checkpoint") is not None:
            self.checkpoint = data["checkpoint"]
        self.filled, self.session_ended = {}, False
        self.verdict, self.promoted, self.waited = "", False, False
        if self.training not in self.adapters:
            self.adapters.append(self.training)
        for arrival in self.arrivals.values():
            stale = arrival.decision in ("accepted", "waiting") and not arrival.used
            if stale and (arrival.adapter != self.training or arrival.slot >= 0):
                arrival.decision, arrival.code = "replay", "inbox.other_adapter"
                arrival.reason = "the adapter moved on before it was used"

    def _batch(self, data: dict[str, Any], n: int) -> None:
        self.phase, self.batch = "updating", list(data["episodes"])

    def _updated(self, data: dict[str, Any], n: int) -> None:
        for sha in data["episodes"]:
            self.arrivals[sha].used = True
        self.retired.append(list(data["episodes"]))
        self.batch, self.update = [], self.update + 1
        self.training, self.checkpoint = data["adapter"], data["checkpoint"]
        if self.training not in self.adapters:
            self.adapters.append(self.training)
        self.updates.append({**data, "n": n})
        self.phase = "gating" if data["gate"] else "deciding"

    def _gated(self, data: dict[str, Any], n: int) -> None:
        self.candidate, self.verdict, self.phase = data["candidate"], data["decision"], "deciding"
        self.gates.append({**data, "n": n})

    def _promoted(self, data: dict[str, Any], n: int) -> None:
        self.active = self.start = data["adapter"]
        self.verdict, self.promoted, self.phase = "promote", True, "deciding"

    def _waits(self, data: dict[str, Any], n: int) -> None:
        self.waited, self.phase = True, "waiting"

    def _declined(self, data: dict[str, Any], n: int) -> None:
        """A person decided against a candidate that the gate held."""
        self.verdict, self.phase = "reject", "deciding"

    def _moved(self, data: dict[str, Any], n: int) -> None:
        """A person pointed `active` elsewhere: the current task begins again from there."""
        self.active = self.start = data["adapter"]
        self.update, self.batch, self.verdict = 0, [], "moved"
        self.phase = "done" if self.phase == "done" else "deciding"

    def _finished(self, data: dict[str, Any], n: int) -> None:
        """A task is over, learned or given up."""
        self.stages.append({**data, "n": n})
        self.stage, self.update, self.attempt, self.phase = self.stage + 1, 0, 0, "deciding"
        self.start, self.verdict = self.active, "finished"

    def _done(self, data: dict[str, Any], n: int) -> None:
        self.phase, self.order = "done", ""
