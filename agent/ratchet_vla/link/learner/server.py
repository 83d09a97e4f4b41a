"""Link server, on the learner: takes files into the inbox, serves adapters, publishes the learner's state.

Knows messages, robots and their names. Knows no model and no learning; the content of the state is its caller's.
One thread owns the socket, another forces files to the disk. The server only ever answers, so a lost answer costs the
robot one repeated request.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import zmq

import ratchet_vla
from ratchet_vla.errors import RatchetError
from ratchet_vla.link import sockets, wire
from ratchet_vla.link.keys import AllowList, KeyPair
from ratchet_vla.link.learner.inbox import Inbox, OfferedFile
from ratchet_vla.link.learner.peers import Counts, Peer, version_of

__all__ = ["LinkServer"]

log = logging.getLogger("ratchet.link")
# Refusals that may be gone a moment later: the robot sends the file again. Any other code makes it give the file up.
AGAIN = {
    "link.failed",
    "link.disk_full",
    "link.io",
    "link.hash_mismatch",
    "link.incomplete",
    "adapter.unknown",
    "adapter.store_io",
}


class ArtifactSource(Protocol):
    """Source of adapter files."""

    def files(self, adapter: str) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of an adapter's files. Raises RatchetError adapter.unknown."""
        ...

    def read(self, adapter: str, name: str, offset: int, size: int) -> bytes: ...


