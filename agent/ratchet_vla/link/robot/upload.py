"""File upload, on the robot: which piece to send next, and what to do about each answer.

Knows offers, offsets and windows. Knows no socket (sending is an argument) and no thread: the client's thread calls it.

    queued -> offered -> sending -> sent -> stored        refused: later again, or put aside for a person
                 ^__________|_________|  no progress, or the connection was new
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ratchet_vla.link.robot.outbox import Item, Outbox
from ratchet_vla.link.wire import CHUNK, Message
from ratchet_vla.storage.disk import disk_errors
from ratchet_vla.storage.documents import hash_file

ACTIVE = 3  # files under way at once: while the learner makes one durable, the next ones' pieces arrive
WINDOW = 32 * 1024 * 1024  # bytes that may be on their way unanswered
DELAY = (1.0, 30.0)  # seconds until a temporarily refused file is offered again: the first time, and at most

Send = Callable[..., bool]


@dataclass
class _Upload:
    item: Item
    handle: int = -1
    offered: bool = False  # an offer is out, unanswered
    open: bool = False  # the learner said where to begin
    sent: int = 0
    acked: int = 0
    rewound: int = -1  # offset of the last rewind
    due: float = 0.0  # when to offer (again), monotonic seconds
    delay: float = 0.0


class Uploads:
    """The head of an outbox. Files are finished strictly in its order: the learner gets them as they were made."""

    def __init__(self, outbox: Outbox, robot: str, send: Send, patience: float) -> None:
        self._outbox = outbox
        self._robot = robot
        self._send = send
        self._patience = patience
        self._active: OrderedDict[str, _Upload] = OrderedDict()

    def work(self, now_s: float) -> float:
        """Offer and send what may go; returns when something is due."""
        if len(self._active) < ACTIVE:
            for item in self._outbox.waiting(ACTIVE):
                active_upload = self._active.get(item.sha)
                if active_upload is not None and active_upload.item.sequence != item.sequence:
                    break  # equal contents under two keys: the second one's turn comes after the first
                if active_upload is None:
                    self._active[item.sha] = _Upload(item)
        for upload in self._active.values():
            if now_s >= upload.due:
                self._offer(upload, now_s)
        self._pump(now_s)
        return min((upload.due for upload in self._active.values()), default=float("inf"))

    def take(self, message: Message, now_s: float) -> None:
        """`need`, `got` or `stored`."""
        upload = self._active.get(message["sha"])
        if upload is None:
            return
        if message.kind == "stored":
            self._end(upload)
            self._outbox.delivered(upload.item)
            return
        offset = message["offset"]
        if offset > upload.item.size:
            return
        upload.delay = 0.0
        if message.kind == "got" or upload.open:
            if offset > upload.acked or message.kind == "got":
                upload.due = now_s + self._patience
            upload.acked = max(upload.acked, offset)
            upload.sent = max(upload.sent, offset)
        if message.kind == "need":
            answers_offer = upload.offered
            upload.offered = False
            upload.due = now_s + self._patience
            # Pieces still in flight after a loss each provoke a `need` for the same offset; only the first may
            # rewind, or everything would be sent many times.
            if not upload.open or answers_offer or (offset < upload.sent and offset != upload.rewound):
                upload.open = True
                upload.sent = upload.acked = upload.rewound = offset

    def refused(self, message: Message, now_s: float) -> bool:
        """An answer about one of these files; False where it is about something else."""
        upload = self._active.get(message["about"])
        if upload is None:
            return False
        error_code = message["code"]
        if error_code == "link.hash_mismatch" and hash_file(self._outbox.path(upload.item)) != upload.item.sha:
            error_code = "link.damaged_file"  # it was damaged on this disk, not in transit
        if not message["again"] or error_code == "link.damaged_file":
            self._end(upload)
            self._outbox.refused(upload.item, error_code)
            return True
        upload.open = upload.offered = False
        offer_forgotten = (
            message["code"] == "link.incomplete"
        )  # the learner restarted and lost the offer: no reason to wait
        upload.delay = 0.0 if offer_forgotten else min(max(2 * upload.delay, DELAY[0]), DELAY[1])
        upload.due = now_s + upload.delay
        return True

    def restart(self) -> None:
        """The connection is new: nothing that was sent before can be relied on."""
        for upload in self._active.values():
            upload.open = upload.offered = False
            upload.due = 0.0

    def close(self) -> None:
        for upload in list(self._active.values()):
            self._end(upload)

    def _offer(self, upload: _Upload, now_s: float) -> None:
        item = upload.item
        offer_fields = {
            "sha": item.sha,
            "size": item.size,
            "type": item.type,
            "key": item.key,
            "sequence": item.sequence,
        }
        upload.open = False
        upload.offered = self._send("offer", {"robot": self._robot, **offer_fields, "meta": item.meta})
        upload.due = now_s + self._patience

    def _pump(self, now_s: float) -> None:
        # Bytes sent and not acknowledged, over all files together.
        in_flight_bytes = sum(upload.sent - upload.acked for upload in self._active.values() if upload.open)
        for position, upload in enumerate(self._active.values()):
            if not upload.open:
                continue
            # Only the oldest may be finished: its last piece is held back from all others.
            sendable_end = upload.item.size if position == 0 else upload.item.size - 1
            while upload.sent < sendable_end and in_flight_bytes < WINDOW:
                piece_bytes = min(CHUNK, upload.item.size - upload.sent)
                if upload.sent + piece_bytes > sendable_end:
                    break
                with disk_errors(self._outbox.root):
                    if upload.handle < 0:
                        upload.handle = os.open(self._outbox.path(upload.item), os.O_RDONLY)
                    piece = os.pread(upload.handle, piece_bytes, upload.sent)
                chunk_fields = {"robot": self._robot, "sha": upload.item.sha, "offset": upload.sent}
                if not self._send("chunk", chunk_fields, piece):
                    return
                upload.sent += piece_bytes
                in_flight_bytes += piece_bytes

    def _end(self, upload: _Upload) -> None:
        self._active.pop(upload.item.sha, None)
        if upload.handle >= 0:
            os.close(upload.handle)
            upload.handle = -1
