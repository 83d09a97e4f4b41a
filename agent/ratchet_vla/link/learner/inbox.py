"""Inbox, on the learner: files arrive in pieces, are checked by hash, and count once they are on the disk.

Knows pieces, hashes and the journal. Knows no socket and no meaning of a file.

    partial/<sha>           pieces so far; what is there after a crash is continued, not sent again
    files/<sha>             complete files, never changed
    files/<sha>.json        what the sender said about it
    journal                 event `received` per file: from there on the sender may forget it
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.disk import disk_errors, require_space
from ratchet_vla.storage.documents import hash_file
from ratchet_vla.storage.files import Files
from ratchet_vla.storage.journal import Event, Journal

OPEN = 16  # partial files with an open descriptor at once


@dataclass(frozen=True)
class OfferedFile:
    """A file that a robot offers. key: unique name of what it is; sequence: its position in the outbox."""

    robot: str
    sha: str
    size: int
    type: str
    key: str
    sequence: int
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Partial:
    offered: OfferedFile
    handle: int
    offset: int
    sha: Any  # hashlib's object over the bytes so far


class Inbox:
    """Used by one thread, the server's, but for `settle`; `path` and `knows` from any.

    Args:
        journal: where `received` is written; its history says what was received before.
        on_received: called with each new event, after it is on the disk.
    """

    def __init__(
        self,
        root: Path,
        journal: Journal,
        *,
        reserve: int = 1024**3,
        files: Files | None = None,
        on_received: Callable[[Event], None] = lambda received_event: None,
    ) -> None:
        self.root = root
        self._journal = journal
        self.reserve = reserve
        self._disk = files or Files()
        self.on_received = on_received
        self._partial_folder = root / "partial"
        self._files = root / "files"
        with disk_errors(root):
            self._disk.folder(self._partial_folder)
            self._disk.folder(self._files)
        # Most recently used last: when too many are open, the file that has been idle longest is closed.
        self._open: OrderedDict[str, _Partial] = OrderedDict()
        # Complete and checked, being synced by the settling thread; the server's thread only adds here, settle
        # removes.
        self._sealed: dict[str, _Partial] = {}
        self._known: dict[str, str] = {}  # "robot key" -> sha
        for received_event in journal.of("received"):
            self._known[f"{received_event.data['robot']} {received_event.data['key']}"] = received_event.data["sha"]
        self._recover()

    def path(self, sha: str) -> Path:
        return self._files / sha

    def knows(self, robot: str, key: str) -> bool:
        return f"{robot} {key}" in self._known

    def offer(self, offered: OfferedFile) -> int | None:
        """From which byte to send, or None where this file (or another of its key) is here already.

        Raises:
            RatchetError: link.disk_full, link.io.
        """
        if self.knows(offered.robot, offered.key):
            return None
        if offered.sha in self._sealed:
            return offered.size  # all bytes are here and being made durable; the answer to that is still to come
        with disk_errors(self.root):
            if self.path(offered.sha).is_file() and self._same(offered):
                self._accept(offered)
                return None
            return self._begin(offered).offset

    def write(self, sha: str, offset: int, piece: memoryview) -> int | None:
        """Add a piece; returns how many bytes are there now, or None where no such file was offered.

        A piece that came before is dropped, one that comes too early too: the answer says what is needed next.

        Raises:
            RatchetError: link.disk_full, link.io; link.too_large for bytes beyond the offered size.
        """
        partial = self._open.get(sha)
        if partial is None:
            return None
        if offset != partial.offset:
            return partial.offset
        if offset + len(piece) > partial.offered.size:
            raise RatchetError("link.too_large", "more bytes than were offered", where=sha[:12])
        with disk_errors(self.root):
            self._disk.step("write", self._partial_folder / sha)
            remaining = piece
            while remaining:
                remaining = remaining[os.pwrite(partial.handle, remaining, offset + len(piece) - len(remaining)) :]
        # Hashed while it arrives, so that a complete file needs no second reading.
        partial.sha.update(piece)
        partial.offset += len(piece)
        return partial.offset

    def complete(self, sha: str) -> bool:
        """Whether every byte of an offered file is here, so that `finish` may be called."""
        partial = self._open.get(sha)
        return partial is not None and partial.offset == partial.offered.size

    def finish(self, sha: str) -> None:
        """`seal`, then `settle`: afterwards the file may be acknowledged. Raises what they raise."""
        self.seal(sha)
        self.settle(sha)

    def seal(self, sha: str) -> None:
        """All bytes are there: check them. Nothing more is written to this file.

        Raises:
            RatchetError: link.incomplete; link.hash_mismatch, after which it must be sent from its first byte; link.io.
        """
        if not self.complete(sha):
            raise RatchetError("link.incomplete", "not all bytes are here", where=sha[:12])
        if self._open[sha].sha.hexdigest() != sha:
            self._forget(sha)
            with disk_errors(self.root):
                self._disk.remove(self._partial_folder / sha)
            raise RatchetError("link.hash_mismatch", "the bytes are not the announced ones", where=sha[:12])
        self._sealed[sha] = self._open.pop(sha)

    def settle(self, sha: str) -> None:
        """Make a sealed file durable and count it. May run in another thread than the rest, one file at a time.

        Raises:
            RatchetError: link.disk_full, link.io; the file can be sealed and settled again then.
        """
        partial = self._sealed[sha]
        partial_path = self._partial_folder / sha
        try:
            with disk_errors(self.root):
                self._disk.step("fsync", partial_path)
                os.fsync(partial.handle)
                self._accept(partial.offered, partial_path)
        finally:
            # What could not be settled is on the disk: the next offer finds it there.
            del self._sealed[sha]
            os.close(partial.handle)

    def close(self) -> None:
        for sha in list(self._open):
            self._forget(sha)

    # -- inside --------------------------------------------------------------------------------------------------

    def _begin(self, offered: OfferedFile) -> _Partial:
        open_partial = self._open.get(offered.sha)
        if open_partial is not None:
            open_partial.offered = offered
            self._open.move_to_end(offered.sha)
            return open_partial
        partial_path = self._partial_folder / offered.sha
        present_bytes = partial_path.stat().st_size if partial_path.exists() else 0
        require_space(self.root, offered.size - min(present_bytes, offered.size), self.reserve)
        while len(self._open) >= OPEN:
            self._forget(next(iter(self._open)))
        self._disk.step("open", partial_path)
        descriptor = os.open(partial_path, os.O_CREAT | os.O_RDWR, 0o644)
        hasher = hashlib.sha256()
        if present_bytes > offered.size:
            os.ftruncate(descriptor, 0)
            present_bytes = 0
        offset = 0
        # hashlib's state is not on the disk; after a restart the bytes so far are read once more.
        while offset < present_bytes:
            piece = os.pread(descriptor, min(1 << 20, present_bytes - offset), offset)
            hasher.update(piece)
            offset += len(piece)
        partial = self._open[offered.sha] = _Partial(offered, descriptor, present_bytes, hasher)
        return partial

    def _forget(self, sha: str) -> None:
        os.close(self._open.pop(sha).handle)

    def _accept(self, offered: OfferedFile, partial_path: Path | None = None) -> None:
        """Sidecar, then file, then journal: a crash in between is finished by the next start."""
        sidecar = self._files / f"{offered.sha}.json"
        if partial_path is not None:
            scratch_path = self._partial_folder / f"{offered.sha}.json"
            self._disk.remove(scratch_path)
            self._disk.create(scratch_path, (json.dumps(asdict(offered)) + "\n").encode())
            self._disk.rename(scratch_path, sidecar)
            self._disk.rename(partial_path, self.path(offered.sha))
            self._disk.sync_folder(self._partial_folder)
        if not self.knows(offered.robot, offered.key):
            event = self._journal.append("received", **asdict(offered))
            self._known[f"{offered.robot} {offered.key}"] = offered.sha
            self.on_received(event)

    def _same(self, offered: OfferedFile) -> bool:
        return (
            self.path(offered.sha).stat().st_size == offered.size and hash_file(self.path(offered.sha)) == offered.sha
        )

    def _recover(self) -> None:
        """Count files that were complete when a crash came before the journal's line."""
        received_hashes = {event.data["sha"] for event in self._journal.of("received")}
        for sidecar_path in sorted(self._files.glob("*.json")):
            sha = sidecar_path.name.removesuffix(".json")
            if sha in received_hashes or not self.path(sha).is_file():
                continue
            try:
                offered_fields: Mapping[str, Any] = json.loads(sidecar_path.read_bytes())
                offered = OfferedFile(**offered_fields)
            except (ValueError, TypeError):
                self._disk.remove(sidecar_path)  # never acknowledged: what it says comes again with the next offer
                continue
            if self._same(offered):
                self._accept(offered)
            else:
                self._disk.remove(self.path(sha))  # torn by a power cut, never acknowledged: it will be offered again
