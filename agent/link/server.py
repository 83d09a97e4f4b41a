"""The learner's end of the link: takes files into the inbox, gives adapters out, tells everybody the state.

Knows messages, robots and their names. Knows no model and no learning; what the state says is somebody else's.
One thread owns the socket, another forces files to the disk. The server answers and never asks, so a lost answer costs
the robot one repeated question.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgpack
import zmq

import agent
from agent.errors import RatchetError
from agent.link import sockets, wire
from agent.link.inbox import Inbox, Parcel
from agent.link.keys import AllowList, KeyPair

log = logging.getLogger("ratchet.link")
PRESENT = 5.0  # seconds after its last word that a robot counts as present
AGAIN = {"link.disk_full", "link.io", "link.hash_mismatch", "link.incomplete", "adapter.unknown", "adapter.store_io"}


class Shelf(Protocol):
    """Where adapters are given out from."""

    def files(self, adapter: str) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of an adapter's files. Raises RatchetError adapter.unknown."""
        ...

    def read(self, adapter: str, name: str, offset: int, size: int) -> bytes: ...


@dataclass
class Peer:
    """What is known of a robot. seen: monotonic seconds. report: its own words, see `client.LinkClient.report`."""

    name: str
    seen: float
    report: dict[str, Any] = field(default_factory=dict)
    software: str = ""
    routing: bytes = b""
    version: str = ""  # of the state that it has

    def present(self, now: float) -> bool:
        return now - self.seen < PRESENT


@dataclass
class Counts:
    """messages: well-formed ones from allowed robots. malformed, strangers: refused. received: files counted."""

    messages: int = 0
    malformed: int = 0
    strangers: int = 0
    refused: int = 0
    received: int = 0
    bytes: int = 0


