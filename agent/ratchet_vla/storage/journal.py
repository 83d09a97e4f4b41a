"""Write-ahead journal: one JSON line per event, each bound to all before it by a hash chain.

Knows lines, hashes and what a crash can leave behind. Knows no event's meaning; whoever folds the events does.
A torn last line never happened; damage anywhere else is refused, because what follows it cannot be trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.canonical import canonical_json
from ratchet_vla.storage.disk import disk_errors, hold
from ratchet_vla.storage.files import Files

START = "0" * 64


@dataclass(frozen=True)
class Event:
    """One line. n counts from 1; time: seconds since 1970, for people to read; nothing is decided by it."""

    n: int
    kind: str
    data: dict[str, Any]
    time: float
    hash: str


class Journal:
    """An append-only file of events; every method is safe from any thread of one process.

    Raises:
        RatchetError: link.journal_damaged, link.journal_busy where another process holds it, link.disk_full, link.io.
    """

    def __init__(self, path: Path, files: Files | None = None, *, readonly: bool = False) -> None:
        self.path = path
        self._files = files or Files()
        # Guards events and _size: one append at a time, so that lines and hashes stay in order.
        self._lock = threading.Lock()
        self._handle: int | None = None
        if not readonly:
            with disk_errors(path):
                self._files.folder(path.parent)
                self._handle = hold(path.with_suffix(".lock"))
        try:
            self.events, intact_bytes = _parse(path)
            if not readonly and path.exists() and path.stat().st_size > intact_bytes:
                with disk_errors(path):
                    self._files.truncate(path, intact_bytes)
        except BaseException:
            self.close()
            raise
        self._size = intact_bytes

    @property
    def head(self) -> str:
        """Hash of the last event: two journals with one head hold the same history."""
        return self.events[-1].hash if self.events else START

    def append(self, kind: str, **data: Any) -> Event:
        """Write an event; it is on the disk when this returns. On an error nothing was written."""
        with self._lock:
            event = _event(len(self.events) + 1, kind, data, time.time(), self.head)
            line = _line(event)
            try:
                with disk_errors(self.path):
                    self._files.append(self.path, line)
            except RatchetError:
                if self.path.exists():
                    os.truncate(self.path, self._size)  # a torn line in the middle would count as damage
                raise
            if not self.events:
                with disk_errors(self.path):
                    self._files.sync_folder(self.path.parent)
            self._size += len(line)
            self.events.append(event)
            return event

    def of(self, *kinds: str) -> Iterator[Event]:
        """Events of these kinds, oldest first."""
        return (event for event in list(self.events) if event.kind in kinds)

    def close(self) -> None:
        """Let another process open it; safe to call more than once."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def read(path: Path) -> list[Event]:
    """All events of a journal that another process may be writing. Raises RatchetError link.journal_damaged."""
    return _parse(path)[0]


def _event(number: int, kind: str, data: dict[str, Any], time_s: float, previous: str) -> Event:
    # Only what shapes the state is bound; the time of day may jump without making two histories differ.
    canonical_text = canonical_json({"n": number, "kind": kind, "data": data, "previous": previous})
    return Event(
        number, kind, json.loads(canonical_json(data)), time_s, hashlib.sha256(canonical_text.encode()).hexdigest()
    )


def _line(event: Event) -> bytes:
    event_fields = {
        "n": event.n,
        "kind": event.kind,
        "data": event.data,
        "time": round(event.time, 3),
        "hash": event.hash,
    }
    return (json.dumps(event_fields, separators=(",", ":")) + "\n").encode()


def _parse(path: Path) -> tuple[list[Event], int]:
    journal_bytes = path.read_bytes() if path.is_file() else b""
    events: list[Event] = []
    intact_bytes = 0
    previous_hash = START
    lines = journal_bytes.splitlines(keepends=True)
    for number, event_line in enumerate(lines, 1):
        try:
            event_fields = json.loads(event_line)
            event = _event(
                number, event_fields["kind"], event_fields["data"], float(event_fields["time"]), previous_hash
            )
            intact = event_line.endswith(b"\n") and event_fields["n"] == number and event_fields["hash"] == event.hash
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            if number == len(lines):
                break  # the append that a crash cut off
            raise RatchetError(
                "link.journal_damaged",
                f"line {number} of {len(lines)} does not continue the chain",
                where=str(path),
                fix="restore the file from a copy; nothing after this line can be trusted",
            )
        events.append(event)
        intact_bytes = intact_bytes + len(event_line)
        previous_hash = event.hash
    return events, intact_bytes
