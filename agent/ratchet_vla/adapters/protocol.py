"""Protocol of adapter stores: what the runtime, the learner and the gate may ask of any of them.

Knows ids, cards, tags and their history. Knows no file and no network. `agent/ratchet_vla/testing/conformance/store.py`
is the suite that every store must pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ratchet_vla.adapters.identity import Adapter, Binding

__all__ = ["AdapterStore", "Card", "Problem", "Provenance", "TagMove"]

BASE = "base"
"""The base model without an adapter: usable as a reference like an id, and as a tag's target. It has no card."""


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from; kept on its card, no part of its id.

    Attributes:
        parent: id of the adapter that training started from; None for a first one.
        task, stage: the task it was trained on last, and how many tasks it has seen.
        metrics: whatever was measured, by name.
        effect: relative norm of the change to the base, `Lora.effect(...).overall`; None where nobody measured it.
        gate: the latest decision of the gate, plain data; empty where there is none.
    """

    parent: str | None = None
    task: str = ""
    stage: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    effect: float | None = None
    notes: str = ""
    gate: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """Metadata of one adapter, readable without its tensors.

    Attributes:
        statistics, action_space: the content whose hashes went into the id.
        created: UTC, ISO 8601.
        software: version of this package that stored it.
    """

    id: str
    base_hash: str
    statistics: Mapping[str, Any]
    action_space: Mapping[str, Any]
    provenance: Provenance
    created: str
    software: str
    bytes: int

    @property
    def binding(self) -> Binding:
        """What the adapter was made for."""
        return Binding(self.base_hash, self.statistics, self.action_space)


@dataclass(frozen=True)
class TagMove:
    """One line of a tag's history.

    Attributes:
        action: `set` or `rollback`.
        old: None for a new tag.
        time: UTC, ISO 8601.
    """

    sequence: int
    tag: str
    action: str
    old: str | None
    new: str
    reason: str
    time: str


@dataclass(frozen=True)
class Problem:
    """One finding of `verify`: a stable code, the place, and what is wrong. `fatal` False means worth knowing only."""

    code: str
    where: str
    what: str
    fatal: bool = True


@runtime_checkable
class AdapterStore(Protocol):
    """Immutable adapters under their ids, and tags that point at them or at the base.

    Before the first promotion the base is active, and `active` and `previous` stand for it without having been set.
    """

    def put(self, adapter: Adapter, provenance: Provenance | None = None) -> Card:
        """Store an adapter; the same adapter again changes nothing and returns the first card.

        Raises:
            RatchetError: adapter.disk_full, adapter.store_io; the store is unharmed then.
        """
        ...

    def get(self, reference: str) -> Adapter:
        """Read an adapter by tag, id or unique id prefix; its bytes are checked against its id.

        Raises:
            RatchetError: adapter.unknown, adapter.ambiguous, adapter.is_base, adapter.truncated, adapter.missing_file,
                adapter.hash_mismatch, adapter.bad_card.
        """
        ...

    def card(self, reference: str) -> Card: ...

    def annotate(self, reference: str, metrics: Mapping[str, float], *, gate: Mapping[str, Any] | None = None) -> Card:
        """Add measured values, and the gate's latest decision, to an adapter's card; the id does not change."""
        ...

    def ids(self) -> list[str]:
        """Every stored id, sorted."""
        ...

    def resolve(self, reference: str) -> str:
        """The id behind a tag, an id or a unique id prefix of at least four digits; BASE for the base.

        Raises:
            RatchetError: adapter.unknown (names near matches), adapter.ambiguous.
        """
        ...

    def tag(self, name: str, reference: str, reason: str = "") -> TagMove:
        """Point a tag at an adapter or at the base, atomically.

        Raises:
            RatchetError: adapter.bad_tag for a name that is not `[A-Za-z0-9][A-Za-z0-9._-]*`, could be an id, or is
                the base's.
        """
        ...

    def tags(self) -> dict[str, str]:
        """Tag -> id, or BASE; only tags that somebody set."""
        ...

    def promote(self, reference: str, reason: str = "") -> TagMove:
        """Point `active` at an adapter (or the base) and `previous` at what was active."""
        ...

    def rollback(self, name: str = "active", reason: str = "") -> TagMove:
        """Point a tag at what it pointed at before its latest `set` that was not yet rolled back.

        Before its first, `active` stood for the base.

        Raises:
            RatchetError: adapter.no_previous.
        """
        ...

    def history(self, name: str | None = None) -> list[TagMove]:
        """Moves of one tag, or of all, oldest first."""
        ...

    def lineage(self, reference: str) -> list[str]:
        """The adapter's id, its parent's, and so on, as far as stored."""
        ...

    def remove(self, reference: str) -> None:
        """Delete an adapter.

        Raises:
            RatchetError: adapter.in_use while a tag points at it.
        """
        ...

    def verify(self) -> list[Problem]:
        """Read and re-hash everything; empty when all is well."""
        ...
