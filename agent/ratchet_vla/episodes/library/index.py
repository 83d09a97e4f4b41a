"""The index: an append-only log of JSON lines, each carrying the hash of the one before, safe among processes.

Knows lines, order, hashes and torn ends. Knows neither episodes nor labels: an entry has a kind and a body.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.disk import locked
from ratchet_vla.storage.documents import sync_folder
from ratchet_vla.storage.growing import disk_refusals

NO_PREVIOUS_HASH = "0" * 64  # what the first entry names as the one before


@dataclass(frozen=True)
class Entry:
    """One line. number: from 0, without gaps. time: UTC. hash: SHA-256 of the line, named by the next one."""

    number: int
    time: str
    kind: str
    body: dict[str, Any]
    previous: str
    hash: str


class Index:
    """One log file. Any number of processes may append; nobody changes or removes an entry unnoticed.

    first: the entry (kind, body) that a new log begins with, written together with what is appended first.
    """

    def __init__(self, path: Path, first: tuple[str, dict[str, Any]] | None = None) -> None:
        self.path = path
        self._first = first
        self._lock_path = path.with_name(f".{path.name}.lock")
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self._read_bytes = 0  # bytes of the file that `_entries` holds
        self._identity = (0, 0)

    def entries(self, since: int = 0) -> list[Entry]:
        """Entries from number `since` on, oldest first, including what other processes have appended meanwhile.

        Raises:
            RatchetError: episode.index_changed where a line is not what its successor says, or is unreadable.
        """
        with self._lock:
            self._read()
            return self._entries[since:]

    def append(self, entries: Iterable[tuple[str, dict[str, Any]]]) -> list[Entry]:
        """Add (kind, body) entries, together; on the disk when this returns.

        Raises:
            RatchetError: episode.index_changed, episode.disk_full, episode.io.
        """
        with disk_refusals(self.path):
            is_new = not self.path.exists()
            descriptor = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
            try:
                with self._lock, locked(self._lock_path):
                    appended = self._append(descriptor, entries)
                # Waiting for the disk needs no lock: whoever appends after this waits for these entries' bytes, too.
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if is_new:
                sync_folder(self.path.parent)
        return appended

    def _append(self, descriptor: int, entries: Iterable[tuple[str, dict[str, Any]]]) -> list[Entry]:
        """With both locks held."""
        self._read()
        self._cut_torn_end()
        appended: list[Entry] = []
        lines = b""
        opening = [self._first] if self._first is not None and not self._entries else []
        for kind, body in [*opening, *entries]:
            last = appended[-1] if appended else self._entries[-1] if self._entries else None
            number = last.number + 1 if last else 0
            entry, line = _make(number, kind, body, last.hash if last else NO_PREVIOUS_HASH)
            appended.append(entry)
            lines += line
        unwritten = memoryview(lines)
        while unwritten:
            unwritten = unwritten[os.write(descriptor, unwritten) :]
        self._read()
        return appended[len(opening) :]

    @property
    def head(self) -> str:
        """Hash of the newest entry: whoever knows it knows that nothing before it was changed."""
        entries = self.entries()
        return entries[-1].hash if entries else NO_PREVIOUS_HASH

    # -- inside -------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Take in what was appended since the last look; from the start where the file is another one."""
        try:
            file_status = self.path.stat()
        except FileNotFoundError:
            self._entries = []
            self._read_bytes = 0
            self._identity = (0, 0)
            return
        identity = (file_status.st_dev, file_status.st_ino)
        if identity != self._identity or file_status.st_size < self._read_bytes:
            self._entries = []
            self._read_bytes = 0
            self._identity = identity
        if file_status.st_size == self._read_bytes:
            return
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            data = file.read()
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return  # torn, or being written by another process
            self._entries.append(self._parse(line))
            self._read_bytes += len(line)

    def _parse(self, line: bytes) -> Entry:
        last = self._entries[-1] if self._entries else None
        try:
            fields = json.loads(line)
            entry = Entry(
                number=fields["n"],
                time=fields["time"],
                kind=fields["kind"],
                body=fields["body"],
                previous=fields["previous"],
                hash=hashlib.sha256(line).hexdigest(),
            )
        except (ValueError, KeyError, TypeError):
            raise self._changed(len(self._entries), "is unreadable") from None
        expected = (last.number + 1, last.hash) if last else (0, NO_PREVIOUS_HASH)
        if (entry.number, entry.previous) != expected:
            raise self._changed(len(self._entries), "does not follow from the one before")
        return entry

    def _cut_torn_end(self) -> None:
        """A line without its end was never acknowledged: its writer died."""
        if self.path.exists() and self.path.stat().st_size > self._read_bytes:
            os.truncate(self.path, self._read_bytes)

    def _changed(self, number: int, problem: str) -> RatchetError:
        return RatchetError(
            "episode.index_changed",
            f"entry {number} {problem}: the log was changed by hand or damaged",
            where=str(self.path),
            fix="restore the file from a backup; episode files themselves are not affected",
        )


def _make(number: int, kind: str, body: dict[str, Any], previous: str) -> tuple[Entry, bytes]:
    time_utc = datetime.now(UTC).isoformat(timespec="milliseconds")
    fields = {"n": number, "time": time_utc, "kind": kind, "body": body, "previous": previous}
    line = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    return Entry(number, time_utc, kind, body, previous, hashlib.sha256(line).hexdigest()), line
