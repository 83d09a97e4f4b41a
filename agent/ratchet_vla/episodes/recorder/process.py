"""The recorder process: takes what the control process hands over, encodes, writes and flushes.

Knows episodes being recorded, their flushes, the disk and its watermark. When the control process dies, it finishes
the open episode; when it is killed itself, the file is readable up to the last flush.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ratchet_vla.episodes.file import format as fmt
from ratchet_vla.episodes.file.format import EpisodeEnding, EpisodeInfo
from ratchet_vla.episodes.file.recording import EpisodeWriter
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.episodes.recorder import messages
from ratchet_vla.episodes.recorder.client import REMEMBERED_FRAMES, RecorderConfig
from ratchet_vla.episodes.recorder.handoff import Layout, Receiver
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Applied, ControlTick, Mark, UInt8

STATUS_PERIOD_S = 0.25
MAX_WAITING_TICKS = 5  # ticks that wait for what became of the oldest of them; it usually comes within one period


class Recording:
    """One episode being recorded. begin: the record that it began with. number: the sender's own of it."""

    def __init__(self, writer: EpisodeWriter, config: RecorderConfig, begin: dict[str, Any]) -> None:
        self.writer = writer
        self._config = config
        self.number = begin["number"]
        self._command_filter = begin["command_filter"]
        self._wire = begin["wire"]
        self.dropped: Counter[str] = Counter()
        self._raw: dict[str, OrderedDict[int, UInt8]] = {}  # newest frames, for decisions that share them
        self._written: dict[str, OrderedDict[int, int]] = {}  # camera -> number -> index in the stream
        self._observations: dict[int, int] = {}
        self._chunks: dict[int, tuple[int, int]] = {}  # sequence -> (index, K)
        self._ticks: Counter[int] = Counter()
        self._marks: dict[tuple[int, int], int] = {}  # (chunk, offset) -> the marks of its tick, all stages'
        self._queue: deque[tuple[int, ControlTick] | messages.ChunkOutcome] = deque()  # in the order in which they came
        self._applied: dict[int, Applied] = {}  # by number, of commands whose tick has not come yet
        self._newest = -1  # number of the newest command that was applied
        self._pending: messages.ChunkOutcome | None = None
        self._stamp = 0.0

    def frame(self, record: dict[str, Any], image: UInt8) -> None:
        """Write a frame to its stream, and keep it for decisions that share it."""
        camera = record["camera"]
        number = record["number"]
        if not (record["decision"] and self._config.decisions):
            index = self.writer.frame(camera, image, record["stamp"])
            _remember(self._written.setdefault(camera, OrderedDict()), number, index)
        if self._config.decisions:
            _remember(self._raw.setdefault(camera, OrderedDict()), number, image.copy())

    def observation(self, record: dict[str, Any]) -> None:
        """Write what a decision was made on; its frames come from those handed over last."""
        observation = messages.to_observation(record)
        cameras = []
        topics = []
        frames = []
        for camera, number in record["numbers"].items():
            group = "decisions" if self._config.decisions else "stream"
            index = -1
            if self._config.decisions:
                image = self._raw.get(camera, {}).get(number)
                if image is not None:
                    index = self.writer.frame(camera, image, record["stamp"], group)
            else:
                index = self._written.get(camera, {}).get(number, -1)
            if index < 0:
                self.dropped[f"frames of decisions: {camera}"] += 1
            cameras.append(camera)
            topics.append(self.writer.info.topics[group][camera])
            frames.append(index)
        self._observations[observation.sequence] = self.writer.observation_record(observation, cameras, topics, frames)

    def chunk(self, record: dict[str, Any]) -> None:
        """Write an answer of the policy."""
        chunk = messages.to_chunk(record)
        self._chunks[chunk.observation_sequence] = (self.writer.chunk(chunk), len(chunk.actions))

    def tick(self, record: dict[str, Any]) -> None:
        """Write a control period once it is known what a command filter made of its command."""
        self._queue.append((record["number"], messages.to_tick(record)))
        self._settle(MAX_WAITING_TICKS)

    def applied(self, record: dict[str, Any]) -> None:
        """Take what the command filter made of a command."""
        applied = messages.to_applied(record)
        self._applied[applied.number] = applied
        self._newest = max(self._newest, applied.number)
        self._settle(MAX_WAITING_TICKS)

    def wire(self, record: dict[str, Any], data: bytes) -> None:
        """Write a message as it came off the wire."""
        topic = record["topic"]
        self.writer.wire(topic, (self._wire[topic][0], self._wire[topic][1]), data, record["received"])

    def event(self, record: dict[str, Any]) -> None:
        """Write what the safety filter did."""
        self.writer.event(messages.to_event(record))

    def outcome(self, record: dict[str, Any]) -> None:
        """Write what became of a chunk, once the ticks before it are written."""
        self._queue.append(messages.to_outcome(record))
        self._settle(MAX_WAITING_TICKS)

    def finish(
        self, success: bool | None, source: str, reason: str, dropped: Counter[str]
    ) -> tuple[str, EpisodeEnding]:
        """Write what still waits and complete the file; returns the episode's id and how it ended."""
        self._settle(0)
        self._write_pending(reward=1.0 if success else 0.0, done=True)
        all_dropped = dict(self.dropped + dropped)
        return self.writer.finish(success, source, reason, dropped=all_dropped)

    def _settle(self, max_waiting: int) -> None:
        """Write what waited, in order, up to the first tick whose command the command filter may still report on.

        max_waiting: how many may wait.
        """
        while self._queue:
            first = self._queue[0]
            if isinstance(first, messages.ChunkOutcome):
                # Written when the next one comes, as only then it is known that the episode did not end with it.
                self._write_pending(reward=0.0, done=False)
                self._pending = first
            else:
                number, tick = first
                if self._command_filter and number >= 0:
                    applied = self._applied.pop(number, None)
                    if applied is None and self._newest < number and len(self._queue) <= max_waiting:
                        return
                    marks = Mark.SKIPPED if applied is None else applied.marks
                    self.dropped["told of commands"] += applied is None
                    tick = dataclasses.replace(tick, applied=applied.action if applied else None, applied_marks=marks)
                self._write_tick(tick)
            self._queue.popleft()

    def _write_tick(self, tick: ControlTick) -> None:
        self._ticks[tick.chunk_sequence] += 1
        self._marks[tick.chunk_sequence, tick.chunk_offset] = int(tick.fate)
        self._stamp = tick.stamp
        self.writer.tick(tick)

    def _write_pending(self, reward: float, done: bool) -> None:
        if self._pending is None:
            return
        pending = self._pending
        self._pending = None
        sequence = pending.sequence
        marks = [
            chunk_marks | self._marks.pop((sequence, offset), 0) for offset, chunk_marks in enumerate(pending.marks)
        ]
        if sequence not in self._observations or sequence not in self._chunks:
            self.dropped["steps"] += 1
            return
        index, length = self._chunks[sequence]
        executed = [mark == 0 for mark in marks]
        steps_run = min(self._ticks[sequence], length)
        self.writer.step(self._observations[sequence], index, executed, marks, reward, done, steps_run, self._stamp)


