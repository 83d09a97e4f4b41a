"""`~/record`, `~/verify` and a button at rest: recordings that a person makes, and what a person says of an episode.

Knows the recording, the store that it writes to, and a node to serve on. Runs no task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ratchet_msgs import msg, srv

from ratchet_ros.messages import convert
from ratchet_ros.messages.intake import Intake
from ratchet_ros.messages.times import TimeBase
from ratchet_ros.nodes.base import RatchetNode
from ratchet_ros.nodes.waiting import in_thread, settled
from ratchet_ros.policy.recording import EpisodeRecording
from ratchet_vla.episodes.library.annotations import Annotations, Label, LabelValue, Viewed
from ratchet_vla.episodes.library.labels import BESIDE_THE_ARM
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.episodes.success_rules import require_goal
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ControlTick, Mark

NOBODY = "unnamed"  # RecordEpisode names no person
BY_SERVICE = Viewed(0.0, 0.0, (), "ros")
BUTTONS: dict[int, LabelValue] = {
    msg.OperatorInput.JUDGE_FAILURE: "failure",
    msg.OperatorInput.JUDGE_SUCCESS: "success",
}
LABEL_VALUES: dict[int, LabelValue] = {
    srv.VerifyEpisode.Request.FAILURE: "failure",
    srv.VerifyEpisode.Request.SUCCESS: "success",
    srv.VerifyEpisode.Request.DISCARD: "discard",
}


class EpisodeServices:
    """Serves both. Without a recording, both are refused with the parameter that is missing.

    next_name: gives the next episode's. running_task: empty for none. Messages and services come on the executor
    thread; what waits for the disk runs in a thread of its own.
    """

    def __init__(
        self,
        node: RatchetNode,
        recording: EpisodeRecording | None,
        intake: Intake,
        clock: TimeBase,
        *,
        next_name: Callable[[], str],
        running_task: Callable[[], str],
    ) -> None:
        self._node = node
        self._recording = recording
        self._intake = intake
        self._clock = clock
        self._next_name = next_name
        self._running_task = running_task
        self.by_hand = ""  # the episode that a person records now
        self._timer: Any = None
        self._tick_index = 0
        self._newest_applied: msg.Applied | None = None  # since the last tick
        self._held_button: LabelValue | None = None
        self._services = [
            node.create_service(srv.RecordEpisode, "~/record", self._serve_record),
            node.create_service(srv.VerifyEpisode, "~/verify", self._serve_verify),
        ]

    def destroy(self) -> None:
        if self.by_hand:
            self._stop_ticking()
        for service in self._services:
            service.destroy()

    def on_applied(self, message: msg.Applied) -> None:
        """While a person records, whoever drives the arm is shown in the ticks."""
        if message.sent:
            self._newest_applied = message

    # -- recording by hand -----------------------------------------------------------------------------------------

    async def _serve_record(self, request: srv.RecordEpisode.Request, response: srv.RecordEpisode.Response) -> Any:
        try:
            if request.request == srv.RecordEpisode.Request.START:
                response.episode = self._start(request.task, request.instruction)
            else:
                discard = request.request == srv.RecordEpisode.Request.DISCARD
                response.episode = await settled(self._node, in_thread(lambda: self._stop(discard), "recording"))
        except RatchetError as error:
            return convert.refused(response, error)
        response.success = True
        return response

    def _start(self, task: str, instruction: str) -> str:
        recording = self._require_recording()
        if not self._node.active:
            raise RatchetError("ros.not_active", "the node is not active", fix="ratchet ctl lifecycle activate")
        if self._running_task():
            raise RatchetError("ros.busy", f"task {self._running_task()!r} is being recorded", fix="wait for its end")
        if self.by_hand:
            raise RatchetError("recorder.busy", f"{self.by_hand} is being recorded", fix="stop it first")
        require_goal(task, instruction)
        name = self._next_name()
        recording.prepare(name, mode="demonstration")
        recording.begin(task, instruction, self._clock.now())
        self.by_hand = name
        self._tick_index = 0
        self._newest_applied = None
        self._timer = self._node.create_timer(1.0 / self._intake.contract.control_hz, self._tick)
        return name

    def _tick(self) -> None:
        """What was measured in this control period, and what the command filter sent in it for whoever commands."""
        recording = self._recording
        try:
            state, _ = self._intake.aligner.newest_state()
        except RatchetError:
            return  # nothing was measured yet
        if recording is None:
            return
        applied = self._newest_applied
        self._newest_applied = None
        command = None
        marks = Mark.NONE
        if applied is not None:
            marks = Mark(applied.marks)
            if len(applied.action) > 0:
                command = np.array(applied.action, np.float32)
        now = self._clock.now()
        tick = ControlTick(
            stamp=now,
            deadline=now,
            index=self._tick_index,
            sampled=None,
            command=command,
            marks=marks,
            chunk_sequence=-1,
            chunk_offset=-1,
            adapter_id="",
            state=state,
        )
        self._tick_index += 1
        recording.recorder.tick(tick)

    def _stop(self, discard: bool) -> str:
        recording = self._require_recording()
        if not self.by_hand:
            raise RatchetError("recorder.idle", "nobody records by hand")
        self._stop_ticking()
        recording.end("discarded" if discard else "stopped", None, "", self._clock.now())
        name = recording.finish()
        if discard:
            self.annotate(name, "discard", NOBODY, "discarded as it ended")
        return name

    def _stop_ticking(self) -> None:
        self.by_hand = ""
        self._timer.cancel()
        self._node.destroy_timer(self._timer)

    # -- annotating ------------------------------------------------------------------------------------------------

    async def _serve_verify(self, request: srv.VerifyEpisode.Request, response: srv.VerifyEpisode.Response) -> Any:
        try:
            label = LABEL_VALUES.get(request.label)
            if label is None:
                raise RatchetError("episode.bad_label", f"no label {request.label}", fix="FAILURE, SUCCESS or DISCARD")

            episode = request.episode or self._last_episode()

            def work() -> Label:
                return self.annotate(episode, label, request.person, request.note)

            await settled(self._node, in_thread(work, "label"))
        except RatchetError as error:
            return convert.refused(response, error)
        response.success = True
        return response

    def on_operator(self, message: msg.OperatorInput) -> None:
        """A button that is pressed anew while nothing runs labels the episode that ended last.

        The press that ended the episode does not, however long it lasts. While something runs, the attempt's labeller
        listens instead.
        """
        previous_button = self._held_button
        label = BUTTONS.get(message.judge)
        self._held_button = label
        recording = self._recording
        if label is None or label == previous_button or recording is None or not recording.last:
            return
        if self._running_task() or self.by_hand:
            return
        name = recording.last
        annotator = message.person

        def work() -> None:
            try:
                self.annotate(name, label, annotator, "", BESIDE_THE_ARM)
                self._node.get_logger().info(f"{name}: {label}, says {annotator}")
            except RatchetError as error:
                self._node.get_logger().warning(str(error))

        in_thread(work, "label")

    def annotate(
        self, episode: str, label: LabelValue, annotator: str, note: str, viewed: Viewed = BY_SERVICE
    ) -> Label:
        """Append a label to the store's index; waits for the disk. Raises what `Annotations.annotate` raises."""
        annotations = Annotations(EpisodeStore(self._require_recording().folder))
        return annotations.annotate(episode, label, annotator, note=note, viewed=viewed)

    def _last_episode(self) -> str:
        name = self._require_recording().last
        if not name:
            raise RatchetError(
                "episode.unknown", "nothing was recorded since the node was started", fix="name an episode"
            )
        return name

    def _require_recording(self) -> EpisodeRecording:
        if self._recording is None:
            raise RatchetError("recorder.off", "this node records nothing", fix="set its parameter `episodes`")
        return self._recording
