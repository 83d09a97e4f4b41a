"""What policy_node sees, decides and sends, and what the command filter makes of it, handed to the episode recorder.

Knows the recorder and our messages. Nothing here waits for it but `finish`, which is called when the arm is at rest.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ratchet_msgs import msg

from ratchet_ros.messages.times import TimeBase
from ratchet_ros.nodes.base import ERROR, OK, WARN, Line
from ratchet_ros.policy.robot import RosRobot
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.recorder.client import Recorder
from ratchet_vla.episodes.recorder.types import RecorderConfig
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, Applied, ControlTick, Mark, Observation, SafetyEvent, UInt8
from ratchet_vla.runtime.control.sink import ChunkOutcome

LAST_APPLIED_LIMIT_S = 0.5  # that the command filter has to tell what became of the last command
FILE_LIMIT_S = 20.0  # until an episode's file must be whole on the disk


class EpisodeRecording:
    """A TickSink that records into an episode store. Frames, `applied` and events come from the node's own thread.

    An episode ends with `finish`: its `end` comes while the command filter still tells of the last commands.
    """

    def __init__(
        self,
        folder: Path,
        contract: RobotContract,
        clock: TimeBase,
        robot: RosRobot,
        config: RecorderConfig,
        *,
        calibrations: Mapping[str, str],
        wire: Mapping[str, tuple[str, str]],
    ) -> None:
        """Starts the recorder process. Raises what `Recorder` raises."""
        self.folder = folder
        self.recorder = Recorder(
            folder, contract, config, calibrations=dict(calibrations), wire=wire, command_filter=True
        )
        self._clock = clock
        self._robot = robot
        self._applied_changed = threading.Condition()  # protects `_applied_number`: executor thread sets, loop's waits
        self._applied_number = 0  # of the newest command that the command filter has reported on
        self._sent_number = 0  # of the newest command sent; the control loop's thread
        self._prepared_name = ""
        self._name = ""  # of the episode that is being recorded
        self._begin_error = ""
        self.last = ""  # name of the episode that was finished last
        self._ended: tuple[str, bool | None, str] | None = None

    # -- an episode ------------------------------------------------------------------------------------------------

    def prepare(self, name: str, **description: Any) -> None:
        """Before an episode that must be recorded. name: unique; description: as in `Recorder.describe`.

        Raises:
            RatchetError: recorder.disk_low, recorder.failed, recorder.dead.
        """
        self.recorder.revive()
        self.recorder.require_ready()
        self.recorder.describe(name=name, **description)
        self._prepared_name = name
        self._name = ""
        self._ended = None
        self._begin_error = ""
        self._sent_number = self._robot.number

    def finish(self) -> str:
        """After an episode, once nothing more is sent: the name it is recorded under; empty where it never began.

        Raises:
            RatchetError: recorder.lost.
        """
        name = self._name
        self._name = ""
        if self._begin_error:
            raise RatchetError(
                "recorder.lost", f"the recording did not begin: {self._begin_error}", where=str(self.folder)
            )
        if not name:
            return ""
        with self._applied_changed:
            self._applied_changed.wait_for(lambda: self._applied_number >= self._sent_number, LAST_APPLIED_LIMIT_S)
        reason, success, source = self._ended or ("cut off", None, "")
        self.recorder.end(reason, success, source, self._clock.now())
        self.recorder.wait_ended(FILE_LIMIT_S)
        self.last = name
        return name

    # -- the loop's TickSink ---------------------------------------------------------------------------------------

    def begin(self, task: str, instruction: str, now: float) -> None:
        try:
            self.recorder.begin(task, instruction, now)
        except Exception as error:
            self._begin_error = str(error)
            raise
        self._name = self._prepared_name

    def observation(self, observation: Observation) -> None:
        self.recorder.observation(observation)

    def chunk(self, chunk: ActionChunk) -> None:
        self.recorder.chunk(chunk)

    def tick(self, tick: ControlTick) -> None:
        number = self._robot.number
        self.recorder.tick(tick, number if number != self._sent_number else -1)
        self._sent_number = number

    def event(self, event: SafetyEvent) -> None:
        self.recorder.event(event)

    def outcome(self, outcome: ChunkOutcome) -> None:
        self.recorder.outcome(outcome)

    def end(self, reason: str, success: bool | None, source: str, now: float) -> None:
        self._ended = (reason, success, source)

    # -- from the node's topics ------------------------------------------------------------------------------------

    def frame(self, camera: str, image: UInt8, stamp: float) -> None:
        self.recorder.frame(camera, image, stamp)

    def on_applied(self, message: msg.Applied) -> None:
        if message.session != self._robot.session:
            return  # another sender's, or what the filter did by itself: that is an event
        action = np.array(message.action, np.float32) if len(message.action) else None
        self.recorder.applied(Applied(int(message.number), action, Mark(message.marks)))
        with self._applied_changed:
            self._applied_number = max(self._applied_number, int(message.number))
            self._applied_changed.notify_all()

    def on_event(self, message: msg.SafetyEvent) -> None:
        """Of the command filter; the loop's own come as a sink's."""
        fields = ("code", "message", "dim", "value", "limit", "latched")
        values = {name: getattr(message, name) for name in fields}
        self.recorder.event(SafetyEvent(stamp=self._clock.from_ros(message.stamp), **values))

    # -- the rest --------------------------------------------------------------------------------------------------

    def diagnose(self) -> Line:
        status = self.recorder.status()
        lost = sum(status.dropped.values())
        if status.state in ("failed", "dead", "disk_low"):
            level = ERROR
        elif lost:
            level = WARN
        else:
            level = OK
        values = {
            "dropped": lost,
            "memory_used": f"{status.waiting:.2f}",
            "mb_per_s": f"{status.rate:.2f}",
            "free_gb": f"{status.free_gb:.1f}",
            "finished": len(status.finished),
        }
        return (level, "recording", status.error or status.state, values)

    def close(self) -> None:
        self.recorder.close()