class LinkServer:
    """Call `start`, then `publish` whenever the state changes; `stop` ends it.

    Args:
        address: such as tcp://0.0.0.0:5544; port `*` picks one, see `address` afterwards.
        keys, allow: the learner's keys and its folder of allowed robots; both None for plain on loopback.
        on_change: called from the server's thread after a robot appeared or reported.
        tamper: for fault injection, as in `LinkClient`.
    """

    def __init__(
        self,
        address: str,
        inbox: Inbox,
        artifacts: ArtifactSource,
        *,
        keys: KeyPair | None = None,
        allow: Path | None = None,
        on_change: Callable[[], None] = lambda: None,
        tamper: Callable[[list[Any]], list[list[Any]]] | None = None,
    ) -> None:
        if (keys is None) != (allow is None):
            raise RatchetError("link.no_key", "keys and allow list belong together", fix="name both, or neither")
        sockets.require_allowed(address, keys)
        self._asked = address
        self._inbox = inbox
        self._artifacts = artifacts
        self._keys = keys
        self._allow = AllowList(allow) if allow is not None else None
        self._on_change = on_change
        self._tamper = tamper
        # Guards _state, _version, _peers and the bell. The socket and counts belong to the server's thread alone.
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {}
        self._version = version_of({})
        self._peers: dict[str, Peer] = {}
        self._thread: threading.Thread | None = None
        # Jobs from the server's thread to the settling one, and results back; None ends the latter.
        self._sealed: queue.SimpleQueue[tuple[bytes, str] | None] = queue.SimpleQueue()
        self._settled: deque[tuple[bytes, str, RatchetError | None]] = deque()
        self.counts = Counts()
        self.address = ""

    def start(self) -> None:
        """Listen. Raises RatchetError link.address_in_use."""
        self._context: zmq.Context[Any] = zmq.Context()
        self._zap = sockets.authenticator(self._context, self._allow) if self._allow is not None else None
        try:
            self._router = sockets.listen(self._context, self._asked, self._keys)
        except RatchetError:
            self._end()
            raise
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._wake = self._context.socket(zmq.PAIR)
        self._wake.bind("inproc://wake")
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.connect("inproc://wake")
        self._thread = threading.Thread(target=self._run, name="link-server", daemon=True)
        self._settler = threading.Thread(target=self._settle, name="link-settle", daemon=True)
        self._thread.start()
        self._settler.start()

    def publish(self, body: Mapping[str, Any]) -> str:
        """Set the state that robots follow: those present are told at once, the others with their next beat.

        Args:
            body: plain data, small; `adapters` in it lists the ids that robots should hold.

        Returns:
            The version of this state.

        Raises:
            RatchetError: link.bad_message where it is no plain data or too large.
        """
        new_state = dict(body)
        wire.encode("state", {"version": "0", "body": new_state})
        with self._lock:
            if version_of(new_state) == self._version:
                return self._version
            self._state = new_state
            self._version = version_of(new_state)
            self._ring(b"state")
            return self._version

    @property
    def version(self) -> str:
        """Of the state that is published now."""
        return self._version

    def peers(self) -> list[Peer]:
        with self._lock:
            return [
                Peer(peer.name, peer.seen, dict(peer.report), peer.software, b"", peer.version)
                for peer in self._peers.values()
            ]

    def stop(self) -> None:
        """Close the socket; safe to call more than once."""
        thread = self._thread
        self._thread = None
        if thread is None:
            return
        with self._lock:
            self._ring(b"stop")
        thread.join()
        self._sealed.put(None)
        self._settler.join()
        self._end()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _ring(self, signal: bytes) -> None:
        if self.address:
            self._bell.send(signal)

    def _end(self) -> None:
        self.address = ""
        for attribute in ("_router", "_wake", "_bell"):
            socket = getattr(self, attribute, None)
            if socket is not None:
                socket.close(0)
        if self._zap is not None:
            self._zap.stop()
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        while True:
            ready_sockets = dict(poller.poll())
            if self._wake in ready_sockets:
                signal = self._wake.recv()
                if signal == b"stop":
                    return
                if signal == b"settled":
                    self._acknowledge()
                else:
                    self._announce()
            if self._router in ready_sockets:
                frames = sockets.receive(self._router, keep=3)
                self._take(bytes(frames[0].buffer), frames[1:])

    def _announce(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            routings = [peer.routing for peer in self._peers.values() if peer.present(now_s)]
            state_fields = {"version": self._version, "body": self._state}
        for routing in routings:
            self._send(routing, "state", state_fields)

    def _take(self, routing: bytes, frames: list[zmq.Frame]) -> None:
        """Handle one message from an untrusted sender: answer, refuse or drop it; never raises."""
        allowed_name = None
        if self._allow is not None and frames:
            # The handshake accepted the key; it may have been revoked since, so it is checked for every message.
            allowed_name = self._allow.name_of(str(frames[0].get("User-Id")).encode())
            if allowed_name is None:
                self.counts.strangers += 1
                return
        try:
            message = wire.decode([frame.buffer for frame in frames])
            robot = message.fields.get("robot")
            if robot is None or (allowed_name is not None and robot != allowed_name):
                raise RatchetError("link.wrong_name", "the message is in another robot's name", where=str(robot)[:64])
        except RatchetError as error:
            self.counts.malformed += 1
            self._refuse(routing, "message", error)
            return
        self.counts.messages += 1
        self._meet(routing, robot, message)
        try:
            self._answer(routing, robot, message)
        except Exception as caught:  # noqa: BLE001
            # Whatever one robot's message runs into, the others are served on.
            refusal = caught if isinstance(caught, RatchetError) else _unexpected(caught)
            self.counts.refused += 1
            subject = message.fields.get("sha") or message.fields.get("adapter") or message.kind
            log.warning("%s: %s", robot, refusal)
            self._refuse(routing, subject, refusal)

    def _meet(self, routing: bytes, robot: str, message: wire.Message) -> None:
        now_s = time.monotonic()
        with self._lock:
            peer = self._peers.get(robot)
            has_news = peer is None or not peer.present(now_s)
            if peer is None:
                peer = self._peers[robot] = Peer(robot, now_s)
            peer.seen = now_s
            peer.routing = routing
            if message.kind == "beat":
                has_news = has_news or peer.report != message["report"] or peer.version != message["have"]
                peer.report = dict(message["report"])
                peer.version = message["have"]
            elif message.kind == "hello":
                peer.software = message["software"]
        if has_news:
            self._on_change()

    def _answer(self, routing: bytes, robot: str, message: wire.Message) -> None:
        message_kind = message.kind
        if message_kind == "chunk":
            assert message.payload is not None
            offset = self._inbox.write(message["sha"], message["offset"], message.payload)
            if offset is None:
                # After a restart nothing is open here; the robot offers again and learns where to go on.
                raise RatchetError("link.incomplete", "this file was not offered", where=message["sha"][:12])
            if message["offset"] > offset:
                self._send(routing, "need", {"sha": message["sha"], "offset": offset})
                return
            self.counts.bytes += len(message.payload)
            self._send(routing, "got", {"sha": message["sha"], "offset": offset})
            self._finish(routing, message["sha"])
        elif message_kind == "offer":
            offered = OfferedFile(
                robot, *(message[field_name] for field_name in ("sha", "size", "type", "key", "sequence", "meta"))
            )
            start_offset = self._inbox.offer(offered)
            if start_offset is None:
                self._send(routing, "stored", {"sha": message["sha"]})
                return
            self._send(routing, "need", {"sha": message["sha"], "offset": start_offset})
            self._finish(routing, message["sha"])
        elif message_kind == "beat":
            with self._lock:
                state_version = self._version
                state_body = self._state
            if message["have"] == state_version:
                self._send(routing, "same", {"version": state_version})
            else:
                self._send(routing, "state", {"version": state_version, "body": state_body})
        elif message_kind == "hello":
            self._send(routing, "welcome", {"software": ratchet_vla.__version__})
        elif message_kind == "parts":
            adapter_files = self._artifacts.files(message["adapter"])
            self._send(routing, "files", {"adapter": message["adapter"], "files": adapter_files})
        elif message_kind == "read":
            piece = self._artifacts.read(message["adapter"], message["name"], message["offset"], message["size"])
            data_fields = {field_name: message[field_name] for field_name in ("adapter", "name", "offset")}
            self._send(routing, "data", data_fields, piece)
        else:
            raise RatchetError("link.bad_message", "this kind is the learner's to send", where=message_kind)

    def _finish(self, routing: bytes, sha: str) -> None:
        """Have a complete file made durable, while the next one's pieces go on arriving."""
        if self._inbox.complete(sha):
            self._inbox.seal(sha)
            self._sealed.put((routing, sha))

    def _settle(self) -> None:
        """The second thread: forces files to the disk, one after the other, in the order of their completion."""
        while (job := self._sealed.get()) is not None:
            routing, sha = job
            refusal: RatchetError | None = None
            try:
                self._inbox.settle(sha)
            except Exception as failure:  # noqa: BLE001 - goes to the robot as a refusal
                refusal = failure if isinstance(failure, RatchetError) else _unexpected(failure)
            self._settled.append((routing, sha, refusal))
            with self._lock:
                self._ring(b"settled")

    def _acknowledge(self) -> None:
        while self._settled:
            routing, sha, refusal = self._settled.popleft()
            if refusal is None:
                self.counts.received += 1
                self._send(routing, "stored", {"sha": sha})
            else:
                self.counts.refused += 1
                log.warning("%s", refusal)
                self._refuse(routing, sha, refusal)

    def _refuse(self, routing: bytes, about: str, error: RatchetError) -> None:
        refusal_fields = {
            "about": about[:64],
            "code": error.code[:64],
            "what": error.what[:400],
            "fix": error.fix[:400],
        }
        self._send(routing, "refused", {**refusal_fields, "again": error.code in AGAIN})

    def _send(self, routing: bytes, kind: str, message_fields: Mapping[str, Any], payload: bytes | None = None) -> None:
        try:
            frames = [routing, *wire.encode(kind, message_fields, payload)]
            for outgoing in [frames] if self._tamper is None else self._tamper(frames):
                self._router.send_multipart(outgoing, zmq.DONTWAIT)
        except zmq.ZMQError:
            log.info("an answer was dropped: the robot is gone or its queue is full; it will ask again")


def _unexpected(failure: Exception) -> RatchetError:
    """Wrap a bug of this program as a refusal, so that the robot learns of it; the log has the traceback."""
    log.error("unexpected: %s", failure, exc_info=failure)
    return RatchetError(
        "link.failed", f"{type(failure).__name__}: {failure}", fix="see the learner's log and report it"
    )
