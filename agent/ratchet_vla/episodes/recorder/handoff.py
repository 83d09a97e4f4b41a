"""From the control process to the recorder process without waiting: frames in shared slots, records in a shared ring.

Knows bytes, slots and rings. Knows no episode. Handing over makes no system call: each would let go of the
interpreter's lock, and the loop's thread would wait for whichever other thread took it. What finds no room is refused,
and the caller counts it. All memory is fixed at the start. A socket between the two carries nothing that must arrive;
it tells each side that the other one died, and wakes a receiver that has nothing to do.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from ratchet_vla.episodes.recorder.ring import RingReader, RingWriter
from ratchet_vla.records import UInt8

ANSWERS_BYTES = 1 << 17  # bytes of what the receiver says that may wait for the sender
RECORDING_PAUSE_S = 0.01  # s between looks of a receiver that is recording
IDLE_PAUSE_S = 0.05  # s between looks of one that is not
# First byte of what the receiver sends back: a slot that is free again, or how it is doing.
SLOT_FREED = b"F"
STATUS_FOLLOWS = b"S"


@dataclass(frozen=True)
class Layout:
    """Where things lie in the shared memory.

    slot: bytes of the largest frame. count: slots. queue: bytes of records that may wait for the receiver.
    """

    slot: int
    count: int
    queue: int

    @property
    def rings(self) -> int:
        """Offset of the two rings, behind the slots."""
        return _up(self.slot * self.count, mmap.ALLOCATIONGRANULARITY)

    @property
    def answers(self) -> int:
        """Offset of the second ring, in which the receiver answers."""
        return self.rings + _up(self.queue, 64)

    @property
    def free(self) -> int:
        """Bytes of the second ring that only slots which are free again may use: enough for all of them."""
        return 16 * self.count

    @property
    def size(self) -> int:
        """Bytes of the whole shared memory."""
        return self.answers + _up(ANSWERS_BYTES + self.free, 64)


class Sender:
    """The control process's end. Any thread may call.

    reserved: slots that only frames of decisions may use. spare: bytes of the queue that only records that `must`
    arrive may use.
    """

    def __init__(self, layout: Layout, reserved: int, spare: int = 0) -> None:
        self.layout = layout
        self._reserved = reserved
        self._spare = spare
        self.memory_fd = os.memfd_create("ratchet-recorder")
        os.ftruncate(self.memory_fd, layout.size)
        self._memory = memoryview(mmap.mmap(self.memory_fd, layout.size))
        answers = self._memory[layout.answers :]
        self._records = RingWriter(self._memory[layout.rings : layout.answers])
        self._answers = RingReader(answers)
        self._packer = msgpack.Packer(buf_size=1 << 14)  # kept: a new one each time costs as much as all the rest
        self._free = deque(range(layout.count))
        self._lock = threading.Lock()  # each ring has one end at a time, but the loop and the drivers all hand over
        self._socket: socket.socket | None = None
        self._statuses: deque[dict[str, Any]] = deque()
        self._unread_count = 0

    def connect(self) -> socket.socket:
        """Open a new connection, after the receiver before has died.

        Returns the receiver's end, to be handed to its process and closed here.
        """
        sender_end, receiver_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        sender_end.setblocking(False)
        with self._lock:
            self._drop()
            self._records.clear()
            RingWriter(self._memory[self.layout.answers :]).clear()
            self._answers.begin()
            self._free = deque(range(self.layout.count))  # the receiver before died with its slots
            self._socket = sender_end
        return receiver_end

    @property
    def alive(self) -> bool:
        """Whether the receiver was there when `poll` looked last."""
        return self._socket is not None

    @property
    def slots_used(self) -> int:
        """How many slots hold a frame, or are being filled."""
        return self.layout.count - len(self._free)

    def take_slot(self, decision: bool) -> int | None:
        """A free slot, now the caller's; None where there is none."""
        with self._lock:
            self._drain()
            if self._socket is None or len(self._free) <= (0 if decision else self._reserved):
                return None
            return self._free.popleft()

    def fill(self, slot: int, image: UInt8, *, at_once: bool) -> None:
        """Copy an image into a slot that was taken. Holds no lock.

        at_once: nor does it let go of the interpreter's, as a copy by NumPy does: for a thread that is in more of a
        hurry than all others.
        """
        start = slot * self.layout.slot
        target = self._memory[start : start + image.size]
        if at_once and image.flags.c_contiguous:
            target[:] = image.reshape(-1).data
        else:
            np.copyto(np.frombuffer(target, np.uint8).reshape(image.shape), image)

    def give_back(self, slot: int) -> None:
        """Free a slot that was taken and not sent."""
        with self._lock:
            self._free.append(slot)

    def send(self, record: dict[str, Any], *, must: bool = False) -> bool:
        """Hand a record over, in the order of the calls; False where it found no room or nobody.

        From here on the receiver gets it, whatever becomes of this process.
        """
        with self._lock:
            if self._socket is None:
                return False
            return self._records.append(self._packer.pack(record), 0 if must else self._spare)

    def wake(self) -> None:
        """Have the receiver look now. A system call."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send(b"!")

    def poll(self) -> list[dict[str, Any]]:
        """Look whether the receiver is there, and take what it said since the last call. A system call."""
        receiver_gone = self._receiver_gone()
        with self._lock:
            self._drain()  # also what it said before it died
            if receiver_gone:
                self._drop()
            statuses = list(self._statuses)
            self._statuses.clear()
            return statuses

    def take_unread(self) -> int:
        """Records that receivers had not read when they died, since the last call."""
        with self._lock:
            unread_count = self._unread_count
            self._unread_count = 0
            return unread_count

    def close(self) -> None:
        """Drop the connection and the memory; safe to call more than once."""
        with self._lock:
            self._drop()
            if self.memory_fd >= 0:
                os.close(self.memory_fd)  # the mapping goes with the last view of it
                self.memory_fd = -1

    # -- inside -------------------------------------------------------------------------------------------------

    def _receiver_gone(self) -> bool:
        connection = self._socket
        if connection is None:
            return False
        try:
            return not connection.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _drain(self) -> None:
        """With the lock held."""
        while (packet := self._answers.take()) is not None:
            if packet[:1] == SLOT_FREED:
                self._free.extend(struct.unpack("<I", packet[1:]))
            else:
                self._statuses.append(msgpack.unpackb(packet[1:]))

    def _drop(self) -> None:
        """With the lock held."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            unread_records = RingReader(self._memory[self.layout.rings : self.layout.answers])
            while unread_records.take() is not None:
                self._unread_count += 1