class RecorderProcess:
    """Everything this process does, one record after the other."""

    def __init__(self, receiver: Receiver, root: Path, config: RecorderConfig) -> None:
        self._receiver = receiver
        self._config = config
        self._store = EpisodeStore(root, create=True)
        self._recording: Recording | None = None
        self._state = "idle"
        self._error = ""
        self._ready = False
        self._count = 0
        self._written = 0
        self._flushed_s = self._reported_s = self._rated_s = time.monotonic()
        self._rate = 0.0
        self._rate_from = 0
        self._dropped: Counter[str] = Counter()

    def run(self) -> None:
        """Until the control process says so or is gone; what is open is finished then."""
        self._store.take_stock()
        self._ready = True
        self._report_status()
        while True:
            record = self._receiver.receive(self._wait(), recording=self._recording is not None)
            if record is None and self._receiver.ended:
                self._end("control_died", None, "")
                return
            if record is not None:
                if record["kind"] == "close":
                    self._end("closed", None, "")
                    return
                self._handle(record)
            self._periodic()

    def _handle(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        try:
            if kind == "begin":
                self._begin(record)
            elif kind == "end":
                self._end(record["reason"], record["success"], record["source"], record["dropped"])
            elif kind == "frame":
                if self._recording is not None:
                    self._recording.frame(record, self._receiver.image(record["slot"], record["shape"]))
            elif kind == "wire" and self._recording is not None:
                slot = record.get("slot")
                data = record["data"] if slot is None else self._receiver.image(slot, record["shape"]).tobytes()
                self._recording.wire(record, data)
            elif self._recording is not None:
                getattr(self._recording, kind)(record)
            else:
                self._dropped[f"records: {kind}"] += 1
        except RatchetError as error:
            self._fail(error)
        finally:
            if "slot" in record:
                self._receiver.release(record["slot"])

    def _begin(self, record: dict[str, Any]) -> None:
        if self._recording is not None:
            self._end("not_ended", None, "")
        if self._disk_low():
            self._receiver.say({"number": record["number"], "finished": "", "error": self._error}, must=True)
            return
        info = EpisodeInfo(**{**json.loads(record["same"]), **json.loads(record["facts"])})
        folder = self._store.folder(info.session)
        file_name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}-{self._count:04d}{fmt.SUFFIX}"
        self._count += 1
        has_raw_frames = "raw" in (self._config.stream, self._config.decisions)
        writer = EpisodeWriter(
            folder / (file_name + ".open"),
            folder / file_name,
            info,
            quality=self._config.quality,
            compress=has_raw_frames,
        )
        self._recording = Recording(writer, self._config, record)
        self._state = "recording"
        self._error = ""
        self._flush()
        self._report_status()

    def _end(
        self, reason: str, success: bool | None, source: str, dropped: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        """dropped: what the control process could not hand over -> how often."""
        if self._recording is None:
            return
        recording = self._recording
        self._recording = None
        try:
            digest, ending = recording.finish(success, source, reason, self._dropped + Counter(dropped))
            self._store.add(recording.writer.path, digest, ending)
        except RatchetError as error:
            self._recording = recording
            self._fail(error)
            return
        self._written += recording.writer.size
        self._dropped.clear()
        if self._state == "recording":
            self._state = "idle"
        self._receiver.say({"number": recording.number, "finished": digest, "error": ""}, must=True)
        self._report_status()

    def _fail(self, error: RatchetError) -> None:
        """The disk, or a record that does not fit: this episode ends here; what was flushed is recovered later."""
        self._state = "failed"
        self._error = str(error)
        if self._recording is not None:
            self._recording.writer.abandon()
            self._receiver.say({"number": self._recording.number, "finished": "", "error": str(error)}, must=True)
            self._recording = None
        self._report_status()

    def _disk_low(self) -> bool:
        free_gb = shutil.disk_usage(self._store.root).free / 1e9
        if free_gb >= self._config.min_free_gb:
            return False
        self._state = "disk_low"
        self._error = f"{free_gb:.2f} GB free on the disk, recording stops below {self._config.min_free_gb:g} GB"
        self._report_status()
        return True

    def _periodic(self) -> None:
        now_s = time.monotonic()
        if self._recording is not None and now_s - self._flushed_s >= self._config.flush_seconds:
            try:
                self._flush()
                if self._disk_low():
                    self._end("disk_low", None, "")
                    self._state = "disk_low"
            except RatchetError as error:
                self._fail(error)
        if now_s - self._reported_s >= STATUS_PERIOD_S:
            self._report_status()

    def _flush(self) -> None:
        assert self._recording is not None
        self._recording.writer.flush()
        self._flushed_s = time.monotonic()

    def _wait(self) -> float:
        if self._recording is None:
            return STATUS_PERIOD_S
        return self._flushed_s + self._config.flush_seconds - time.monotonic()

    def _report_status(self) -> None:
        self._reported_s = time.monotonic()
        written_bytes = self._written + (self._recording.writer.size if self._recording else 0)
        if self._reported_s - self._rated_s >= 2.0:
            self._rate = (written_bytes - self._rate_from) / (self._reported_s - self._rated_s) / 1e6
            self._rated_s = self._reported_s
            self._rate_from = written_bytes
        dropped = self._dropped + (self._recording.dropped if self._recording else Counter())
        self._receiver.say(
            {
                "ready": self._ready,
                "state": self._state,
                "error": self._error,
                "dropped": dict(dropped),
                "written": written_bytes,
                "rate": self._rate,
                "free_gb": shutil.disk_usage(self._store.root).free / 1e9,
            }
        )


def _remember(newest: OrderedDict[int, Any], number: int, value: Any) -> None:
    newest[number] = value
    while len(newest) > REMEMBERED_FRAMES + 2:
        newest.popitem(last=False)


def main(argument: str) -> int:
    """Run the recorder process; returns its exit status. argument: its settings as JSON, from `client.Recorder`."""
    settings = json.loads(argument)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the control process; it closes us
    config = RecorderConfig(**settings["config"])
    with contextlib.suppress(OSError):
        os.nice(config.nice)
    receiver = Receiver(socket.socket(fileno=settings["socket"]), settings["memory"], Layout(**settings["layout"]))
    try:
        RecorderProcess(receiver, Path(settings["root"]), config).run()
    except RatchetError as error:
        receiver.say({"state": "failed", "error": str(error)}, must=True)
        print(f"recorder: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
