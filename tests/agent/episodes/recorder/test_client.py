"""A recorder that makes a control loop wait is a danger; one that loses an afternoon is useless. It may do neither.

Pinned: what a real control loop emits comes back as its steps; frames shared with the drivers are stored once; a frozen
recorder process costs counted drops and no waiting; a killed one loses nothing that was flushed and is started again;
a dead control process leaves a finished file; the watermark ends recording cleanly. Deterministic: faults are signals
sent to processes whose pace the test does not depend on, waits are for messages, with a time limit.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from mcap.reader import make_reader

from ratchet_vla.episodes.file.reader import EpisodeReader
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.episodes.recorder import client as recorder_side
from ratchet_vla.episodes.recorder import process as recorder_process
from ratchet_vla.episodes.recorder.client import Recorder, RecorderConfig
from ratchet_vla.episodes.recorder.handoff import Receiver
from ratchet_vla.episodes.recorder.process import RecorderProcess
from ratchet_vla.errors import RatchetError
from ratchet_vla.paths import REPOSITORY, python_path
from ratchet_vla.records import Applied, Mark, Observation
from ratchet_vla.runtime.clock import ManualClock
from ratchet_vla.runtime.control.chunks import CollectExecutor
from ratchet_vla.runtime.control.labelling import SceneLabeller
from ratchet_vla.runtime.control.loop import ControlLoop
from ratchet_vla.runtime.control.sink import ChunkOutcome, MemorySink, TickSink
from ratchet_vla.runtime.inference.source import Ahead, Reply
from ratchet_vla.runtime.safety.filter import SafetyFilter
from ratchet_vla.storage.growing import GrowingFile
from ratchet_vla.testing.fake_arm import FakeArm
from tests.agent.episodes.samples import chunk, observation, random_image, same, small_contract, tick

CONTRACT = small_contract(16)
WAIT = 30.0


class InThread(Recorder):
    """Its recorder process is a thread of the test: nothing to start, and its disk can be played."""

    def _start(self) -> None:
        end = self._sender.connect()
        memory = os.dup(self._sender.memory_fd)
        receiver = Receiver(socket.socket(fileno=end.detach()), memory, self._sender.layout)
        thread = threading.Thread(target=RecorderProcess(receiver, self.root, self.config).run)
        thread.start()

        class Process:
            pid = 0

            def poll(self) -> int | None:
                return None if thread.is_alive() else 0

            def kill(self) -> None:
                thread.join(WAIT)

        self._process = Process()  # type: ignore[assignment]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Recorder]]:
    made: list[Recorder] = []

    def start(
        kind: type[Recorder] = InThread,
        contract: Any = CONTRACT,
        *,
        command_filter: bool = False,
        wire: dict[str, tuple[str, str]] | None = None,
        **config: Any,
    ) -> Recorder:
        given = {"memory_mb": 2, "min_free_gb": 0.0, **config}
        settings = RecorderConfig(**given)
        made.append(kind(tmp_path, contract, settings, session="s", command_filter=command_filter, wire=wire))
        return made[-1]

    yield start
    for recorder in made:
        recorder.close()


def record(recorder: Recorder, seed: int = 0, decisions: int = 3) -> list[Observation]:
    """One episode, handed over without waiting."""
    rng = np.random.default_rng(seed)
    seen = []
    recorder.begin("bowl", "put the bowl away", 0.0)
    for i in range(decisions):
        seen.append(observation(CONTRACT, rng, i, i * 0.2))
        recorder.observation(seen[-1])
        recorder.chunk(chunk(CONTRACT, rng, seen[-1]))
        for j in range(4):
            recorder.tick(tick(CONTRACT, rng, 4 * i + j))
        recorder.outcome(ChunkOutcome(i, "ab", np.array([0, 1, 0, 0])))
    recorder.end("success", True, "simulator", 1.0)
    return seen


class ScriptedSource:
    """A chunk source without a policy: answers at once with small random actions."""

    ready = True

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._answers: list[Reply] = []

    def request(self, observation: Observation, ahead: Ahead | None = None) -> None:
        answer = chunk(CONTRACT, self._rng, observation)
        if observation.sequence % 2:  # as a flow policy answers
            chain = self._rng.normal(size=(5, 6, 8)).astype(np.float32)
            answer = dataclasses.replace(answer, tokens=chain)
        self._answers.append(answer)

    def poll(self) -> list[Reply]:
        answers, self._answers = self._answers, []
        return answers

    def wait(self, timeout: float) -> list[Reply]:
        return self.poll()

    def forget(self) -> None:
        self._answers.clear()


class Both:
    """Passes everything to two sinks."""

    def __init__(self, *sinks: TickSink) -> None:
        self.sinks = sinks

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> None:
            for sink in self.sinks:
                getattr(sink, name)(*given)

        return call


def test_what_a_control_loop_does_comes_back(tmp_path: Path, started: Callable[..., Recorder]) -> None:
    recorder, memory = started(), MemorySink()
    assert isinstance(recorder, TickSink)
    clock = ManualClock()
    arm = FakeArm(CONTRACT, clock)
    arm.connect()
    safety = SafetyFilter(CONTRACT)
    loop = ControlLoop(
        arm,
        ScriptedSource(),
        safety,
        CollectExecutor(CONTRACT),
        sink=Both(memory, recorder),
        clock=clock,
        lock_step=True,
    )
    recorder.describe(adapter_id="ab" * 32, mode="collect", seed=5, meta={"why": "test"})
    loop.run_episode("bowl", "move", horizon=18, labeller=SceneLabeller(lambda: False))
    digest = recorder.wait_ended(WAIT)
    store = EpisodeStore(tmp_path)
    read = store.read(digest)
    assert same(read.ticks, memory.ticks)
    assert same(read.events, memory.events)
    assert same([s.chunk for s in read.steps], memory.chunks)
    assert same([s.observation for s in read.steps], memory.observations)
    executed = {o.sequence: o.marks == 0 for o in memory.outcomes}
    for step in read.steps:
        assert same(step.executed, executed[step.observation.sequence])
    assert [s.done for s in read.steps] == [False] * (len(read.steps) - 1) + [True]
    assert (read.success, read.seed, read.adapter_id, read.meta) == (False, 5, "ab" * 32, {"why": "test"})
    assert store.card(digest).mode == "collect"
    assert recorder.status().dropped == {}


def test_success_rewards_the_last_step_only(tmp_path: Path, started: Callable[..., Recorder]) -> None:
    recorder = started()
    record(recorder)
    digest = recorder.wait_ended(WAIT)
    steps = EpisodeStore(tmp_path).read(digest).steps
    assert [(s.reward, s.done, s.steps_run) for s in steps] == [(0.0, False, 4), (0.0, False, 4), (1.0, True, 4)]
    assert steps[0].executed.tolist() == [True, False, True, True]


@pytest.mark.parametrize("decisions", ["raw", None])
def test_shared_frames_are_found_again(tmp_path: Path, started: Callable[..., Recorder], decisions: Any) -> None:
    recorder = started(stream="png", decisions=decisions)
    rng = np.random.default_rng(0)
    recorder.frame("wrist", random_image(CONTRACT, "wrist", rng), 0.0)  # nobody records yet
    recorder.begin("bowl", "go", 0.0)
    frames = []
    for i in range(8):
        frames.append({c.name: random_image(CONTRACT, c.name, rng) for c in CONTRACT.cameras})
        for name, image in frames[-1].items():
            recorder.frame(name, image, i / 30)
    seen = observation(CONTRACT, rng, 0, 0.2)
    shared = Observation(frames[5], seen.state, seen.instruction, seen.stamp, 0)
    recorder.observation(shared)
    recorder.chunk(chunk(CONTRACT, rng, shared))
    recorder.end("horizon", None, "", 1.0)
    digest = recorder.wait_ended(WAIT)
    reader = EpisodeStore(tmp_path).open(digest)
    stream = [image for _, image in reader.frames("wrist")]
    assert same(stream, [f["wrist"] for f in frames])
    stamps = [stamp for stamp, _ in reader.frames("wrist")]
    assert stamps == pytest.approx([i / 30 for i in range(8)], abs=1e-6)
    assert same(reader.episode().steps[0].observation, shared)
    ending = reader.ending()
    assert ending is not None
    groups = 2 if decisions else 1
    assert sorted(ending.frames.values()) == sorted([8, 8] + [1, 1] * (groups - 1))


def test_a_command_filter_has_the_last_word(tmp_path: Path, started: Callable[..., Recorder]) -> None:
    """What it clipped or never passed on was not executed as sampled, whenever its word comes; silence is none."""
    recorder = started(command_filter=True)
    rng = np.random.default_rng(0)
    recorder.describe(name="s-0001")
    recorder.begin("bowl", "go", 0.0)
    ticks = []
    for i in range(3):
        seen = observation(CONTRACT, rng, i, i * 0.2)
        recorder.observation(seen)
        recorder.chunk(chunk(CONTRACT, rng, seen))
        for j in range(4):
            ticks.append(tick(CONTRACT, rng, 4 * i + j))
            recorder.tick(ticks[-1], 100 + 4 * i + j)
            if i == 1:  # each at once; of the first chunk all but one, of the third some, later
                recorder.applied(Applied(104 + j, ticks[-1].command, Mark.NONE))
            elif i == 0 and j != 1:
                clipped = np.zeros(7, np.float32)
                recorder.applied(Applied(100 + j, clipped if j == 0 else ticks[-1].command, Mark(j == 0)))
        recorder.outcome(ChunkOutcome(i, "ab", np.zeros(4, np.int64)))
    for j in (0, 1, 3):
        recorder.applied(Applied(108 + j, None if j == 1 else ticks[8 + j].command, Mark.HELD if j == 1 else Mark.NONE))
    recorder.end("horizon", False, "simulator", 1.0)
    digest = recorder.wait_ended(WAIT)
    store = EpisodeStore(tmp_path)
    assert store.resolve("s-0001") == digest
    read = store.read(digest)
    told = [t.applied_marks for t in read.ticks]
    assert told == [Mark.CLIPPED, Mark.SKIPPED, *[Mark.NONE] * 7, Mark.HELD, Mark.SKIPPED, Mark.NONE]
    assert [s.executed.tolist() for s in read.steps] == [
        [False, False, True, True],
        [True, True, True, True],
        [True, False, False, True],
    ]
    assert read.ticks[0].reached is not None
    assert not read.ticks[0].reached.any()
    assert [t.reached is None for t in read.ticks].count(True) == 3
    assert same([t.command for t in read.ticks], [t.command for t in ticks])
    assert store.card(digest).dropped == 2


def test_topics_lie_beside_the_records_as_they_were_on_the_wire(
    tmp_path: Path, started: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_side, "INLINE_BYTES", 1000)
    channel = ("std_msgs/msg/UInt8MultiArray", "uint8[] data\n")
    recorder = started(wire={"/small": channel, "/large": channel}, memory_mb=1)
    small, large = bytes(13), os.urandom(4096)
    recorder.wire("/small", small, 1)  # nobody records yet
    recorder.begin("bowl", "go", 0.0)
    seen = observation(CONTRACT, np.random.default_rng(0), 0, 0.0)
    recorder.observation(seen)
    for n in range(3):
        recorder.wire("/small", small, 10 + n)
        recorder.wire("/large", large, 20 + n)
    recorder.wire("/large", bytes(1 << 20), 30)  # larger than any image of this robot
    recorder.end("horizon", None, "", 1.0)
    digest = recorder.wait_ended(WAIT)
    card = EpisodeStore(tmp_path).card(digest)
    assert card.dropped == 1
    reader = EpisodeReader(tmp_path / card.file)
    assert reader.info.wire == ["/large", "/small"]
    with (tmp_path / card.file).open("rb") as file:
        found = [(c.topic, m.log_time, m.data) for _, c, m in make_reader(file).iter_messages(["/small", "/large"])]
    assert sorted(found) == [
        *(("/large", 20 + n, large) for n in range(3)),
        *(("/small", 10 + n, small) for n in range(3)),
    ]
    assert reader.episode().steps == []  # whoever reads the records does not meet the others


class Stopped(NamedTuple):
    """A recorder whose process stands still, as on a disk that does not answer."""

    recorder: Recorder
    go_on: Callable[[], None]


@pytest.fixture
def stopped(started: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch) -> Stopped:
    monkeypatch.setattr(recorder_side, "QUEUE_BYTES", 1 << 17)
    monkeypatch.setattr(recorder_side, "SPARE_BYTES", 1 << 16)
    recorder = started(Recorder, small_contract(256), memory_mb=2, stream="jpeg", decisions=None)
    assert recorder._process is not None
    pid = recorder._process.pid
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    return Stopped(recorder, lambda: os.kill(pid, signal.SIGCONT))


def test_a_frozen_disk_costs_counted_frames_and_no_waiting(tmp_path: Path, stopped: Stopped) -> None:
    recorder, contract = stopped.recorder, small_contract(256)
    rng = np.random.default_rng(0)
    image = random_image(contract, "wrist", rng)
    recorder.begin("bowl", "go", 0.0)
    for i in range(40):
        recorder.frame("wrist", image, i / 30)
        recorder.tick(tick(contract, rng, i))
    status = recorder.status()
    lost = status.dropped["frames: wrist"]
    assert 0 < lost < 40
    assert status.waiting > 0.8
    recorder.end("horizon", None, "", 2.0)
    stopped.go_on()
    digest = recorder.wait_ended(WAIT)
    card = EpisodeStore(tmp_path).card(digest)
    assert (card.ticks, recorder.status().waiting) == (40, 0.0), "records wait where frames do not fit"
    ending = EpisodeReader(tmp_path / card.file).ending()
    assert ending is not None
    assert sum(ending.frames.values()) == 40 - lost
    assert ending.dropped == {"frames: wrist": lost}


def test_records_are_bounded_too(tmp_path: Path, stopped: Stopped) -> None:
    recorder, contract = stopped.recorder, small_contract(256)
    rng = np.random.default_rng(0)
    recorder.begin("bowl", "go", 0.0)
    handed_over = 0
    while not recorder._dropped:
        recorder.tick(tick(contract, rng, handed_over))
        handed_over += 1
    assert recorder.status().dropped == {"records: tick": 1}
    recorder.end("horizon", None, "", 2.0)
    stopped.go_on()
    digest = recorder.wait_ended(WAIT)
    assert EpisodeStore(tmp_path).card(digest).ticks == handed_over - 1, "an ending has room that ticks do not"


def test_an_episode_whose_beginning_found_no_room_is_not_taken_for_a_part_of_another(
    tmp_path: Path, stopped: Stopped
) -> None:
    recorder, contract = stopped.recorder, small_contract(256)
    for number in range(1000):
        recorder.describe(name=f"s-{number:04d}")
        recorder.begin("bowl", "go", 0.0)
        if not recorder._recording:
            break
        recorder.end("horizon", None, "", 1.0)
    recorder.tick(tick(contract, np.random.default_rng(0), 0))
    recorder.end("horizon", None, "", 1.0)
    with pytest.raises(RatchetError, match=r"recorder\.lost.*did not keep up"):
        recorder.wait_ended(WAIT)
    assert recorder.status().dropped["records: begin"] == 1
    stopped.go_on()
    wait_for(lambda: len(recorder.status().finished) == number)
    assert {card.ticks for card in EpisodeStore(tmp_path).cards().values()} == {0}


def test_a_killed_recorder_is_started_again_and_loses_nothing_flushed(
    tmp_path: Path, started: Callable[..., Recorder]
) -> None:
    recorder = started(Recorder)
    record(recorder, 1)
    recorder.wait_ended(WAIT)
    recorder.begin("bowl", "go", 0.0)
    rng = np.random.default_rng(0)
    recorder.tick(tick(CONTRACT, rng, 0))
    wait_for(lambda: recorder.status().state == "recording")
    assert recorder._process is not None
    os.kill(recorder._process.pid, signal.SIGKILL)
    recorder._process.wait()
    recorder.tick(tick(CONTRACT, rng, 1))
    assert recorder.status().state == "dead"
    with pytest.raises(RatchetError, match=r"recorder\.dead"):
        recorder.require_ready()
    recorder.end("fault", None, "", 1.0)
    record(recorder, 2)
    recorder.wait_ended(WAIT)
    assert len(recorder.status().finished) == 2
    recorder.close()
    cards = EpisodeStore(tmp_path).cards().values()
    assert sorted(c.reason for c in cards) == ["cut_off", "success", "success"]


def test_a_dead_control_process_leaves_a_finished_file(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from tests.agent.episodes.recorder.test_client import *\n"
        "r = Recorder(sys.argv[1], CONTRACT, RecorderConfig(memory_mb=2, min_free_gb=0.0))\n"
        "r.begin('bowl', 'go', 0.0)\n"
        "rng = np.random.default_rng(0)\n"
        "for i in range(5): r.tick(tick(CONTRACT, rng, i))\n"
        "print(r._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": python_path(REPOSITORY)},
        stdout=subprocess.PIPE,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: not Path(f"/proc/{done.stdout.decode().strip()}/fd/0").exists())
    (card,) = EpisodeStore(tmp_path).cards().values()
    assert (card.reason, card.ticks, card.success) == ("control_died", 5, None)


def test_what_a_killed_recorder_had_not_read_is_counted(tmp_path: Path, stopped: Stopped) -> None:
    recorder, contract = stopped.recorder, small_contract(256)
    recorder.begin("bowl", "go", 0.0)
    for i in range(4):
        recorder.tick(tick(contract, np.random.default_rng(0), i))
    assert recorder._process is not None
    recorder._process.kill()
    recorder._process.wait()
    assert recorder.status().dropped == {recorder_side.UNREAD_RECORDS: 5}
    recorder.begin("bowl", "go", 1.0)  # starts another one, which finds none of that
    recorder.tick(tick(contract, np.random.default_rng(0), 0))
    recorder.end("horizon", None, "", 2.0)
    digest = recorder.wait_ended(WAIT)
    assert EpisodeStore(tmp_path).card(digest).ticks == 1


def test_bad_frames_are_counted_not_raised(started: Callable[..., Recorder]) -> None:
    recorder = started()
    recorder.begin("bowl", "go", 0.0)
    recorder.frame("wrist", np.zeros((3, 3, 3), np.uint8), 0.0)
    recorder.frame("nowhere", np.zeros((16, 16, 3), np.uint8), 0.0)
    assert recorder.status().dropped == {
        "frames of a wrong shape: wrist": 1,
        "frames of a wrong shape: nowhere": 1,
    }


@pytest.mark.parametrize(
    "config",
    [{"flush_seconds": 0.6}, {"flush_seconds": 0.0}, {"quality": 0}, {"decisions": "jpeg"}, {"memory_mb": 0}],
)
def test_bad_settings_are_refused_before_anything_starts(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(RatchetError, match=r"recorder\.bad_config"):
        Recorder(tmp_path, CONTRACT, RecorderConfig(**config))
    assert list(tmp_path.iterdir()) == []


def test_a_recorder_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RatchetError, match=r"recorder\.not_started.*episode\.io.*Not a directory"):
        Recorder(tmp_path / "file" / "store", CONTRACT)


def test_nothing_is_recorded_into_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{}")
    with pytest.raises(RatchetError, match=r"episode\.other_folder.*episodes import"):
        Recorder(tmp_path, CONTRACT)
    assert [p.name for p in tmp_path.iterdir()] == ["meta"]


def test_facts_that_no_episode_has(started: Callable[..., Recorder]) -> None:
    recorder = started()
    with pytest.raises(RatchetError, match=r"recorder\.bad_fact"):
        recorder.describe(colour="red")
    with pytest.raises(RatchetError, match=r"episode\.bad_meta"):
        recorder.describe(meta={"x": {1, 2}})


# -- the recorder process, run here so that its disk can be played ---------------------------------------------------


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """How much is free, in bytes."""
    facts = {"free": 50e9}

    class Usage(NamedTuple):
        free: float

    class Played:
        disk_usage = staticmethod(lambda path: Usage(facts["free"]))

    monkeypatch.setattr(recorder_process, "shutil", Played)
    return facts


def test_the_watermark_ends_recording_cleanly(
    tmp_path: Path, disk: dict[str, float], started: Callable[..., Recorder]
) -> None:
    recorder = started(min_free_gb=1.0, flush_seconds=0.01)
    rng = np.random.default_rng(0)
    recorder.begin("bowl", "go", 0.0)
    recorder.tick(tick(CONTRACT, rng, 0))
    wait_for(lambda: recorder.status().state == "recording")
    disk["free"] = 0.9e9
    wait_for(lambda: recorder.status().state == "disk_low")
    with pytest.raises(RatchetError, match=r"recorder\.disk_low.*0\.90 GB"):
        recorder.require_ready()
    recorder.end("success", True, "simulator", 1.0)
    recorder.begin("bowl", "go", 0.0)  # still low: nothing is recorded, nothing is raised
    recorder.tick(tick(CONTRACT, rng, 1))
    wait_for(lambda: recorder.status().dropped == {"records: tick": 1})
    recorder.end("success", True, "simulator", 1.0)
    recorder.close()
    (card,) = EpisodeStore(tmp_path).cards().values()
    assert (card.reason, card.ticks) == ("disk_low", 1)
    assert not list(tmp_path.rglob("*.open"))


def test_a_full_disk_fails_one_episode_and_not_the_next(
    tmp_path: Path, started: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = started(flush_seconds=0.01)
    recorder.begin("bowl", "go", 0.0)
    wait_for(lambda: recorder.status().state == "recording")

    def full(self: GrowingFile) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(GrowingFile, "sync", full)
        recorder.tick(tick(CONTRACT, np.random.default_rng(0), 0))
        wait_for(lambda: recorder.status().state == "failed")
    assert "episode.disk_full" in recorder.status().error
    recorder.end("success", True, "simulator", 1.0)
    record(recorder)
    recorder.wait_ended(WAIT)
    recorder.close()
    assert [c.reason for c in EpisodeStore(tmp_path).cards().values()] == ["success"]
    assert len(EpisodeStore(tmp_path).take_stock().recovered) == 1


def wait_for(condition: Callable[[], bool]) -> None:
    """Until something that another process does has happened; fails after WAIT seconds."""
    pause = threading.Event()
    for _ in range(int(WAIT / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail("it did not happen")
