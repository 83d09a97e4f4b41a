"""The robot's durable outbox: files that the learner must get, kept until it has said that they are on its disk.

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

from agent.adapters.files import Files
from agent.errors import RatchetError
from agent.link.disk import disk_errors, hash_file, hold, require_space
from agent.link.wire import FILE_LIMIT, is_hash, is_name, plain


@dataclass(frozen=True)
class Item:
    """One file on its way. type: what kind of file, such as `episode`; key: unique name of what it is, such as
    `orders/2/1/17`: the same thing made twice (with other bytes even) is sent once. meta: small plain data."""

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
        self.root, self.limit, self.reserve = root, limit, reserve
        self._files = files or Files()
        self._data, self._queue, self._scratch = root / "data", root / "queue", root / "scratch"
        self._lock = threading.RLock()
        with disk_errors(root):
            for folder in (self._data, self._queue, self._scratch, root / "refused"):
                self._files.folder(folder)
            self._handle: int | None = hold(root / ".lock")
            try:
                self._done, self._keys, last = self._read_done()
                self._items = self._sweep()
            except BaseException:
                self.close()
                raise
        self._keys |= {item.key for item in self._items.values()}
        self._last = max([last, *self._items])
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

        content: bytes, or a file, which is moved here (copied from another file system). keep: copy it in any case.

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
                size = len(content) if isinstance(content, bytes) else content.stat().st_size
                if size > FILE_LIMIT:
                    raise RatchetError("link.too_large", f"{size} bytes, limit {FILE_LIMIT}", where=key)
                if self.size + size > self.limit:
                    raise RatchetError(
                        "link.outbox_full",
                        f"{len(self._items)} files, {self.size} bytes wait for the learner, limit {self.limit}",
                        where=str(self.root),
                        fix="bring the learner back, or raise the limit",
                    )
                require_space(self.root, size, self.reserve)
                sha = self._take(content, keep)
                item = Item(self._last + 1, sha, size, type, key, meta)
                scratch = self._scratch / secrets.token_hex(8)
                self._files.create(scratch, (json.dumps(asdict(item)) + "\n").encode())
                self._files.rename(scratch, self._entry(item))
            self._items[item.sequence] = item
            self._keys.add(key)
            self._last = item.sequence
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
        """The learner has it on its disk: forget the contents, remember the key."""
        self._finish(item, "stored", None)

    def refused(self, item: Item, code: str) -> None:
        """The learner will never take it: put the contents aside for a person and go on with the next."""
        self._finish(item, code, self.root / "refused" / item.sha)

    @property
    def accepted(self) -> int:
        """Sequence number of the last file accepted, which is how many there ever were."""
        with self._lock:
            return self._last

    @property
    def size(self) -> int:
        with self._lock:
            return sum(item.size for item in self._items.values())

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
        scratch = self._scratch / secrets.token_hex(8)
        if isinstance(content, bytes):
            self._files.create(scratch, content)
            sha = hash_file(scratch)
        else:
            sha = hash_file(content)
            if not keep and content.stat().st_dev == self._scratch.stat().st_dev:
                scratch = content
            else:
                shutil.copyfile(content, scratch)
                if hash_file(scratch) != sha:
                    raise RatchetError("link.io", "the file changed while it was copied", where=str(content))
            with scratch.open("rb") as file:
                self._files.step("fsync", scratch)
                os.fsync(file.fileno())
        self._files.rename(scratch, self._data / sha)
        if isinstance(content, Path) and scratch != content and not keep:
            content.unlink()
        return sha

    def _finish(self, item: Item, answer: str, aside: Path | None) -> None:
        with self._lock, disk_errors(self.root):
            if item.sequence not in self._items:
                return
            line = {**asdict(item), "answer": answer}
            self._append_done((json.dumps(line) + "\n").encode())
            self._files.remove(self._entry(item))
            del self._items[item.sequence]
            self._done[answer] = self._done.get(answer, 0) + 1
            if any(other.sha == item.sha for other in self._items.values()):
                return  # equal contents under another key are still to go
            if aside is not None:
                self._files.rename(self._data / item.sha, aside)
            else:
                self._files.remove(self._data / item.sha)

    def _append_done(self, line: bytes) -> None:
        path = self.root / "done.jsonl"
        size = path.stat().st_size if path.exists() else 0
        try:
            self._files.append(path, line)
        except OSError:
            if path.exists():
                os.truncate(path, size)
            raise

    def _read_done(self) -> tuple[dict[str, int], set[str], int]:
        path = self.root / "done.jsonl"
        data = path.read_bytes() if path.exists() else b""
        counts: dict[str, int] = {}
        keys: dict[int, str] = {}
        good = 0
        for line in data.splitlines(keepends=True):
            try:
                raw = json.loads(line)
                sequence, key, answer = int(raw["sequence"]), str(raw["key"]), str(raw["answer"])
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            if sequence not in keys:
                counts[answer] = counts.get(answer, 0) + 1
            keys[sequence] = key
            good += len(line)
        if good < len(data):
            self._files.truncate(path, good)
        return counts, set(keys.values()), max(keys, default=0)

    def _sweep(self) -> dict[int, Item]:
        """Drop what a crash left half done, and read the queue.

        A torn entry never was accepted: entries appear by renaming a synced file, so only a failing disk tears one.
        """
        for path in self._scratch.iterdir():
            self._files.remove(path)
        finished = self._finished()
        items: dict[int, Item] = {}
        for path in sorted(self._queue.iterdir()):
            item = _parse(path)
            if item is None or item.sequence in finished or not (self._data / item.sha).is_file():
                if item is not None and item.sequence not in finished:
                    raise RatchetError(
                        "link.outbox_damaged",
                        "a file that waits for the learner is gone",
                        where=str(self._data / item.sha),
                        fix="restore it from a copy, or remove its entry from queue/ to give it up",
                    )
                if item is None:
                    raise RatchetError(
                        "link.outbox_damaged", "an entry cannot be read", where=str(path), fix="restore or remove it"
                    )
                self._files.remove(path)
                continue
            items[item.sequence] = item
        wanted = {item.sha for item in items.values()}
        for path in self._data.iterdir():
            if path.name not in wanted:
                self._files.remove(path)
        return items

    def _finished(self) -> set[int]:
        path = self.root / "done.jsonl"
        if not path.exists():
            return set()
        return {int(json.loads(line)["sequence"]) for line in path.read_bytes().splitlines()}


def history(root: Path) -> list[Item]:
    """Everything that an outbox ever accepted, oldest first, each once; also while another process has it open."""
    found: dict[int, Item] = {}
    path = root / "done.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            raw = json.loads(line)
            raw.pop("answer")
            found[int(raw["sequence"])] = Item(**raw)
        except (ValueError, KeyError, TypeError):
            break  # being written at this moment
    for entry in sorted((root / "queue").glob("*.json")):
        item = _parse(entry)
        if item is not None:
            found[item.sequence] = item
    return [found[s] for s in sorted(found)]


def _parse(path: Path) -> Item | None:
    try:
        raw = json.loads(path.read_bytes())
        item = Item(**raw)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return item if is_hash(item.sha) and path.name == f"{item.sequence:012d}-{item.sha}.json" else None
