"""A ring of packets in shared memory: one process appends, another takes, and neither makes a system call.

So nobody waits: not for the other side, not for a core, and in Python not for the interpreter's lock, which every
system call lets go of. Knows bytes and counters. What was appended outlives the process that appended it.

Each counter has one writer, and a packet is counted once it is there. A control loop appends once in 50 ms, with cold
caches, where every line of Python costs a microsecond or more: `append` has as few as it can.
"""

from __future__ import annotations

import platform
import struct
import threading

HEADER = 128  # bytes: what the appending side counts, and 64 bytes on (another cache line) what the taking side counts
# words of 8 bytes in the header: bytes since the start
APPENDED = 0
TAKEN = 8
LENGTH = struct.Struct("<I")
REORDERS = platform.machine() not in ("x86_64", "AMD64")  # whether others may see a processor's stores in another order


class Ring:
    """What both ends share. memory: the header and the packets, writable; nothing else may use it."""

    def __init__(self, memory: memoryview) -> None:
        self._counts = memory[:HEADER].cast("Q")
        self._packets = memory[HEADER:]
        self.capacity = len(self._packets)
        self._order = threading.Lock()
        self._order.acquire()

    def _fence(self) -> None:
        """Make the other side see everything before it before anything after it: a release, then an acquire.

        For processors that reorder.
        """
        self._order.release()
        self._order.acquire()


class RingWriter(Ring):
    """The appending end; one thread at a time. It goes on where the counters say."""

    def __init__(self, memory: memoryview) -> None:
        super().__init__(memory)
        self._appended = self._counts[APPENDED]

    def clear(self) -> None:
        """Empty, and every page of it in memory. Only while there is no other end."""
        self._packets[:] = bytes(self.capacity)
        self._counts[:] = memoryview(bytes(HEADER)).cast("Q")
        self._appended = 0

    def append(self, data: bytes, spare: int = 0) -> bool:
        """False where there is no room for it beside `spare` bytes."""
        packet = LENGTH.pack(len(data)) + data
        appended = self._appended + len(packet)
        if appended - self._counts[TAKEN] > self.capacity - spare:
            return False
        start_offset = self._appended % self.capacity
        end_offset = start_offset + len(packet)
        if end_offset <= self.capacity:
            self._packets[start_offset:end_offset] = packet
        else:
            self._packets[start_offset:] = packet[: self.capacity - start_offset]
            self._packets[: end_offset - self.capacity] = packet[self.capacity - start_offset :]
        if REORDERS:
            self._fence()
        self._appended = self._counts[APPENDED] = appended
        return True


class RingReader(Ring):
    """The taking end; one thread at a time. It begins where the one before it ended."""

    def __init__(self, memory: memoryview) -> None:
        super().__init__(memory)
        self.begin()

    def begin(self) -> None:
        """At the counter's word, after the writer's `clear`."""
        self._taken = self._counts[TAKEN]

    def take(self) -> bytes | None:
        """The oldest packet, or None."""
        if self._taken == self._counts[APPENDED]:
            return None
        if REORDERS:
            self._fence()
        (length,) = LENGTH.unpack(self._bytes_at(self._taken, LENGTH.size))
        data = self._bytes_at(self._taken + LENGTH.size, length)
        self._taken += LENGTH.size + length
        if REORDERS:
            self._fence()
        self._counts[TAKEN] = self._taken
        return data

    def _bytes_at(self, position: int, length: int) -> bytes:
        start_offset = position % self.capacity
        up_to_end = bytes(self._packets[start_offset : start_offset + length])
        return up_to_end + bytes(self._packets[: length - len(up_to_end)])
