"""recorder: every episode as one MCAP file of what was on the wire: images, states, chunks, commands, their fate.

Knows topics, a queue and a writing thread. The control loop never waits for it: it is a process of its own; what it
cannot keep up with is counted and shown. A person's verdicts are appended to `verdicts.jsonl`, never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratchet_msgs import msg, srv
from rclpy.serialization import deserialize_message

from agent.contract import RobotContract
from agent.errors import RatchetError
from agent.runtime.session import utc
from ratchet_ros import convert, decode, encode, qos
from ratchet_ros.bag import Bag
from ratchet_ros.intake import require_wiring
from ratchet_ros.node import ERROR, OK, WARN, Line, RatchetNode, spin
from ratchet_ros.params import parameter

QUEUE = 400  # messages under way to the disk; at 30 Hz and two VGA cameras about 6 s
TAIL = 0.3  # s after an episode's end in which messages of other topics may still be on their way


@dataclass(frozen=True)
class Parameters:
    contract: str = parameter("", "Path of the robot contract (YAML).")
    folder: str = parameter("runs/episodes", "Where the episodes go.")
    images: bool = parameter(True, "Record the cameras too.")
    automatic: bool = parameter(True, "Record every RunTask; else only what RecordEpisode starts.")
    least_free_mb: int = parameter(2000, "Recording ends when less disk than this is free.", low=10, high=1 << 20)


class Recorder(RatchetNode):
    Parameters = Parameters

    def __init__(self, **options: Any) -> None:
        super().__init__("recorder", **options)
        self._things: list[Any] = []
        self._queue: queue.Queue[Any] = queue.Queue(QUEUE)
        self._thread: threading.Thread | None = None
        self._bag: Bag | None = None
        self._episode = ""
        self._dropped = self._written = 0
        self._trouble = ""
        self._tail: Any = None
        self._last: dict[str, str] = {}

    # -- lifecycle -------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        self.contract = RobotContract.load(self.settings.contract)
        wiring = require_wiring(self.contract)
        self._folder = Path(self.settings.folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        if self.settings.images:
            for camera in self.contract.cameras:
                self._listen(decode.image_type(camera), camera.topic, qos.IMAGES)
        readers = [decode.StateReader(self.contract, s) for s in wiring.state]
        for topic, kind in {(r.field.topic, r.kind) for r in readers}:
            self._listen(kind, topic, qos.STATES)
        for sink in wiring.commands:
            if sink.kind in encode.COMMAND_TYPES:
                self._listen(encode.COMMAND_TYPES[sink.kind], sink.topic, qos.COMMANDS)
        for kind, topic in (
            (msg.Command, "command"),
            (msg.Applied, "applied"),
            (msg.ActionChunk, "chunks"),
            (msg.SafetyEvent, "safety_events"),
        ):
            self._listen(kind, topic, qos.EVENTS)
        self._keep(self.create_subscription(msg.EpisodeMark, "episode", self._on_mark, qos.MARKS, raw=True))
        self._keep(self.create_service(srv.RecordEpisode, "~/record", self._serve_record))
        self._keep(self.create_service(srv.VerifyEpisode, "~/verify", self._serve_verify))

    def start(self) -> None:
        self._thread = threading.Thread(target=self._write, name="disk", daemon=True)
        self._thread.start()

    def halt(self) -> None:
        self._end_now()
        self._queue.put(("end", {"termination": "deactivated"}))
        self._queue.put(("stop", None))
        if self._thread is not None:
            self._thread.join(10.0)
            self._thread = None

    def teardown(self) -> None:
        for thing in self._things:
            thing.destroy()
        self._things = []

    def diagnose(self) -> list[Line]:
        level = ERROR if self._trouble else WARN if self._dropped else OK
        text = self._trouble or (f"recording {self._episode}" if self._episode else "waiting")
        return [(level, "recording", text, {"dropped": self._dropped, "written": self._written})]

    # -- in --------------------------------------------------------------------------------------------------------

    def _listen(self, kind: type[Any], topic: str, profile: Any) -> None:
        full = self.resolve_topic_name(topic)
        self._keep(self.create_subscription(kind, topic, lambda data: self._put(full, kind, data), profile, raw=True))

    def _put(self, topic: str, kind: type[Any], data: bytes) -> None:
        if not self._episode:
            return
        try:
            self._queue.put_nowait(("message", (topic, kind, bytes(data), time.time_ns())))
        except queue.Full:
            self._dropped += 1

    def _on_mark(self, data: bytes) -> None:
        mark = deserialize_message(data, msg.EpisodeMark)
        if not self.active or not self.settings.automatic:
            return
        if mark.kind == msg.EpisodeMark.BEGIN:
            self._begin(mark.episode, mark.task, mark.instruction)
            self._put(self.resolve_topic_name("episode"), msg.EpisodeMark, data)
        elif mark.episode == self._episode:
            self._put(self.resolve_topic_name("episode"), msg.EpisodeMark, data)
            self._last = {"termination": mark.termination, "outcome": str(mark.outcome), "source": mark.outcome_source}
            self._tail = self.create_timer(TAIL, self._end_now)

    def _end_now(self) -> None:
        """The episode's last messages are in: close it."""
        if self._tail is not None:
            self.destroy_timer(self._tail)
            self._tail = None
            self._end(self._last)

    def _begin(self, episode: str, task: str, instruction: str) -> None:
        self._end_now()
        self._episode = episode
        about = {"episode": episode, "task": task, "instruction": instruction, "started": utc()}
        self._queue.put(("begin", about))

    def _end(self, about: dict[str, str]) -> str:
        episode, self._episode = self._episode, ""
        self._queue.put(("end", about))
        return episode

    def _serve_record(self, request: srv.RecordEpisode.Request, response: srv.RecordEpisode.Response) -> Any:
        try:
            if not self.active:
                raise RatchetError("ros.not_active", "the recorder is not active")
            if request.request == srv.RecordEpisode.Request.START:
                if self._episode:
                    raise RatchetError("recorder.busy", f"{self._episode} is being recorded", fix="stop it first")
                self._begin(uuid.uuid4().hex[:12], request.task, request.instruction)
                response.episode = self._episode
            else:
                if not self._episode:
                    raise RatchetError("recorder.idle", "nothing is being recorded")
                discard = request.request == srv.RecordEpisode.Request.DISCARD
                response.episode = self._end({"termination": "discarded" if discard else "stopped"})
        except RatchetError as error:
            return convert.refused(response, error)
        response.success = True
        return response

    def _serve_verify(self, request: srv.VerifyEpisode.Request, response: srv.VerifyEpisode.Response) -> Any:
        labels = {
            srv.VerifyEpisode.Request.FAILURE: "failure",
            srv.VerifyEpisode.Request.SUCCESS: "success",
            srv.VerifyEpisode.Request.DISCARD: "discard",
        }
        try:
            path = self._folder / f"{request.episode}.mcap"
            if not request.person.strip():
                raise RatchetError("episode.no_person", "a verdict has a name to it", fix="give the person's name")
            if request.label not in labels:
                raise RatchetError("episode.bad_label", f"no label {request.label}")
            if "/" in request.episode or not path.is_file():
                raise RatchetError(
                    "episode.unknown", f"no finished episode {request.episode!r}", where=str(self._folder)
                )
            line = {
                "episode": request.episode,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "label": labels[request.label],
                "person": request.person.strip(),
                "note": request.note,
                "time": utc(),
            }
            with (self._folder / "verdicts.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except RatchetError as error:
            return convert.refused(response, error)
        response.success = True
        return response

    # -- the disk's thread -------------------------------------------------------------------------------------------

    def _write(self) -> None:
        while True:
            kind, what = self._queue.get()
            try:
                if kind == "stop":
                    return
                if kind == "begin":
                    self._open(what)
                elif kind == "end":
                    self._finish(what)
                elif self._bag is not None:
                    self._bag.write(*what)
                    self._written += 1
            except OSError as error:  # a full or lost disk ends the recording, never the arm's motion
                self._trouble, self._bag = f"[recorder.disk] {error}", None
                self.get_logger().error(self._trouble)

    def _open(self, about: dict[str, str]) -> None:
        self._finish({"termination": "cut off"})
        free = shutil.disk_usage(self._folder).free >> 20
        if free < self.settings.least_free_mb:
            raise OSError(f"{free} MB are free, {self.settings.least_free_mb} are demanded")
        self._trouble = ""
        contract = {"id": self.contract.id, "json": json.dumps(self.contract.to_dict())}
        self._bag = Bag(self._folder / f"{about['episode']}.mcap", {"episode": about, "contract": contract})

    def _finish(self, about: dict[str, str]) -> None:
        bag, self._bag = self._bag, None
        if bag is not None:
            bag.finish({"end": {**about, "ended": utc(), "dropped": str(self._dropped)}})

    def _keep(self, thing: Any) -> Any:
        self._things.append(thing)
        return thing


def main() -> int:
    return spin(Recorder)


if __name__ == "__main__":
    raise SystemExit(main())
