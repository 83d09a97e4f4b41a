"""Every record of an episode passes through this ring while its other end may die: nothing may be torn, lost or twice.

Pinned: packets of any length come out as they went in, also where the memory's end cuts them; a full ring refuses and
keeps what it holds; room that is kept spare is spare; a reader goes on where another one ended; two processes that run
at their own pace agree on every byte. Deterministic: lengths and bytes come from seeds, and nothing waits but the last
test, for the other process, with a time limit.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from ratchet_vla.episodes.recorder import ring
from ratchet_vla.episodes.recorder.ring import HEADER, RingReader, RingWriter
from ratchet_vla.paths import REPOSITORY, python_path

PACKETS, SIZE, LIMIT = 50_000, 1 << 12, 60.0


@pytest.fixture(params=[False, True], autouse=True)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of either kind: what one that reorders does in addition must do no harm."""
    monkeypatch.setattr(ring, "REORDERS", request.param)


def ends(capacity: int) -> tuple[RingWriter, RingReader]:
    memory = memoryview(bytearray(HEADER + capacity))
    writer = RingWriter(memory)
    writer.clear()
    return writer, RingReader(memory)


@pytest.mark.parametrize("length", [0, 1, 3, 5, 27, 28])
def test_packets_come_out_as_they_went_in_wherever_the_memory_ends(length: int) -> None:
    writer, reader = ends(32)
    for number in range(100):
        data = bytes((number + i) % 256 for i in range(length))
        assert writer.append(data)
        assert reader.take() == data
        assert reader.take() is None


def test_a_full_ring_refuses_and_keeps_what_it_holds() -> None:
    writer, reader = ends(64)
    held = [bytes([n] * 12) for n in range(4)]
    assert [writer.append(data) for data in [*held, b""]] == [True, True, True, True, False]
    assert reader.take() == held[0]
    assert writer.append(b"as long as 1"), "what was taken is room again"
    assert [reader.take() for _ in range(5)] == [*held[1:], b"as long as 1", None]


def test_spare_room_is_for_those_who_may_use_it() -> None:
    writer, _ = ends(64)
    assert writer.append(bytes(28), spare=32)
    assert not writer.append(b"", spare=32)
    assert writer.append(bytes(28))


def test_a_reader_goes_on_where_another_one_ended() -> None:
    memory = memoryview(bytearray(HEADER + 64))
    writer = RingWriter(memory)
    writer.clear()
    for data in (b"one", b"two", b"three"):
        writer.append(data)
    assert RingReader(memory).take() == b"one"
    reader = RingReader(memory)
    assert reader.take() == b"two"
    assert RingWriter(memory).append(b"four"), "and so does a writer"
    assert [reader.take() for _ in range(3)] == [b"three", b"four", None]


def packet(rng: np.random.Generator) -> bytes:
    return rng.bytes(int(rng.integers(0, 700)))


def append_all(descriptor: int) -> None:
    """What the other process does."""
    writer = RingWriter(memoryview(mmap.mmap(descriptor, HEADER + SIZE)))
    rng = np.random.default_rng(7)
    for _ in range(PACKETS):
        data = packet(rng)
        while not writer.append(data):
            os.sched_yield()


def test_two_processes_agree_on_every_byte() -> None:
    descriptor = os.memfd_create("ring")
    os.ftruncate(descriptor, HEADER + SIZE)
    reader = RingReader(memoryview(mmap.mmap(descriptor, HEADER + SIZE)))
    code = f"from tests.agent.episodes.recorder.test_ring import append_all; append_all({descriptor})"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=[descriptor],
        env={**os.environ, "PYTHONPATH": python_path(REPOSITORY)},
    ) as other:
        try:
            rng = np.random.default_rng(7)
            limit = time.monotonic() + LIMIT
            for number in range(PACKETS):
                while (data := reader.take()) is None:
                    assert time.monotonic() < limit, f"{number} of {PACKETS} packets arrived"
                    os.sched_yield()
                assert data == packet(rng), f"packet {number}"
            assert other.wait(LIMIT) == 0
            assert reader.take() is None
        finally:
            other.kill()
    os.close(descriptor)
