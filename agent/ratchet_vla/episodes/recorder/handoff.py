"""From the control process to the recorder process without waiting: frames in shared slots, records as packets.

Knows bytes, slots and sockets. Knows no episode. Every call returns at once; what finds no room is refused, and the
caller counts it. Memory is bounded: the slots, the kernel's socket buffer, and a queue of records of a fixed size.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import threading
import time
from collections import deque
from typing import Any

import msgpack
import numpy as np

from ratchet_vla.records import UInt8

SOCKET_BYTES = 4 << 20
NAP = 0.01  # s between looks of a receiver that sleeps beside its socket
FREE, STATUS = b"F", b"S"  # what the receiver sends back: slots, and how it is doing


class Sender:
    """The control process's end. Any thread may call.

    slot: bytes of the largest frame. count: slots. queue: bytes of records that may wait here for the socket.
    reserved: slots that only frames of decisions may use.
    """

    def __init__(self, slot: int, count: int, queue: int, reserved: int) -> None:
        self.slot, self.count, self._reserved = slot, count, reserved
        self.memory_fd = os.memfd_create("ratchet-recorder")
        os.ftruncate(self.memory_fd, slot * count)
        self._memory = mmap.mmap(self.memory_fd, slot * count)
        self._free = deque(range(count))
        self._queue: deque[bytes] = deque()
        self._queued, self._limit = 0, queue
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._status: dict[str, Any] = {}
        self._told: deque[dict[str, Any]] = deque()

    def connect(self) -> socket.socket:
        """A new connection; returns the receiver's end, to be handed to its process and closed here."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mine.setblocking(False)
        for end in (mine, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = mine
            # The receiver before died with its slots; what waited was meant for it.
            self._free = deque(range(self.count))
            self._queue.clear()
            self._queued = 0
        return theirs

    @property
    def alive(self) -> bool:
        return self._socket is not None

    @property
    def slots_used(self) -> int:
        return self.count - len(self._free)

    def take_slot(self, decision: bool) -> int | None:
        """A free slot, now the caller's; None where there is none."""
        with self._lock:
            self._drain()
            if self._socket is None or len(self._free) <= (0 if decision else self._reserved):
                return None
            return self._free.popleft()

    def fill(self, slot: int, image: UInt8) -> None:
        """Copy an image into a slot that was taken. Holds no lock."""
        target = np.frombuffer(self._memory, np.uint8, image.size, slot * self.slot)
        np.copyto(target.reshape(image.shape), image)

    def give_back(self, slot: int) -> None:
        with self._lock:
            self._free.append(slot)

    def send(self, record: dict[str, Any], *, must: bool = False) -> bool:
        """Hand a record over, in the order of the calls; False where it found no room. must: waits in any case."""
        data = msgpack.packb(record)
        with self._lock:
            if self._socket is None:
                return False
            if not must and self._queued + len(data) > self._limit:
                return False
            self._queue.append(data)
            self._queued += len(data)
            self._push()
            return self._socket is not None

    def poll(self) -> list[dict[str, Any]]:
        """Push what waits, and take what the receiver said since the last call."""
        with self._lock:
            self._drain()
            self._push()
            told = list(self._told)
            self._told.clear()
            return told

    def shutdown(self) -> None:
        """No more records will come; what the receiver still says can be polled."""
        with self._lock:
            if self._socket is not None:
                try:
                    self._socket.shutdown(socket.SHUT_WR)
                except OSError:
                    self._drop()

    def close(self) -> None:
        with self._lock:
            self._drop()
        self._memory.close()
        os.close(self.memory_fd)

    # -- inside, with the lock held -----------------------------------------------------------------------------

    def _push(self) -> None:
        while self._queue and self._socket is not None:
            try:
                self._socket.send(self._queue[0])
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return
                self._drop()
                return
            self._queued -= len(self._queue.popleft())

    def _drain(self) -> None:
        while self._socket is not None:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop()
                return
            if data[:1] == FREE:
                self._free.extend(struct.unpack(f"<{(len(data) - 1) // 4}I", data[1:]))
            else:
                self._told.append(msgpack.unpackb(data[1:]))

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._queue.clear()
        self._queued = 0


class Receiver:
    """The recorder process's end; one thread."""

    def __init__(self, end: socket.socket, memory_fd: int, slot: int, count: int) -> None:
        self._socket, self._slot = end, slot
        self._memory = mmap.mmap(memory_fd, slot * count, prot=mmap.PROT_READ)
        os.close(memory_fd)
        self._done: list[int] = []
        self.ended = False

    def receive(self, timeout: float, *, asleep: bool) -> dict[str, Any] | None:
        """The next record, waiting up to `timeout` seconds; None where none came, or `ended` where none will.

        asleep: sleep beside the socket, not on it: waking a sleeper costs the sender several times what sending does.
        """
        self.flush()
        try:
            self._socket.setblocking(False)
            try:
                data = self._packet()
            except BlockingIOError:
                if asleep:
                    time.sleep(min(max(timeout, 1e-3), NAP))
                else:
                    self._socket.settimeout(max(timeout, 1e-3))
                data = self._packet()
        except (BlockingIOError, TimeoutError):
            return None
        except OSError:
            data = b""
        if not data:
            self.ended = True
            return None
        record: dict[str, Any] = msgpack.unpackb(data)
        return record

    def _packet(self) -> bytes:
        """The next packet; empty where the sender is gone. Raises as sockets do."""
        try:
            return self._socket.recv(1 << 22)
        except ConnectionResetError:
            # It died before it read all that it was told. That is said once, ahead of what it sent until then.
            return self._socket.recv(1 << 22)

    def image(self, slot: int, shape: list[int]) -> UInt8:
        """The frame in a slot; valid until it is released."""
        size = int(np.prod(shape))
        return np.frombuffer(self._memory, np.uint8, size, slot * self._slot).reshape(shape)

    def release(self, slot: int) -> None:
        self._done.append(slot)
        if len(self._done) >= 4:
            self.flush()

    def flush(self) -> None:
        """Tell the sender which slots are free again."""
        if self._done:
            self._tell(FREE + struct.pack(f"<{len(self._done)}I", *self._done))
            self._done.clear()

    def say(self, status: dict[str, Any]) -> None:
        self._tell(STATUS + msgpack.packb(status))

    def _tell(self, data: bytes) -> None:
        self._socket.settimeout(1.0)
        try:
            self._socket.send(data)
        except OSError:
            self.ended = self.ended or not isinstance(self._socket, socket.socket)
