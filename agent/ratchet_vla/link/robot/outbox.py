"""Outbox, on the robot: durable queue of files, kept until the learner confirms that they are on its disk.

Knows files, their hashes, keys and order. Knows no socket and no meaning of a file.

    data/<sha256>                 contents
    queue/<sequence>-<sha>.json   what is still to be delivered; its appearance is the moment of acceptance
    done.jsonl                    what was delivered or refused: the item and the answer
    refused/<sha>                 contents that the learner will never take, kept for a person
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ratchet_vla.errors import RatchetError
from ratchet_vla.link.wire import FILE_LIMIT, is_hash, is_name, plain
from ratchet_vla.storage.disk import disk_errors, hold, require_space
from ratchet_vla.storage.documents import hash_file
from ratchet_vla.storage.files import Files


@dataclass(frozen=True)
class Item:
    """One file on its way.

    Attributes:
        type: what kind of file, such as `episode`.
        key: unique name of what it is, such as `request/17`: the same thing made twice, even with other bytes, is sent
            once.
        meta: small plain data.
    """

    sequence: int
    sha: str
    size: int
    type: str
    key: str
    meta: dict[str, Any] = field(default_factory=dict)


class Outbox:
    """A folder that one process writes; safe from any of its threads.

    Args:
        limit: bytes that may wait; beyond it `put` refuses, so that the robot stops collecting before its disk is full.
        reserve: bytes of the disk that stay free.
    """

    def __init__(
        self, root: Path, *, limit: int = 256 * 1024**3, reserve: int = 1024**3, files: Files | None = None
    ) -> None:
        self.root = root
        self.limit = limit
        self.reserve = reserve
        self._files = files or Files()
        self._data = root / "data"
        self._queue = root / "queue"
        self._scratch = root / "scratch"
        # Guards _items, _keys, _done and _last; re-entrant, because `put` reads `size` while it holds it.
        self._lock = threading.RLock()
        with disk_errors(root):
            for folder in (self._data, self._queue, self._scratch, root / "refused"):
                self._files.folder(folder)
            self._handle: int | None = hold(root / ".lock")
            try:
                self._done, self._keys, last_sequence = self._read_done()
                self._items = self._sweep()
            except BaseException:
                self.close()
                raise
        self._keys |= {queued_item.key for queued_item in self._items.values()}
        self._last = max([last_sequence, *self._items])
        self.listeners: list[Any] = []

    # -- for whoever has files -----------------------------------------------------------------------------------

    def put(
        self,
        content: Path | bytes,
        type: str,
        key: str,
        meta: Mapping[str, Any] | None = None,
        *,
        keep: bool = False,
    ) -> Item | None:
        """Accept a file; it survives a power cut when this returns. None where this key was accepted before.

        Args:
            content: bytes, or a file, which is moved here (copied from another file system).
            keep: copy it in any case.

        Raises:
            RatchetError: link.outbox_full, link.disk_full, link.io, link.bad_item; nothing was accepted then and a
                given file is still where it was.
        """
        meta = dict(meta or {})
        if not is_name(type) or not 0 < len(key) <= 200 or not plain(meta):
            raise RatchetError("link.bad_item", "type, key or meta cannot be sent", where=f"{type} {key}"[:80])
        with self._lock:
            if key in self._keys:
                return None
            with disk_errors(self.root):
                content_bytes = len(content) if isinstance(content, bytes) else content.stat().st_size
                if content_bytes > FILE_LIMIT:
                    raise RatchetError("link.too_large", f"{content_bytes} bytes, limit {FILE_LIMIT}", where=key)
                if self.size + content_bytes > self.limit:
                    raise RatchetError(
                        "link.outbox_full",
                        f"{len(self._items)} files, {self.size} bytes wait for the learner, limit {self.limit}",
                        where=str(self.root),
                        fix="bring the learner back, or raise the limit",
                    )
                require_space(self.root, content_bytes, self.reserve)
                sha = self._take(content, keep)
                item = Item(self._last + 1, sha, content_bytes, type, key, meta)
                scratch_path = self._scratch / secrets.token_hex(8)
                self._files.create(scratch_path, (json.dumps(asdict(item)) + "\n").encode())
                # The moment of acceptance; before it a crash leaves only scratch, which the next start removes.
                self._files.rename(scratch_path, self._entry(item))
            self._items[item.sequence] = item
            self._keys.add(key)
            self._last = item.sequence
        # Outside the lock: a listener may call back into the outbox.
        for listener in self.listeners:
            listener()
        return item

    def knows(self, key: str) -> bool:
        """Whether something of this key was accepted, delivered or not."""
        with self._lock:
            return key in self._keys

    # -- for whoever delivers them -------------------------------------------------------------------------------

    def waiting(self, count: int = 1 << 30) -> list[Item]:
        """The oldest `count` files that are still to be delivered, in order."""
        with self._lock:
            return list(islice(self._items.values(), count))  # kept in order of acceptance

    def path(self, item: Item) -> Path:
        return self._data / item.sha

    def delivered(self, item: Item) -> None:
        """The learner has it on its disk: delete the contents, remember the key."""
        self._finish(item, "stored", None)

    def refused(self, item: Item, code: str) -> None:
        """The learner will never accept it: put the contents aside for a person and go on with the next."""
        self._finish(item, code, self.root / "refused" / item.sha)

    @property
    def accepted(self) -> int:
        """Sequence number of the last file accepted, which is how many there ever were."""
        with self._lock:
            return self._last

    @property
    def size(self) -> int:
        with self._lock:
            return sum(queued_item.size for queued_item in self._items.values())

    def __len__(self) -> int:
        return len(self._items)

    @property
    def done(self) -> dict[str, int]:
        """Answer -> how many files got it (`stored`, or the code of a refusal)."""
        with self._lock:
            return dict(self._done)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    # -- inside --------------------------------------------------------------------------------------------------

    def _entry(self, item: Item) -> Path:
        return self._queue / f"{item.sequence:012d}-{item.sha}.json"

    def _take(self, content: Path | bytes, keep: bool) -> str:
        scratch_path = self._scratch / secrets.token_hex(8)
        if isinstance(content, bytes):
            self._files.create(scratch_path, content)
            content_hash = hash_file(scratch_path)
        else:
            content_hash = hash_file(content)
            if not keep and content.stat().st_dev == self._scratch.stat().st_dev:
                # Same file system: the rename below moves the file, nothing is copied.
                scratch_path = content
            else:
                shutil.copyfile(content, scratch_path)
                if hash_file(scratch_path) != content_hash:
                    raise RatchetError("link.io", "the file changed while it was copied", where=str(content))
            with scratch_path.open("rb") as synced_file:
                self._files.step("fsync", scratch_path)
                os.fsync(synced_file.fileno())
        self._files.rename(scratch_path, self._data / content_hash)
        if isinstance(content, Path) and scratch_path != content and not keep:
            content.unlink()
        return content_hash

    def _finish(self, item: Item, answer: str, rejected_path: Path | None) -> None:
        with self._lock, disk_errors(self.root):
            if item.sequence not in self._items:
                return
            done_fields = {**asdict(item), "answer": answer}
            # First the answer, then the deletions: after a crash in between, the next start sees the answer and
            # deletes.
            self._append_done((json.dumps(done_fields) + "\n").encode())
            self._files.remove(self._entry(item))
            del self._items[item.sequence]
            self._done[answer] = self._done.get(answer, 0) + 1
            if any(waiting_item.sha == item.sha for waiting_item in self._items.values()):
                return  # equal contents under another key are still to go
            if rejected_path is not None:
                self._files.rename(self._data / item.sha, rejected_path)
            else:
                self._files.remove(self._data / item.sha)

    def _append_done(self, done_line: bytes) -> None:
        done_path = self.root / "done.jsonl"
        size_before = done_path.stat().st_size if done_path.exists() else 0
        try:
            self._files.append(done_path, done_line)
        except OSError:
            if done_path.exists():
                os.truncate(done_path, size_before)
            raise

    def _read_done(self) -> tuple[dict[str, int], set[str], int]:
        done_path = self.root / "done.jsonl"
        done_bytes = done_path.read_bytes() if done_path.exists() else b""
        answer_counts: dict[str, int] = {}
        key_by_sequence: dict[int, str] = {}
        intact_bytes = 0
        for done_line in done_bytes.splitlines(keepends=True):
            try:
                done_fields = json.loads(done_line)
                sequence = int(done_fields["sequence"])
                key = str(done_fields["key"])
                answer = str(done_fields["answer"])
            except (ValueError, KeyError, TypeError):
                break
            if not done_line.endswith(b"\n"):
                break
            if sequence not in key_by_sequence:
                answer_counts[answer] = answer_counts.get(answer, 0) + 1
            key_by_sequence[sequence] = key
            intact_bytes += len(done_line)
        if intact_bytes < len(done_bytes):
            self._files.truncate(done_path, intact_bytes)
        return answer_counts, set(key_by_sequence.values()), max(key_by_sequence, default=0)

    def _sweep(self) -> dict[int, Item]:
        """Clean up after a crash, and read the queue.

        A torn entry never was accepted: entries appear by renaming a synced file, so only a failing disk tears one.
        """
        for file_path in self._scratch.iterdir():
            self._files.remove(file_path)
        finished_sequences = self._finished()
        queued_items: dict[int, Item] = {}
        for file_path in sorted(self._queue.iterdir()):
            item = _parse(file_path)
            if item is None or item.sequence in finished_sequences or not (self._data / item.sha).is_file():
                if item is not None and item.sequence not in finished_sequences:
                    raise RatchetError(
                        "link.outbox_damaged",
                        "the contents of a queued file are gone",
                        where=str(self._data / item.sha),
                        fix="restore it from a copy, or remove its entry from queue/ to give it up",
                    )
                if item is None:
                    raise RatchetError(
                        "link.outbox_damaged",
                        "an entry cannot be read",
                        where=str(file_path),
                        fix="restore or remove it",
                    )
                self._files.remove(file_path)
                continue
            queued_items[item.sequence] = item
        queued_hashes = {item.sha for item in queued_items.values()}
        for file_path in self._data.iterdir():
            if file_path.name not in queued_hashes:
                self._files.remove(file_path)
        return queued_items

    def _finished(self) -> set[int]:
        done_path = self.root / "done.jsonl"
        if not done_path.exists():
            return set()
        return {int(json.loads(done_line)["sequence"]) for done_line in done_path.read_bytes().splitlines()}


def history(root: Path) -> list[Item]:
    """Everything that an outbox ever accepted, oldest first, each once; also while another process has it open."""
    item_by_sequence: dict[int, Item] = {}
    done_path = root / "done.jsonl"
    for done_line in done_path.read_bytes().splitlines() if done_path.exists() else []:
        try:
            item_fields = json.loads(done_line)
            item_fields.pop("answer")
            item_by_sequence[int(item_fields["sequence"])] = Item(**item_fields)
        except (ValueError, KeyError, TypeError):
            break  # being written at this moment
    for entry_path in sorted((root / "queue").glob("*.json")):
        item = _parse(entry_path)
        if item is not None:
            item_by_sequence[item.sequence] = item
    return [item_by_sequence[sequence] for sequence in sorted(item_by_sequence)]


def _parse(entry_path: Path) -> Item | None:
    try:
        item_fields = json.loads(entry_path.read_bytes())
        item = Item(**item_fields)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    is_intact = is_hash(item.sha) and entry_path.name == f"{item.sequence:012d}-{item.sha}.json"
    return item if is_intact else None
