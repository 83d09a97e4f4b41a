"""Link client, on the robot: empties the outbox, fetches missing adapters, follows the learner's state.

Knows messages, timers and what to ask again. Knows no model and no robot.
One thread owns the socket and sleeps until something arrives or is due. Whatever is lost is requested again; after a
restart it continues from what is on the disk. See docs/link.md for the states.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

import ratchet_vla
from ratchet_vla.errors import RatchetError
from ratchet_vla.link import sockets, wire
from ratchet_vla.link.keys import KeyPair
from ratchet_vla.link.robot.fetch import Fetcher
from ratchet_vla.link.robot.outbox import Outbox
from ratchet_vla.link.robot.upload import Uploads

__all__ = ["LinkClient", "LinkStatus"]

log = logging.getLogger("ratchet.link")
SILENCE = 5.0  # seconds without a word from the learner after which the link counts as down
_FAILED: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the learner does not let this key in",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed: is it the right learner's key, and is it a learner?",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the handshake failed: keys on one side only, or no learner at that address",
}


@dataclass
class LinkStatus:
    """State of the link.

    Attributes:
        heard: seconds since the learner's last message, inf before the first.
        error: why it is down, empty while unknown.
        waiting, waiting_bytes: files in the outbox.
    """

    up: bool
    heard: float
    error: str
    waiting: int
    waiting_bytes: int
    delivered: int
    refused: dict[str, int]
    fetching: list[str]
    version: str


class LinkClient:
    """Call `start`; `state`, `status` and `wait` from any thread; `stop` ends it and loses nothing.

    Args:
        robot: this robot's name; with keys, the one on the learner's allow list.
        learner: the learner's public key.
        fetcher: where adapters go; None fetches none.
        on_state: called with each new state of the learner, from the link's thread: return at once.
        beat: seconds between two reports.
        patience: seconds without progress after which something is asked again.
        tamper: for fault injection: maps the frames of a message to the messages that are sent in its place.
    """

    def __init__(
        self,
        address: str,
        robot: str,
        outbox: Outbox,
        *,
        keys: KeyPair | None = None,
        learner: bytes | None = None,
        fetcher: Fetcher | None = None,
        on_state: Callable[[dict[str, Any]], None] = lambda state: None,
        beat: float = 1.0,
        patience: float = 3.0,
        tamper: Callable[[list[Any]], list[list[Any]]] | None = None,
    ) -> None:
        if not wire.is_name(robot):
            raise RatchetError("link.bad_name", f"{robot!r} cannot be a robot's name", fix="letters, digits, . _ -")
        sockets.require_allowed(address, keys)
        self._address = address
        self._robot = robot
        self._keys = keys
        self._learner = learner
        self._outbox = outbox
        self._fetcher = fetcher
        self._on_state = on_state
        self._beat = beat
        self._tamper = tamper
        self._uploads = Uploads(outbox, robot, self._send, patience)
        if fetcher is not None:
            fetcher.connect(robot, self._send, patience)
        # Guards _state, _version, _report, _heard, _error and the bell, which any thread may ring; only the link's
        # thread touches the other sockets.
        self._changed = threading.Condition()
        self._state: dict[str, Any] = {}
        self._version = ""
        self._report: dict[str, Any] = {}
        self._heard = -float("inf")
        self._error = ""
        self._next_beat = 0.0
        self._thread: threading.Thread | None = None

    # -- any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._dealer = sockets.dial(self._context, self._address, self._keys, self._learner)
        monitored_events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        for failure_event in _FAILED:
            monitored_events |= failure_event
        self._monitor = self._dealer.get_monitor_socket(monitored_events)
        # A pair of in-process sockets wakes the thread out of its poll: a ZeroMQ socket may only be used by one
        # thread.
        self._wake = self._context.socket(zmq.PAIR)
        self._wake.bind("inproc://wake")
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.connect("inproc://wake")
        self._thread = threading.Thread(target=self._run, name="link-client", daemon=True)
        self._outbox.listeners.append(self.nudge)
        self._thread.start()

    def stop(self) -> None:
        """Close the socket; safe to call more than once. What waits stays in the outbox."""
        thread = self._thread
        self._thread = None
        if thread is None:
            return
        self._outbox.listeners.remove(self.nudge)
        with self._changed:
            self._bell.send(b"stop")
        thread.join()
        self._uploads.close()
        self._dealer.disable_monitor()
        for socket in (self._dealer, self._monitor, self._wake, self._bell):
            socket.close(0)
        self._context.term()

    @property
    def state(self) -> dict[str, Any]:
        """The learner's latest state that arrived here; empty before the first."""
        with self._changed:
            return self._state

    @property
    def version(self) -> str:
        """Of `state`; equal states have one version."""
        return self._version

    def report(self, table: Mapping[str, Any]) -> None:
        """Set what the next beats tell the learner of this robot: small plain data.

        Raises:
            RatchetError: link.bad_message.
        """
        wire.encode("beat", {"robot": self._robot, "have": "", "report": dict(table)})
        with self._changed:
            self._report = dict(table)

    def nudge(self) -> None:
        """Wake the link's thread, because there is something to do."""
        with self._changed:
            if self._thread is not None:
                self._bell.send(b"look")

    def want(self, adapters: Iterable[str]) -> None:
        """Fetch these adapters where they are not in the store yet."""
        if self._fetcher is not None:
            self._fetcher.want(adapters)
            self.nudge()

    def status(self) -> LinkStatus:
        with self._changed:
            silence_s = time.monotonic() - self._heard
            answer_counts = self._outbox.done
            return LinkStatus(
                up=silence_s < SILENCE,
                heard=silence_s,
                error="" if silence_s < SILENCE else self._error,
                waiting=len(self._outbox),
                waiting_bytes=self._outbox.size,
                delivered=answer_counts.pop("stored", 0),
                refused=answer_counts,
                fetching=self._fetcher.missing() if self._fetcher else [],
                version=self._version,
            )

    def wait(self, predicate: Callable[[], bool], timeout: float) -> bool:
        """Block until `predicate()` is true, evaluated after every change; False where `timeout` seconds pass first."""
        with self._changed:
            return self._changed.wait_for(predicate, timeout)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        for polled_socket in (self._dealer, self._wake, self._monitor):
            poller.register(polled_socket, zmq.POLLIN)
        while True:
            now_s = time.monotonic()
            # Rounded up to the next millisecond, so that the poll never returns just before the deadline and spins.
            due_s = self._work(now_s)
            ready_sockets = dict(poller.poll(int(max(0.0, due_s - time.monotonic()) * 1000) + 1))
            if self._wake in ready_sockets and self._wake.recv() == b"stop":
                return
            if self._monitor in ready_sockets:
                self._watch(recv_monitor_message(self._monitor)["event"])
            if self._dealer in ready_sockets:
                self._take([frame.buffer for frame in sockets.receive(self._dealer, keep=2)])

    def _work(self, now_s: float) -> float:
        """Send what is due; returns when to look again."""
        if now_s >= self._next_beat:
            with self._changed:
                beat_fields = {"robot": self._robot, "have": self._version, "report": self._report}
            self._send("beat", beat_fields)
            self._next_beat = now_s + self._beat
        due_times_s = [self._next_beat]
        try:
            due_times_s.append(self._uploads.work(now_s))
            if self._fetcher is not None:
                due_times_s.append(self._fetcher.work(now_s))
        except RatchetError as error:  # the disk: reported, and tried again with the next beat
            self._fail(str(error))
        return min(due_times_s)

    def _watch(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._fail("")
            self._send("hello", {"robot": self._robot, "software": ratchet_vla.__version__})
            self._next_beat = 0.0
            # A new connection may lead to a restarted learner, so nothing that was sent before counts.
            self._uploads.restart()
            if self._fetcher is not None:
                self._fetcher.restart()
        elif event in _FAILED:
            self._fail(_FAILED[event])
        elif self._error not in _FAILED.values():
            self._fail("the connection broke")

    def _take(self, frames: list[memoryview]) -> None:
        try:
            message = wire.decode(frames)
        except RatchetError as error:
            self._fail(str(error))
            return
        now_s = time.monotonic()
        with self._changed:
            self._heard = now_s
        try:
            self._handle(message, now_s)
        except RatchetError as error:  # a full disk, a damaged adapter: reported, and requested again later
            log.warning("%s", error)
            self._fail(str(error))
        except Exception as error:  # a callback of the application failed; the link must go on
            log.exception("unexpected")
            self._fail(f"{type(error).__name__}: {error}")
        with self._changed:
            self._changed.notify_all()

    def _handle(self, message: wire.Message, now_s: float) -> None:
        if message.kind == "state":
            self._follow(message)
        elif message.kind in ("need", "got", "stored"):
            self._uploads.take(message, now_s)
        elif message.kind in ("files", "data"):
            if self._fetcher is not None:
                self._fetcher.take(message, now_s)
        elif message.kind == "refused":
            log.warning("the learner refuses %s: [%s] %s", message["about"][:12], message["code"], message["what"])
            if not self._uploads.refused(message, now_s) and self._fetcher is not None:
                self._fetcher.refused(message, now_s)
            if message["about"] == "message":
                self._fail(f"[{message['code']}] {message['what']}")

    def _follow(self, message: wire.Message) -> None:
        new_state = message["body"]
        with self._changed:
            if message["version"] == self._version:
                return
            self._state = new_state
            self._version = message["version"]
        if self._fetcher is not None:
            self._fetcher.want(adapter_id for adapter_id in new_state.get("adapters", []) if wire.is_hash(adapter_id))
        self._on_state(new_state)

    def _fail(self, error: str) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _send(self, kind: str, message_fields: Mapping[str, Any], payload: bytes | None = None) -> bool:
        """False where it cannot be sent now: nobody is connected, or the learner is slower than this side."""
        message_frames = wire.encode(kind, message_fields, payload)
        try:
            for outgoing in [message_frames] if self._tamper is None else self._tamper(message_frames):
                self._dealer.send_multipart(outgoing, zmq.DONTWAIT, copy=payload is None)
        except zmq.Again:
            return False
        return True
