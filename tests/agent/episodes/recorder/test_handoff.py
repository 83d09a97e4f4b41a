"""What a control loop hands over must cost it no waiting, and must arrive although the loop's process dies.

Pinned: handing over never lets go of the interpreter's lock, which another thread would keep from the loop; what was
handed over before a death is read to its end; freed slots always find their way back; a sender that listens to nobody
stops no receiver. Deterministic: both ends live in this process, and who holds the interpreter is decided by a switch
interval longer than the test.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from ratchet_vla.episodes.recorder.client import Recorder, RecorderConfig
from ratchet_vla.episodes.recorder.handoff import Layout, Receiver, Sender
from ratchet_vla.records import Mark, SafetyEvent
from ratchet_vla.runtime.control.sink import ChunkOutcome
from tests.agent.episodes.samples import chunk, observation, small_contract, tick

LAYOUT = Layout(slot=64, count=4, queue=1 << 16)
CONTRACT = small_contract(64)


class Ends(NamedTuple):
    sender: Sender
    receiver: Receiver


@pytest.fixture
def ends() -> Iterator[Ends]:
    sender = Sender(LAYOUT, reserved=0)
    theirs = sender.connect()
    yield Ends(sender, Receiver(theirs, os.dup(sender.memory_fd), LAYOUT))
    theirs.close()
    sender.close()


class Rival:
    """A thread that takes the interpreter as soon as somebody lets go of it, and tells."""

    def __init__(self) -> None:
        self.ran = False
        self._gate = threading.Lock()
        self._gate.acquire()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._gate.acquire()
        self.ran = True

    def let_in(self) -> None:
        """From here on it waits for the interpreter, which the caller keeps."""
        self._gate.release()
        woken = time.perf_counter() + 0.05
        while time.perf_counter() < woken:
            pass

    def join(self) -> None:
        self._thread.join()


def lets_go(call: Callable[[], None], times: int) -> bool:
    """Whether another thread got the interpreter during one of so many calls."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    rival = Rival()
    try:
        rival.let_in()
        for _ in range(times):
            call()
            if rival.ran:
                return True
        return False
    finally:
        rival.join()
        sys.setswitchinterval(interval)


def test_an_episode_is_handed_over_without_letting_go_of_the_interpreter(tmp_path: Path) -> None:
    """In the loop's thread, with new frames in every decision: those are copied there."""
    rng = np.random.default_rng(0)
    seen = [observation(CONTRACT, rng, i, i * 0.2) for i in range(5)]
    chunks = [chunk(CONTRACT, rng, o) for o in seen]
    ticks = [tick(CONTRACT, rng, i) for i in range(20)]
    event = SafetyEvent(0.1, "safety.velocity", "m/s", "x", 2.0, 1.0)
    with Recorder(tmp_path, CONTRACT, RecorderConfig(memory_mb=2, min_free_gb=0.0)) as recorder:
        recorder.begin("bowl", "go", 0.0)

        def loop() -> None:
            for i, decision in enumerate(seen):
                recorder.observation(decision)
                recorder.chunk(chunks[i])
                for done in ticks[4 * i : 4 * i + 4]:
                    recorder.tick(done, done.index)
                recorder.event(event)
                recorder.outcome(ChunkOutcome(i, "ab", np.full(4, int(Mark.NONE))))

        assert not lets_go(loop, times=4)
        assert lets_go(recorder._sender.wake, times=1_000_000), "a system call does"
        recorder.end("horizon", None, "", 1.0)
        recorder.wait_ended(30.0)
        assert recorder.status().dropped == {}


def test_what_was_handed_over_before_a_death_is_read_to_its_end(ends: Ends) -> None:
    ends.receiver.say({"state": "recording"})  # nobody polls it
    for number in range(5):
        assert ends.sender.send({"kind": "tick", "index": number})
    ends.sender.close()
    read = []
    while not ends.receiver.ended:
        record = ends.receiver.receive(0.1, recording=False)
        read += [record["index"]] if record is not None else []
    assert read == [0, 1, 2, 3, 4]


def test_what_the_receiver_said_before_a_death_is_heard(ends: Ends) -> None:
    ends.sender.send({"kind": "tick"})
    ends.sender.send({"kind": "tick"})
    ends.receiver.receive(0.1, recording=False)
    ends.receiver.say({"number": 1}, must=True)
    ends.receiver._socket.close()
    assert ends.sender.poll() == [{"number": 1}]
    assert not ends.sender.alive
    assert (ends.sender.take_unread(), ends.sender.take_unread()) == (1, 0)
    assert not ends.sender.send({"kind": "tick"})


def test_slots_come_back_however_much_was_said(ends: Ends) -> None:
    """The sender may not listen for hours; what it is told then has an end, frames and endings of episodes do not."""
    taken = [ends.sender.take_slot(True) for _ in range(LAYOUT.count)]
    assert ends.sender.take_slot(True) is None
    for _ in range(10_000):
        ends.receiver.say({"state": "recording", "error": "x" * 100})
    ends.receiver.say({"number": 1}, must=True)
    for slot in taken:
        assert slot is not None
        ends.receiver.release(slot)
    assert sorted(str(ends.sender.take_slot(True)) for _ in taken) == ["0", "1", "2", "3"]
    said = ends.sender.poll()
    assert said[-1] == {"number": 1}
    assert 100 < len(said) < 10_000


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_frames_lie_in_their_slots(ends: Ends, *, at_once: bool, strided: bool) -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    image = image[:, ::-1] if strided else image
    slot = ends.sender.take_slot(True)
    assert slot is not None
    ends.sender.fill(slot, image, at_once=at_once)
    assert (ends.receiver.image(slot, [4, 4, 3]) == image).all()
