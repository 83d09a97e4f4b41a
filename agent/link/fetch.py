"""Adapters on their way to the robot: asked for by id, received in resumable pieces, believed only by their hash.

Knows the files of an adapter, the robot's store and what to ask next. Knows no socket and no policy: an adapter is
offered to whoever swaps only when it stands in the store under the id that its own content gives.

    wanted -> listed -> reading -> checked -> stored (offered)        any doubt: dropped and fetched again
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.adapters.files import Files
from agent.adapters.identity import Adapter, Binding
from agent.adapters.peft_format import CONFIG, WEIGHTS, read_config, read_file, read_weights
from agent.adapters.protocol import Provenance
from agent.adapters.store import CARD, FolderStore
from agent.errors import RatchetError
from agent.link.disk import disk_errors, hash_file, require_space
from agent.link.wire import CHUNK, Message

log = logging.getLogger("ratchet.link")
WINDOW = 16  # pieces asked for and not yet here
NEEDED = {WEIGHTS, CONFIG, CARD}

Send = Callable[..., bool]


@dataclass
class _Fetch:
    adapter: str
    files: list[dict[str, Any]] = field(default_factory=list)
    place: int = 0  # file being read
    asked: int = 0  # bytes of it asked for
    got: int = 0  # bytes of it on the disk
    handle: int = -1
    due: float = 0.0  # when to ask again, monotonic seconds
    delay: float = 0.0


class Fetcher:
    """Brings adapters into a store, one at a time, the one wanted last first.

    Args:
        store: the robot's store; what is in it already is offered, not fetched.
        incoming: folder for what is not complete.
        on_adapter: called with the id of each wanted adapter once it is in the store; from the link's thread.
    """

    def __init__(
        self,
        store: FolderStore,
        incoming: Path,
        *,
        on_adapter: Callable[[str], None] = lambda adapter: None,
        reserve: int = 1024**3,
        files: Files | None = None,
    ) -> None:
        self.store, self._incoming, self._on_adapter, self._reserve = store, incoming, on_adapter, reserve
        self._files = files or Files()
        self._lock = threading.Lock()
        self._wanted: list[str] = []
        self._offered: set[str] = set()
        self._fetch: _Fetch | None = None
        self._robot = ""
        self._send: Send = lambda *_: False
        self._patience = 3.0
        with disk_errors(incoming):
            self._files.folder(incoming)

    def connect(self, robot: str, send: Send, patience: float) -> None:
        """Called once by the client."""
        self._robot, self._send, self._patience = robot, send, patience

    def want(self, adapters: Iterable[str]) -> None:
        """From now on these are wanted; ids that were wanted before and are not named stay wanted until they came."""
        with self._lock:
            for adapter in adapters:
                if adapter not in self._wanted and adapter not in self._offered:
                    self._wanted.append(adapter)

    def missing(self) -> list[str]:
        """Wanted and not yet in the store."""
        with self._lock:
            return list(self._wanted)

    # -- the client's thread -------------------------------------------------------------------------------------

    def work(self, now: float) -> float:
        """Ask for what is due; returns when to look again."""
        self._offer_present()
        with self._lock:
            newest = self._wanted[-1] if self._wanted else None
        if newest is None:
            return float("inf")
        if self._fetch is None:
            self._fetch = _Fetch(newest)
        fetch = self._fetch
        if now >= fetch.due:
            fetch.due = now + self._patience
            if fetch.files:
                fetch.asked = fetch.got  # what was asked for did not come
            else:
                self._send("parts", {"robot": self._robot, "adapter": fetch.adapter})
        self._pump(fetch)
        return fetch.due

    def take(self, message: Message, now: float) -> None:
        """`files` or `data`.

        Raises:
            RatchetError: link.disk_full, link.io, adapter.disk_full …; what is on the disk is continued later.
        """
        fetch = self._fetch
        if fetch is None or message["adapter"] != fetch.adapter:
            return
        try:
            self._receive(fetch, message, now)
        except RatchetError:
            self._close(fetch)
            delay = min(max(2 * fetch.delay, 1.0), 30.0)
            self._fetch = _Fetch(fetch.adapter, due=now + delay, delay=delay)
            raise

    def _receive(self, fetch: _Fetch, message: Message, now: float) -> None:
        if message.kind == "files":
            if not fetch.files:
                self._list(fetch, message["files"], now)
            return
        assert message.payload is not None
        file = fetch.files[fetch.place] if fetch.place < len(fetch.files) else None
        if file is None or message["name"] != file["name"] or message["offset"] != fetch.got:
            return  # a piece of before a loss: the right one is asked for
        if len(message.payload) > file["size"] - fetch.got or not message.payload:
            self._drop(fetch, now)
            return
        with disk_errors(self._incoming):
            path = self._folder(fetch) / file["name"]
            self._files.step("write", path)
            os.pwrite(fetch.handle, message.payload, fetch.got)
        fetch.got += len(message.payload)
        fetch.due = now + self._patience
        self._advance(fetch, now)

    def refused(self, message: Message, now: float) -> None:
        fetch = self._fetch
        if fetch is None or message["about"] != fetch.adapter:
            return
        fetch.delay = min(max(2 * fetch.delay, 1.0), 30.0)
        fetch.due = now + fetch.delay
        if message["code"] == "adapter.unknown":
            # The learner has removed it since; what it wants robots to hold now is in its state.
            self._close(fetch)
            self._fetch = None
            with self._lock:
                self._wanted.remove(fetch.adapter)

    def restart(self) -> None:
        """The connection is new: ask again at once."""
        if self._fetch is not None:
            self._fetch.due = 0.0

    # -- inside --------------------------------------------------------------------------------------------------

    def _folder(self, fetch: _Fetch) -> Path:
        return self._incoming / fetch.adapter

    def _list(self, fetch: _Fetch, files: list[dict[str, Any]], now: float) -> None:
        if {f["name"] for f in files} != NEEDED or len(files) != len(NEEDED):
            raise RatchetError("link.bad_message", "not the files of an adapter", where=fetch.adapter[:12])
        with disk_errors(self._incoming):
            self._files.folder(self._folder(fetch))
            require_space(self._incoming, sum(f["size"] for f in files), self._reserve)
        fetch.files, fetch.place = files, 0
        fetch.due = now + self._patience
        self._open(fetch)
        self._advance(fetch, now)

    def _open(self, fetch: _Fetch) -> None:
        file = fetch.files[fetch.place]
        path = self._folder(fetch) / file["name"]
        with disk_errors(self._incoming):
            self._files.step("open", path)
            fetch.handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
            there = os.fstat(fetch.handle).st_size
            if there > file["size"]:
                os.ftruncate(fetch.handle, 0)
                there = 0
        fetch.got = fetch.asked = there

    def _advance(self, fetch: _Fetch, now: float) -> None:
        """Go on to the next file where this one is complete; check and store after the last."""
        while fetch.got == fetch.files[fetch.place]["size"]:
            file = fetch.files[fetch.place]
            self._close(fetch)
            if hash_file(self._folder(fetch) / file["name"]) != file["sha"]:
                self._drop(fetch, now)
                return
            fetch.place += 1
            if fetch.place == len(fetch.files):
                self._complete(fetch, now)
                return
            self._open(fetch)

    def _pump(self, fetch: _Fetch) -> None:
        if not fetch.files or fetch.place >= len(fetch.files):
            return
        file = fetch.files[fetch.place]
        while fetch.asked < file["size"] and fetch.asked - fetch.got < WINDOW * CHUNK:
            size = min(CHUNK, file["size"] - fetch.asked)
            fields = {"robot": self._robot, "adapter": fetch.adapter, "name": file["name"], "offset": fetch.asked}
            if not self._send("read", {**fields, "size": size}):
                return
            fetch.asked += size

    def _complete(self, fetch: _Fetch, now: float) -> None:
        folder = self._folder(fetch)
        try:
            adapter, provenance = read_adapter(folder)
            if adapter.id != fetch.adapter:
                raise RatchetError(
                    "adapter.hash_mismatch",
                    f"content is {adapter.id[:12]}, asked for {fetch.adapter[:12]}",
                    fix="it is fetched again",
                )
        except RatchetError as error:
            log.warning("%s", error)
            self._drop(fetch, now)
            return
        self.store.put(adapter, provenance)
        self._fetch = None
        with disk_errors(self._incoming):
            self._files.remove(folder)

    def _drop(self, fetch: _Fetch, now: float) -> None:
        """Something does not fit: begin this adapter anew, after a while."""
        self._close(fetch)
        with disk_errors(self._incoming):
            self._files.remove(self._folder(fetch))
        delay = min(max(2 * fetch.delay, 1.0), 30.0)
        self._fetch = _Fetch(fetch.adapter, due=now + delay, delay=delay)

    def _close(self, fetch: _Fetch) -> None:
        if fetch.handle >= 0:
            os.close(fetch.handle)
            fetch.handle = -1

    def _offer_present(self) -> None:
        with self._lock:
            wanted = list(self._wanted)
        if not wanted:
            return
        stored = set(self.store.ids())
        for adapter in wanted:
            if adapter in stored:
                with self._lock:
                    self._wanted.remove(adapter)
                    self._offered.add(adapter)
                if self._fetch is not None and self._fetch.adapter == adapter:
                    self._close(self._fetch)
                    self._fetch = None
                self._on_adapter(adapter)


def read_adapter(folder: Path) -> tuple[Adapter, Provenance]:
    """The adapter that a folder's files hold, and where it comes from; its id is the caller's to check.

    Raises:
        RatchetError: adapter.missing_file, adapter.truncated, adapter.wrong_dtype, adapter.bad_config,
            adapter.bad_card.
    """
    config = read_config(read_file(folder / CONFIG), str(folder / CONFIG))
    tensors = read_weights(read_file(folder / WEIGHTS), str(folder / WEIGHTS))
    try:
        card = json.loads(read_file(folder / CARD))
        binding = Binding(str(card["base_hash"]), dict(card["statistics"]), dict(card["action_space"]))
        provenance = Provenance(**card["provenance"])
    except (ValueError, TypeError, KeyError):
        raise RatchetError("adapter.bad_card", "the card cannot be read", where=str(folder)) from None
    return Adapter(tensors, config, binding), provenance