def version_of(body: Mapping[str, Any]) -> str:
    """A state's version: equal states have one version, whoever computes it."""
    return hashlib.sha256(msgpack.packb(body)).hexdigest()[:16]


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
        shelf: Shelf,
        *,
        keys: KeyPair | None = None,
        allow: Path | None = None,
        on_change: Callable[[], None] = lambda: None,
        tamper: Callable[[list[Any]], list[list[Any]]] | None = None,
    ) -> None:
        if (keys is None) != (allow is None):
            raise RatchetError("link.no_key", "keys and allow list belong together", fix="name both, or neither")
        sockets.require_allowed(address, keys)
        self._asked, self._inbox, self._shelf, self._keys = address, inbox, shelf, keys
        self._allow = AllowList(allow) if allow is not None else None
        self._on_change, self._tamper = on_change, tamper
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {}
        self._version = version_of({})
        self._peers: dict[str, Peer] = {}
        self._thread: threading.Thread | None = None
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
        """What every robot should know from now on; present ones are told at once, others when they ask.

        body: plain data, small; `adapters` in it lists the ids that robots should hold. Returns its version.

        Raises:
            RatchetError: link.bad_message where it is no plain data or too large.
        """
        fresh = dict(body)
        wire.encode("state", {"version": "0", "body": fresh})
        with self._lock:
            if version_of(fresh) == self._version:
                return self._version
            self._state, self._version = fresh, version_of(fresh)
            self._ring(b"state")
            return self._version

    @property
    def version(self) -> str:
        """Of the state that is published now."""
        return self._version

    def peers(self) -> list[Peer]:
        with self._lock:
            return [Peer(p.name, p.seen, dict(p.report), p.software, b"", p.version) for p in self._peers.values()]

    def stop(self) -> None:
        """Close the socket; safe to call more than once."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with self._lock:
            self._ring(b"stop")
        thread.join()
        self._sealed.put(None)
        self._settler.join()
        self._end()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _ring(self, what: bytes) -> None:
        if self.address:
            self._bell.send(what)

    def _end(self) -> None:
        self.address = ""
        for name in ("_router", "_wake", "_bell"):
            socket = getattr(self, name, None)
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
            ready = dict(poller.poll())
            if self._wake in ready:
                word = self._wake.recv()
                if word == b"stop":
                    return
                if word == b"settled":
                    self._acknowledge()
                else:
                    self._announce()
            if self._router in ready:
                frames = sockets.receive(self._router, keep=3)
                self._take(bytes(frames[0].buffer), frames[1:])

    def _announce(self) -> None:
        now = time.monotonic()
        with self._lock:
            targets = [p.routing for p in self._peers.values() if p.present(now)]
            fields = {"version": self._version, "body": self._state}
        for routing in targets:
            self._send(routing, "state", fields)

    def _take(self, routing: bytes, frames: list[zmq.Frame]) -> None:
        """One message, from whomever, however made: it is answered, refused or dropped, and the thread goes on."""
        name = None
        if self._allow is not None and frames:
            # The connection was let in by its key; here the key is held against the list of this moment.
            name = self._allow.name_of(str(frames[0].get("User-Id")).encode())
            if name is None:
                self.counts.strangers += 1
                return
        try:
            message = wire.decode([frame.buffer for frame in frames])
            robot = message.fields.get("robot")
            if robot is None or (name is not None and robot != name):
                raise RatchetError("link.wrong_name", "the message is in another robot's name", where=str(robot)[:64])
        except RatchetError as error:
            self.counts.malformed += 1
            self._refuse(routing, "message", error)
            return
        self.counts.messages += 1
        self._meet(routing, robot, message)
        try:
            self._answer(routing, robot, message)
        except RatchetError as error:
            self.counts.refused += 1
            about = message.fields.get("sha") or message.fields.get("adapter") or message.kind
            log.warning("%s: %s", robot, error)
            self._refuse(routing, about, error)

    def _meet(self, routing: bytes, robot: str, message: wire.Message) -> None:
        now = time.monotonic()
        with self._lock:
            peer = self._peers.get(robot)
            new = peer is None or not peer.present(now)
            if peer is None:
                peer = self._peers[robot] = Peer(robot, now)
            peer.seen, peer.routing = now, routing
            if message.kind == "beat":
                new = new or peer.report != message["report"] or peer.version != message["have"]
                peer.report, peer.version = dict(message["report"]), message["have"]
            elif message.kind == "hello":
                peer.software = message["software"]
        if new:
            self._on_change()

    def _answer(self, routing: bytes, robot: str, message: wire.Message) -> None:
        kind = message.kind
        if kind == "chunk":
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
        elif kind == "offer":
            parcel = Parcel(robot, *(message[n] for n in ("sha", "size", "type", "key", "sequence", "meta")))
            start = self._inbox.offer(parcel)
            if start is None:
                self._send(routing, "stored", {"sha": message["sha"]})
                return
            self._send(routing, "need", {"sha": message["sha"], "offset": start})
            self._finish(routing, message["sha"])
        elif kind == "beat":
            with self._lock:
                version, body = self._version, self._state
            if message["have"] == version:
                self._send(routing, "same", {"version": version})
            else:
                self._send(routing, "state", {"version": version, "body": body})
        elif kind == "hello":
            self._send(routing, "welcome", {"software": agent.__version__})
        elif kind == "parts":
            files = self._shelf.files(message["adapter"])
            self._send(routing, "files", {"adapter": message["adapter"], "files": files})
        elif kind == "read":
            data = self._shelf.read(message["adapter"], message["name"], message["offset"], message["size"])
            fields = {name: message[name] for name in ("adapter", "name", "offset")}
            self._send(routing, "data", fields, data)
        else:
            raise RatchetError("link.bad_message", "this kind is the learner's to send", where=kind)

    def _finish(self, routing: bytes, sha: str) -> None:
        """Have a complete file made durable, while the next one's pieces go on arriving."""
        if self._inbox.complete(sha):
            self._inbox.seal(sha)
            self._sealed.put((routing, sha))

    def _settle(self) -> None:
        """The second thread: forces files to the disk, one after the other, in the order of their completion."""
        while (job := self._sealed.get()) is not None:
            routing, sha = job
            error: RatchetError | None = None
            try:
                self._inbox.settle(sha)
            except RatchetError as caught:
                error = caught
            self._settled.append((routing, sha, error))
            with self._lock:
                self._ring(b"settled")

    def _acknowledge(self) -> None:
        while self._settled:
            routing, sha, error = self._settled.popleft()
            if error is None:
                self.counts.received += 1
                self._send(routing, "stored", {"sha": sha})
            else:
                self.counts.refused += 1
                log.warning("%s", error)
                self._refuse(routing, sha, error)

    def _refuse(self, routing: bytes, about: str, error: RatchetError) -> None:
        fields = {"about": about[:64], "code": error.code[:64], "what": error.what[:400], "fix": error.fix[:400]}
        self._send(routing, "refused", {**fields, "again": error.code in AGAIN})

    def _send(self, routing: bytes, kind: str, fields: Mapping[str, Any], payload: bytes | None = None) -> None:
        try:
            frames = [routing, *wire.encode(kind, fields, payload)]
            for out in [frames] if self._tamper is None else self._tamper(frames):
                self._router.send_multipart(out, zmq.DONTWAIT)
        except zmq.ZMQError:
            log.info("an answer was dropped: the robot is gone or takes nothing; it will ask again")
