"""Adapter download, on the robot: requested by id, received in resumable pieces, accepted only by their hash.

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

from ratchet_vla.adapters.identity import Adapter, Binding
from ratchet_vla.adapters.peft_format import CONFIG, WEIGHTS, read_config, read_file, read_weights
from ratchet_vla.adapters.protocol import Provenance
from ratchet_vla.adapters.store.folder import CARD, FolderStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.link.wire import CHUNK, Message
from ratchet_vla.storage.disk import disk_errors, require_space
from ratchet_vla.storage.documents import hash_file
from ratchet_vla.storage.files import Files

log = logging.getLogger("ratchet.link")
WINDOW = 16  # pieces requested and not yet received
NEEDED = {WEIGHTS, CONFIG, CARD}

Send = Callable[..., bool]


@dataclass
class _Fetch:
    adapter: str
    files: list[dict[str, Any]] = field(default_factory=list)
    file_index: int = 0  # the file being read
    requested_bytes: int = 0  # of that file
    received_bytes: int = 0  # of that file, on the disk
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
        self.store = store
        self._incoming = incoming
        self._on_adapter = on_adapter
        self._reserve = reserve
        self._files = files or Files()
        # Guards _wanted and _offered, which any thread may change; _fetch belongs to the client's thread alone.
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
        self._robot = robot
        self._send = send
        self._patience = patience

    def want(self, adapters: Iterable[str]) -> None:
        """Request these adapters; ids requested before stay requested until they arrive."""
        with self._lock:
            for adapter_id in adapters:
                if adapter_id not in self._wanted and adapter_id not in self._offered:
                    self._wanted.append(adapter_id)

    def missing(self) -> list[str]:
        """Wanted and not yet in the store."""
        with self._lock:
            return list(self._wanted)

    # -- the client's thread -------------------------------------------------------------------------------------

    def work(self, now_s: float) -> float:
        """Request what is due; returns the time (monotonic seconds) at which to call again."""
        self._offer_present()
        with self._lock:
            newest_id = self._wanted[-1] if self._wanted else None
        if newest_id is None:
            return float("inf")
        if self._fetch is None:
            self._fetch = _Fetch(newest_id)
        download = self._fetch
        if now_s >= download.due:
            download.due = now_s + self._patience
            if download.files:
                download.requested_bytes = download.received_bytes  # what was asked for did not come
            else:
                self._send("parts", {"robot": self._robot, "adapter": download.adapter})
        self._pump(download)
        return download.due

    def take(self, message: Message, now_s: float) -> None:
        """`files` or `data`.

        Raises:
            RatchetError: link.disk_full, link.io, adapter.disk_full …; what is on the disk is continued later.
        """
        download = self._fetch
        if download is None or message["adapter"] != download.adapter:
            return
        try:
            self._receive(download, message, now_s)
        except RatchetError:
            self._close(download)
            delay_s = min(max(2 * download.delay, 1.0), 30.0)
            self._fetch = _Fetch(download.adapter, due=now_s + delay_s, delay=delay_s)
            raise

    def _receive(self, download: _Fetch, message: Message, now_s: float) -> None:
        if message.kind == "files":
            if not download.files:
                self._list(download, message["files"], now_s)
            return
        assert message.payload is not None
        current_file = download.files[download.file_index] if download.file_index < len(download.files) else None
        if (
            current_file is None
            or message["name"] != current_file["name"]
            or message["offset"] != download.received_bytes
        ):
            return  # a piece from before a loss; the right one has been requested
        if len(message.payload) > current_file["size"] - download.received_bytes or not message.payload:
            self._drop(download, now_s)
            return
        with disk_errors(self._incoming):
            partial_path = self._folder(download) / current_file["name"]
            # pwrite at the received length, so a repeated piece can only rewrite the same bytes.
            self._files.step("write", partial_path)
            os.pwrite(download.handle, message.payload, download.received_bytes)
        download.received_bytes += len(message.payload)
        download.due = now_s + self._patience
        self._advance(download, now_s)

    def refused(self, message: Message, now_s: float) -> None:
        download = self._fetch
        if download is None or message["about"] != download.adapter:
            return
        download.delay = min(max(2 * download.delay, 1.0), 30.0)
        download.due = now_s + download.delay
        if message["code"] == "adapter.unknown":
            # The learner has removed it since; what it wants robots to hold now is in its state.
            self._close(download)
            self._fetch = None
            with self._lock:
                self._wanted.remove(download.adapter)

    def restart(self) -> None:
        """The connection is new: ask again at once."""
        if self._fetch is not None:
            self._fetch.due = 0.0

    # -- inside --------------------------------------------------------------------------------------------------

    def _folder(self, download: _Fetch) -> Path:
        return self._incoming / download.adapter

    def _list(self, download: _Fetch, listed_files: list[dict[str, Any]], now_s: float) -> None:
        if {listed_file["name"] for listed_file in listed_files} != NEEDED or len(listed_files) != len(NEEDED):
            raise RatchetError("link.bad_message", "not the files of an adapter", where=download.adapter[:12])
        with disk_errors(self._incoming):
            self._files.folder(self._folder(download))
            require_space(self._incoming, sum(listed_file["size"] for listed_file in listed_files), self._reserve)
        download.files = listed_files
        download.file_index = 0
        download.due = now_s + self._patience
        self._open(download)
        self._advance(download, now_s)

    def _open(self, download: _Fetch) -> None:
        current_file = download.files[download.file_index]
        partial_path = self._folder(download) / current_file["name"]
        with disk_errors(self._incoming):
            self._files.step("open", partial_path)
            download.handle = os.open(partial_path, os.O_CREAT | os.O_RDWR, 0o644)
            # What a crash left is continued; it counts only once the whole file's hash is right.
            present_bytes = os.fstat(download.handle).st_size
            if present_bytes > current_file["size"]:
                os.ftruncate(download.handle, 0)
                present_bytes = 0
        download.received_bytes = download.requested_bytes = present_bytes

    def _advance(self, download: _Fetch, now_s: float) -> None:
        """Go on to the next file where this one is complete; check and store after the last."""
        while download.received_bytes == download.files[download.file_index]["size"]:
            current_file = download.files[download.file_index]
            self._close(download)
            if hash_file(self._folder(download) / current_file["name"]) != current_file["sha"]:
                self._drop(download, now_s)
                return
            download.file_index += 1
            if download.file_index == len(download.files):
                self._complete(download, now_s)
                return
            self._open(download)

    def _pump(self, download: _Fetch) -> None:
        if not download.files or download.file_index >= len(download.files):
            return
        current_file = download.files[download.file_index]
        while (
            download.requested_bytes < current_file["size"]
            and download.requested_bytes - download.received_bytes < WINDOW * CHUNK
        ):
            piece_bytes = min(CHUNK, current_file["size"] - download.requested_bytes)
            read_fields = {
                "robot": self._robot,
                "adapter": download.adapter,
                "name": current_file["name"],
                "offset": download.requested_bytes,
            }
            if not self._send("read", {**read_fields, "size": piece_bytes}):
                return
            download.requested_bytes += piece_bytes

    def _complete(self, download: _Fetch, now_s: float) -> None:
        partial_folder = self._folder(download)
        try:
            adapter, provenance = read_adapter(partial_folder)
            if adapter.id != download.adapter:
                raise RatchetError(
                    "adapter.hash_mismatch",
                    f"content is {adapter.id[:12]}, asked for {download.adapter[:12]}",
                    fix="it is fetched again",
                )
        except RatchetError as error:
            log.warning("%s", error)
            self._drop(download, now_s)
            return
        # The store hashes the content once more; `on_adapter` is called by _offer_present when the id is in the
        # store.
        self.store.put(adapter, provenance)
        self._fetch = None
        with disk_errors(self._incoming):
            self._files.remove(partial_folder)

    def _drop(self, download: _Fetch, now_s: float) -> None:
        """Discard what was received of this adapter and start again after a delay, doubled each time up to 30 s."""
        self._close(download)
        with disk_errors(self._incoming):
            self._files.remove(self._folder(download))
        delay_s = min(max(2 * download.delay, 1.0), 30.0)
        self._fetch = _Fetch(download.adapter, due=now_s + delay_s, delay=delay_s)

    def _close(self, download: _Fetch) -> None:
        if download.handle >= 0:
            os.close(download.handle)
            download.handle = -1

    def _offer_present(self) -> None:
        with self._lock:
            requested_ids = list(self._wanted)
        if not requested_ids:
            return
        stored_ids = set(self.store.ids())
        for adapter_id in requested_ids:
            if adapter_id in stored_ids:
                with self._lock:
                    self._wanted.remove(adapter_id)
                    self._offered.add(adapter_id)
                if self._fetch is not None and self._fetch.adapter == adapter_id:
                    self._close(self._fetch)
                    self._fetch = None
                self._on_adapter(adapter_id)


def read_adapter(folder: Path) -> tuple[Adapter, Provenance]:
    """The adapter that a folder's files hold, and where it comes from; its id is the caller's to check.

    Raises:
        RatchetError: adapter.missing_file, adapter.truncated, adapter.wrong_dtype, adapter.bad_config,
            adapter.bad_card.
    """
    config = read_config(read_file(folder / CONFIG), str(folder / CONFIG))
    tensors = read_weights(read_file(folder / WEIGHTS), str(folder / WEIGHTS))
    try:
        card_fields = json.loads(read_file(folder / CARD))
        binding = Binding(
            str(card_fields["base_hash"]), dict(card_fields["statistics"]), dict(card_fields["action_space"])
        )
        provenance = Provenance(**card_fields["provenance"])
    except (ValueError, TypeError, KeyError):
        raise RatchetError("adapter.bad_card", "the card cannot be read", where=str(folder)) from None
    return Adapter(tensors, config, binding), provenance
