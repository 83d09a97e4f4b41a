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

TELL = 0.5  # s that the command filter has to tell what became of the last command
FINISH = 20.0  # s until an episode's file must be whole on the disk


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
        self._clock, self._robot = clock, robot
        self._heard = threading.Condition()
        self._sent = self._told = 0  # numbers of the newest command sent, and of the newest that was told of
        self._wanted = self._name = self._trouble = ""
        self.last = ""  # name of the episode that was finished last
        self._ended: tuple[str, bool | None, str] | None = None

    # -- an episode ------------------------------------------------------------------------------------------------

    def prepare(self, name: str, **facts: Any) -> None:
        """Before an episode that must be recorded. name: unique; facts: as in `Recorder.describe`.

        Raises:
            RatchetError: recorder.disk_low, recorder.failed, recorder.dead.
        """
        self.recorder.revive()
        self.recorder.require_ready()
        self.recorder.describe(name=name, **facts)
        self._wanted, self._name, self._ended, self._trouble = name, "", None, ""
        self._sent = self._robot.number

    def finish(self) -> str:
        """After an episode, once nothing more is sent: the name it is recorded under; empty where it never began.

        Raises:
            RatchetError: recorder.lost.
        """
        name, self._name = self._name, ""
        if self._trouble:
            raise RatchetError("recorder.lost", f"the recording did not begin: {self._trouble}", where=str(self.folder))
        if not name:
            return ""
        with self._heard:
            self._heard.wait_for(lambda: self._told >= self._sent, TELL)
        reason, success, source = self._ended or ("cut off", None, "")
        self.recorder.end(reason, success, source, self._clock.now())
        self.recorder.wait_ended(FINISH)
        self.last = name
        return name

    # -- the loop's TickSink ---------------------------------------------------------------------------------------

    def begin(self, task: str, instruction: str, now: float) -> None:
        try:
            self.recorder.begin(task, instruction, now)
        except Exception as error:
            self._trouble = str(error)
            raise
        self._name = self._wanted

    def observation(self, observation: Observation) -> None:
        self.recorder.observation(observation)

    def chunk(self, chunk: ActionChunk) -> None:
        self.recorder.chunk(chunk)

    def tick(self, tick: ControlTick) -> None:
        number = self._robot.number
        self.recorder.tick(tick, number if number != self._sent else -1)
        self._sent = number

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
        with self._heard:
            self._told = max(self._told, int(message.number))
            self._heard.notify_all()

    def on_event(self, message: msg.SafetyEvent) -> None:
        """Of the command filter; the loop's own come as a sink's."""
        fields = ("code", "message", "dim", "value", "limit", "latched")
        said = {name: getattr(message, name) for name in fields}
        self.recorder.event(SafetyEvent(stamp=self._clock.from_ros(message.stamp), **said))

    # -- the rest --------------------------------------------------------------------------------------------------

    def diagnose(self) -> Line:
        status = self.recorder.status()
        lost = sum(status.dropped.values())
        level = ERROR if status.state in ("failed", "dead", "disk_low") else WARN if lost else OK
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
