"""Recorder: what a control loop and camera drivers hand over is written to the disk by another process.

Knows the control process's side: copies frames into shared slots, packs records, counts what found no room. Nothing
that the loop calls in an episode waits for the disk, for the other process, or for anything, makes a system call or
raises. It has the methods of `ratchet_vla.runtime.control.sink.TickSink`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.file.format import check_meta
from ratchet_vla.episodes.file.recording import make_info
from ratchet_vla.episodes.library.survey import require_room
from ratchet_vla.episodes.recorder import messages
from ratchet_vla.episodes.recorder.handoff import Layout, Sender
from ratchet_vla.episodes.recorder.types import Outcome, RecorderConfig, RecorderStatus
from ratchet_vla.errors import RatchetError
from ratchet_vla.paths import python_path
from ratchet_vla.records import ActionChunk, Applied, ControlTick, Observation, SafetyEvent, UInt8

__all__ = ["Recorder", "RecorderConfig", "RecorderStatus"]

INLINE_BYTES = 1 << 15  # bytes of a message on the wire that travel as a record; larger ones take a slot, as frames do
QUEUE_BYTES = 16 << 20  # bytes of records that may wait for the recorder process
SPARE_BYTES = 1 << 20  # of these, what only the beginnings and endings of episodes may use
UNREAD_RECORDS = "records that waited for a recorder process when it died"
REMEMBERED_FRAMES = 16  # newest frames per camera that an observation may share


class Recorder:
    """Records one robot's episodes into a store. `frame` from camera drivers, the sink's methods from the loop.

    Where frames of the drivers and of observations are the same arrays, they are stored once; such arrays must not be
    changed after they were handed over.
    """

    def __init__(
        self,
        root: Path | str,
        contract: RobotContract,
        config: RecorderConfig | None = None,
        *,
        session: str = "",
        calibrations: dict[str, str] | None = None,
        command_filter: bool = False,
        wire: Mapping[str, tuple[str, str]] | None = None,
        ready_timeout: float = 60.0,
    ) -> None:
        """Start the recorder process; files that an earlier one left unfinished are recovered first.

        wire: topics that are kept as they are on the wire -> type, and its definition in words; see `wire`.
        command_filter: a command filter stands behind the loop, and `applied` will tell what it made of each command.

        Raises:
            RatchetError: recorder.bad_config, recorder.not_started, episode.other_folder.
        """
        self.root = Path(root)
        self.contract = contract
        self.config = config or RecorderConfig()
        self.config.check(str(self.root))
        require_room(self.root)
        self._session = session
        self._command_filter = command_filter
        self._wire = dict(wire or {})
        # What every episode begins with, made once: the contract as text takes longer than a tick may.
        shared_info = make_info(
            contract,
            "",
            "",
            calibrations=calibrations or {},
            stream=self.config.stream,
            decisions=self.config.decisions or "",
            wire=sorted(self._wire),
        )
        self._same = json.dumps(dataclasses.asdict(shared_info))
        largest_frame_bytes = max((c.height * c.width * 3 for c in contract.cameras), default=1)
        if wire:
            largest_frame_bytes += largest_frame_bytes // 3 + 4096  # drivers send four channels too, and headers
        slot_count = max(4 * len(contract.cameras), (self.config.memory_mb << 20) // largest_frame_bytes)
        self._sender = Sender(
            Layout(largest_frame_bytes, slot_count, QUEUE_BYTES), reserved=slot_count // 8, spare=SPARE_BYTES
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._recent: dict[str, deque[tuple[UInt8, int]]] = {
            c.name: deque(maxlen=REMEMBERED_FRAMES) for c in contract.cameras
        }
        self._shapes = {c.name: (c.height, c.width, 3) for c in contract.cameras}
        self._numbers: Counter[str] = Counter()  # frames of each camera handed over in this episode
        self._dropped: Counter[str] = Counter()
        self._dropped_before: Counter[str] = Counter()  # what was dropped before this episode
        self._next_fields: dict[str, Any] = {}
        self._recording = False
        self._status: dict[str, Any] = {"state": "idle"}
        self._finished: list[str] = []
        self._episode = 0  # counts `begin`
        self._outcomes: dict[int, tuple[str, str]] = {}  # episode -> its id, or empty and why there is none
        self._start()
        self._wait_until_ready(ready_timeout)

    # -- what a session says ------------------------------------------------------------------------------------

    def describe(self, **facts: Any) -> None:
        """Facts of the next episode: name, session, adapter_id, mode, seed, initial_state, meta (plain JSON data).

        Raises:
            RatchetError: recorder.bad_fact, episode.bad_meta.
        """
        unknown = set(facts) - {"name", "session", "adapter_id", "mode", "seed", "initial_state", "meta"}
        if unknown:
            raise RatchetError("recorder.bad_fact", f"an episode has no {min(unknown)}", fix="see the docstring")
        check_meta(facts.get("meta", {}), "meta")
        self._next_fields = facts

    def revive(self) -> None:
        """Start the recorder process again where it died; takes a moment, so not from a control loop."""
        self._listen()
        if not self._sender.alive:
            self._start()

    def require_ready(self) -> None:
        """Before a session or an episode that must be recorded.

        Raises:
            RatchetError: recorder.disk_low, recorder.failed, recorder.dead.
        """
        status = self.status()
        if status.state in ("disk_low", "failed", "dead"):
            remedies = {"disk_low": "free space, or lower min_free_gb", "dead": "the next episode starts it again"}
            raise RatchetError(
                f"recorder.{status.state}",
                status.error or "not recording",
                fix=remedies.get(status.state, "see the error"),
            )

    def status(self) -> RecorderStatus:
        """How it is doing; cheap enough for every tick."""
        self._listen()
        dropped = dict(self._dropped)
        for name, count in self._status.get("dropped", {}).items():
            dropped[name] = dropped.get(name, 0) + count
        alive = self._sender.alive
        return RecorderStatus(
            state=self._status["state"] if alive else "dead",
            error=self._status.get("error", "") if alive else "the recorder process is gone",
            dropped=dropped,
            waiting=self._sender.slots_used / self._sender.layout.count,
            written=self._status.get("written", 0),
            rate=self._status.get("rate", 0.0),
            free_gb=self._status.get("free_gb", 0.0),
            finished=tuple(self._finished),
        )

    def wait_ended(self, timeout: float) -> str:
        """The id of the episode that `end` was called for last, once its file is whole; not for the loop.

        Raises:
            RatchetError: recorder.lost where there is no finished file of it, with the reason.
        """
        deadline_s = time.monotonic() + timeout
        while True:
            alive = self._sender.alive
            self._listen()
            if self._episode in self._outcomes or not alive or time.monotonic() > deadline_s:
                break
            time.sleep(0.005)
        unfinished_reason = (
            "still being finished" if alive else "the recorder process is gone; the next start recovers the file"
        )
        digest, reason = self._outcomes.get(self._episode, ("", unfinished_reason))
        if not digest:
            fix = "see `ratchet episodes verify`"
            problem = f"the episode has no finished file: {reason}"
            raise RatchetError("recorder.lost", problem, where=str(self.root), fix=fix)
        return digest

    def close(self, timeout: float = 30.0) -> RecorderStatus:
        """Finish what is open and end the process; safe to call more than once."""
        if self._process is None:
            return self.status()
        self._sender.send({"kind": "close"}, must=True)
        self._sender.wake()
        deadline_s = time.monotonic() + timeout
        while self._process.poll() is None and time.monotonic() < deadline_s:
            self._listen()
            time.sleep(0.005)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._listen()
        status = dataclasses.replace(self.status(), state="closed", error="")
        self._process = None
        self._sender.close()
        return status

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what drivers and the loop hand over: returns at once, never raises ---------------------------------------

    def frame(self, camera: str, image: UInt8, stamp: float) -> None:
        """One frame of a camera. image: (H, W, 3) uint8 RGB upright as in the contract. stamp: s, robot's clock."""
        if self._recording:
            self._hand_over(camera, image, stamp, decision=False)

    def wire(self, topic: str, data: bytes, received: int) -> None:
        """A message of one of the topics that were named at the start. data: serialised; received: ns, UTC."""
        if not self._recording:
            return
        record = {"kind": "wire", "topic": topic, "received": received}
        if len(data) <= INLINE_BYTES:
            self._send({**record, "data": data})
            return
        slot = self._sender.take_slot(False) if len(data) <= self._sender.layout.slot else None
        if slot is None:
            self._dropped[f"messages: {topic}"] += 1
            return
        self._sender.fill(slot, np.frombuffer(data, np.uint8), at_once=False)
        if not self._sender.send({**record, "slot": slot, "shape": [len(data)]}):
            self._sender.give_back(slot)
            self._dropped[f"messages: {topic}"] += 1

    def begin(self, task: str, instruction: str, now: float) -> None:
        """Begin an episode; what is still open ends first. now: s, robot's clock."""
        self.revive()
        episode_fields = {"mode": "deploy", "session": self._session, **self._next_fields}
        self._next_fields = {}
        episode_fields |= {"task": task, "instruction": instruction, "clock_offset": time.time() - now}
        episode_fields["created"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock:
            for recent in self._recent.values():
                recent.clear()
            self._numbers.clear()
            self._episode += 1
            self._dropped_before = Counter(self._dropped)
            record = {"kind": "begin", "same": self._same, "facts": json.dumps(episode_fields), "number": self._episode}
            record |= {"command_filter": self._command_filter, "wire": self._wire}
            self._recording = self._send(record, must=True)
            if not self._recording:  # what followed would be taken for a part of the episode before
                self._outcomes[self._episode] = ("", "the recorder process did not keep up with the episodes before")

    def observation(self, observation: Observation) -> None:
        """Record what a decision was made on; images that were handed over before are not copied again."""
        if not self._recording:
            return
        numbers = {}
        for camera, image in observation.images.items():
            number = self._recent_number(camera, image)
            if number is None:
                number = self._hand_over(camera, image, observation.stamp, decision=True)
            numbers[camera] = number
        self._send(messages.of_observation(observation, numbers))

    def chunk(self, chunk: ActionChunk) -> None:
        """Record an answer of the policy."""
        if self._recording:
            self._send(messages.of_chunk(chunk))

    def tick(self, tick: ControlTick, number: int = -1) -> None:
        """number: of the tick's command, as in `Applied`; -1 where none went out."""
        if self._recording:
            self._send(messages.of_tick(tick, number))

    def applied(self, applied: Applied) -> None:
        """What the command filter made of a command; in any order with the tick of that command."""
        if self._recording:
            self._send(messages.of_applied(applied))

    def event(self, event: SafetyEvent) -> None:
        """Record what the safety filter did."""
        if self._recording:
            self._send(messages.of_event(event))

    def outcome(self, outcome: Outcome) -> None:
        """Record what became of a chunk, one mark per action."""
        if self._recording:
            self._send(messages.of_outcome(outcome))

    def end(self, reason: str, success: bool | None, source: str, now: float) -> None:
        """End the episode; its file is completed afterwards. source: of `success`, as in `records.Episode`."""
        if self._recording:
            self._recording = False
            record = {"kind": "end", "reason": reason, "success": success, "source": source}
            self._send({**record, "dropped": dict(self._dropped - self._dropped_before)}, must=True)

    # -- inside -------------------------------------------------------------------------------------------------

    def _hand_over(self, camera: str, image: UInt8, stamp: float, *, decision: bool) -> int:
        """The number of the frame within its camera, -1 where it was dropped."""
        if self._shapes.get(camera) != image.shape or image.dtype != np.uint8:
            self._dropped[f"frames of a wrong shape: {camera}"] += 1
            return -1
        slot = self._sender.take_slot(decision)
        # Out of slots, a frame is dropped and counted: the loop and the drivers must not wait for the disk.
        if slot is None:
            self._dropped[f"{'decision frames' if decision else 'frames'}: {camera}"] += 1
            return -1
        self._sender.fill(slot, image, at_once=decision)
        with self._lock:  # numbers must rise in the order of the records
            number = self._numbers[camera]
            record = {"kind": "frame", "camera": camera, "slot": slot, "shape": list(image.shape), "stamp": stamp}
            if not self._sender.send({**record, "number": number, "decision": decision}):
                self._sender.give_back(slot)
                self._dropped[f"frames: {camera}"] += 1
                return -1
            self._numbers[camera] += 1
            self._recent[camera].append((image, number))
        return number

    def _recent_number(self, camera: str, image: UInt8) -> int | None:
        with self._lock:
            for recent_image, number in reversed(self._recent.get(camera, ())):
                if recent_image is image:
                    return number
        return None

    def _send(self, record: dict[str, Any], *, must: bool = False) -> bool:
        handed_over = self._sender.send(record, must=must)
        if not handed_over:
            self._dropped[f"records: {record['kind']}"] += 1
        return handed_over

    def _listen(self) -> None:
        statuses = self._sender.poll()
        if unread_count := self._sender.take_unread():
            self._dropped[UNREAD_RECORDS] += unread_count
        for status in statuses:
            if "number" in status:
                self._outcomes[status["number"]] = (status["finished"], status["error"])
                if status["finished"]:
                    self._finished.append(status["finished"])
            else:
                self._status = status

    def _start(self) -> None:
        if self._process is not None:
            self._process.kill()  # its end of the line is gone; it must not use the memory any more either
            self._process.poll()
            for name, count in self._status.get("dropped", {}).items():
                self._dropped[name] += count
        receiver_end = self._sender.connect()
        settings = {
            "root": str(self.root),
            "socket": receiver_end.fileno(),
            "memory": self._sender.memory_fd,
            "layout": dataclasses.asdict(self._sender.layout),
            "config": dataclasses.asdict(self.config),
        }
        command = [sys.executable, "-m", "ratchet_vla.episodes.recorder.process", json.dumps(settings)]
        descriptors = (receiver_end.fileno(), self._sender.memory_fd)
        self._status = {"state": "idle"}
        environment = {**os.environ, "PYTHONPATH": python_path()}
        self._process = subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL, env=environment)
        receiver_end.close()

    def _wait_until_ready(self, timeout: float) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + timeout
        while not self._status.get("ready"):
            self._listen()
            exit_status = self._process.poll()
            if exit_status is not None or time.monotonic() > deadline_s:
                self._listen()
                exit_reason = (
                    f"not within {timeout:.0f} s" if exit_status is None else f"it ended with status {exit_status}"
                )
                reason = self._status.get("error") or exit_reason
                self.close(timeout=0.0)
                raise RatchetError(
                    "recorder.not_started",
                    f"the recorder process did not come up: {reason}",
                    where=str(self.root),
                    fix="mend that and start again",
                )
            time.sleep(0.005)