class Receiver:
    """The recorder process's end; one thread. memory_fd: the sender's; closed here."""

    def __init__(self, end: socket.socket, memory_fd: int, layout: Layout) -> None:
        self._socket = end
        self._layout = layout
        self._frames = mmap.mmap(memory_fd, layout.rings, prot=mmap.PROT_READ)
        rings = memoryview(mmap.mmap(memory_fd, layout.size - layout.rings, offset=layout.rings))
        os.close(memory_fd)
        border = layout.answers - layout.rings
        self._records = RingReader(rings[:border])
        self._answers = RingWriter(rings[border:])
        self._sender_gone = False
        self.ended = False

    def receive(self, timeout: float, *, recording: bool) -> dict[str, Any] | None:
        """The next record, waiting up to `timeout` seconds; None where none came, or `ended` where none will.

        recording: the sender hands over without waking, so it is looked for more often.
        """
        packet = self._records.take()
        if packet is None:
            self._pause(min(max(timeout, 1e-3), RECORDING_PAUSE_S if recording else IDLE_PAUSE_S), asleep=recording)
            packet = self._records.take()  # after the look at the sender: nothing comes after its end
        if packet is None:
            self.ended = self._sender_gone
            return None
        record: dict[str, Any] = msgpack.unpackb(packet)
        return record

    def image(self, slot: int, shape: list[int]) -> UInt8:
        """The frame in a slot; valid until it is released."""
        size_bytes = int(np.prod(shape))
        return np.frombuffer(self._frames, np.uint8, size_bytes, slot * self._layout.slot).reshape(shape)

    def release(self, slot: int) -> None:
        """The slot is free again."""
        self._answers.append(SLOT_FREED + struct.pack("<I", slot))

    def say(self, status: dict[str, Any], *, must: bool = False) -> None:
        """Report a status without waiting: where the sender has not listened for long, it is left out.

        must: use the last of the room, which the next `poll` empties.
        """
        self._answers.append(
            STATUS_FOLLOWS + msgpack.packb(status), self._layout.free + (0 if must else ANSWERS_BYTES // 2)
        )

    def _pause(self, seconds: float, *, asleep: bool) -> None:
        """Let time pass, and look whether the sender is still there. asleep: it wakes nobody."""
        if self._sender_gone:
            return
        if asleep:
            time.sleep(seconds)
            seconds = 0.0
        self._socket.settimeout(seconds)
        try:
            self._sender_gone = not self._socket.recv(16)
        except (BlockingIOError, TimeoutError):
            return
        except OSError:
            self._sender_gone = True


def _up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step
