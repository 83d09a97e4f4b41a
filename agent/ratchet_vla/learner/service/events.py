"""Events of the learner, as types: one per kind of line in its journal.

Knows kinds, fields and plain data. Knows no sequence of events: `state` folds them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from ratchet_vla.storage.journal import Event


@dataclass(frozen=True)
class LearnerEvent:
    """One line's content. Fields that are None are left out of the line."""

    kind: ClassVar[str] = ""

    def data(self) -> dict[str, Any]:
        """Plain data for the journal."""
        values = {member.name: getattr(self, member.name) for member in dataclasses.fields(self)}
        return {
            field_name: value
            for field_name, value in values.items()
            if value is not None or field_name in self.nullable()
        }

    @classmethod
    def nullable(cls) -> tuple[str, ...]:
        """Fields whose None is a value."""
        return ()

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """From a line; fields that a newer release added are not looked at."""
        known = {member.name for member in dataclasses.fields(cls)}
        return cls(**{field_name: value for field_name, value in data.items() if field_name in known})


@dataclass(frozen=True)
class RunStarted(LearnerEvent):
    """The first line: what must not change later. config: the run's settings as plain data."""

    kind: ClassVar[str] = "run"
    fingerprint: str
    base: str = ""
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FileReceived(LearnerEvent):
    """A file is on the disk; the inbox writes it. meta: what the robot said of it."""

    kind: ClassVar[str] = "received"
    type: str
    sha: str
    robot: str = ""
    key: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdmissionDecided(LearnerEvent):
    """An episode was admitted, rejected or must wait; see `rollouts.admission.Admission`.

    compute_dtype: "" where nobody recorded it.
    """

    kind: ClassVar[str] = "ruled"
    sha: str
    decision: str
    code: str
    reason: str
    slot: int
    adapter: str
    success: bool | None
    source: str
    compute_dtype: str = ""

    @classmethod
    def nullable(cls) -> tuple[str, ...]:
        """Success is null while nobody has judged it."""
        return ("success",)


@dataclass(frozen=True)
class RecordIngested(LearnerEvent):
    """A file that is no episode was taken in: a label, a session, or something unreadable.

    label: episode, success (true, false or null) and source. ended: whether the session is over.
    """

    kind: ClassVar[str] = "noted"
    type: str
    sha: str
    label: dict[str, Any] | None = None
    session: str | None = None
    ended: bool | None = None
    unreadable: str | None = None


@dataclass(frozen=True)
class RolloutsRequested(LearnerEvent):
    """Rollouts were requested.

    order: the request's id. serial: requests so far. start: the adapter that the task began with. checkpoint: {} for a
    new optimiser, None where the present one goes on.
    """

    kind: ClassVar[str] = "ordered"
    order: str
    serial: int
    stage: int
    update: int
    attempt: int
    task: str
    adapter: str
    start: str
    checkpoint: dict[str, str] | None = None

    @classmethod
    def nullable(cls) -> tuple[str, ...]:
        """Checkpoint is null where the present optimiser goes on."""
        return ("checkpoint",)


@dataclass(frozen=True)
class BatchFixed(LearnerEvent):
    """Which episodes the next update is made of, before anything is computed from them."""

    kind: ClassVar[str] = "batch"
    order: str
    episodes: list[str]


@dataclass(frozen=True)
class UpdateFinished(LearnerEvent):
    """An update is over.

    before, began: adapter and checkpoint that it started from. gate: whether the gate is asked. facts: the update's
    figures, or why it was skipped.
    """

    kind: ClassVar[str] = "updated"
    order: str
    stage: int
    task: str
    update: int
    attempt: int
    episodes: list[str]
    successes: int
    before: str
    began: dict[str, str]
    adapter: str
    checkpoint: dict[str, str]
    gate: bool
    facts: dict[str, Any]


@dataclass(frozen=True)
class GateDecided(LearnerEvent):
    """The gate decided. reasons, rows: as its page shows them."""

    kind: ClassVar[str] = "gated"
    candidate: str
    active: str
    task: str
    decision: str
    reasons: list[dict[str, str]]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class AdapterPromoted(LearnerEvent):
    """The active adapter is another one. by: the gate, or a person."""

    kind: ClassVar[str] = "promoted"
    adapter: str
    by: str = ""


@dataclass(frozen=True)
class CandidateHeld(LearnerEvent):
    """A held candidate waits for a person."""

    kind: ClassVar[str] = "waits"
    candidate: str


@dataclass(frozen=True)
class CandidateDeclined(LearnerEvent):
    """A person decided against a candidate that the gate held."""

    kind: ClassVar[str] = "declined"
    adapter: str


@dataclass(frozen=True)
class ActiveTagMoved(LearnerEvent):
    """A person pointed `active` elsewhere."""

    kind: ClassVar[str] = "moved"
    adapter: str
    by: str = ""


@dataclass(frozen=True)
class TaskFinished(LearnerEvent):
    """A task is over, learned or given up."""

    kind: ClassVar[str] = "finished"
    task: str
    stage: int
    learned: bool
    adapter: str


@dataclass(frozen=True)
class QueueFinished(LearnerEvent):
    """All tasks are over."""

    kind: ClassVar[str] = "done"
    active: str = ""


KINDS: dict[str, type[LearnerEvent]] = {
    event_type.kind: event_type
    for event_type in (
        RunStarted,
        FileReceived,
        AdmissionDecided,
        RecordIngested,
        RolloutsRequested,
        BatchFixed,
        UpdateFinished,
        GateDecided,
        AdapterPromoted,
        CandidateHeld,
        CandidateDeclined,
        ActiveTagMoved,
        TaskFinished,
        QueueFinished,
    )
}


def learner_event(event: Event) -> LearnerEvent | None:
    """A journal's line as its type; None for kinds that this release does not know."""
    kind = KINDS.get(event.kind)
    return None if kind is None else kind.of(event.data)
