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

    name: gives the next episode's. busy: the running task, empty for none.
    """

    def __init__(
        self,
        node: RatchetNode,
        recording: EpisodeRecording | None,
        intake: Intake,
        clock: TimeBase,
        name: Callable[[], str],
        busy: Callable[[], str],
    ) -> None:
        self._node, self._recording, self._intake, self._clock = node, recording, intake, clock
        self._name, self._busy = name, busy
        self.by_hand = ""  # the episode that a person records now
        self._timer: Any = None
        self._index = 0
        self._sent: msg.Applied | None = None
        self._button: LabelValue | None = None  # that is held down now
        self._served = [
            node.create_service(srv.RecordEpisode, "~/record", self._serve_record),
            node.create_service(srv.VerifyEpisode, "~/verify", self._serve_verify),
        ]

    def destroy(self) -> None:
        if self.by_hand:
            self._stop_ticking()
        for service in self._served:
            service.destroy()

    def on_applied(self, message: msg.Applied) -> None:
        """While a person records, whoever drives the arm is shown in the ticks."""
        self._sent = message if message.sent else self._sent

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
        recording = self._required()
        if not self._node.active:
            raise RatchetError("ros.not_active", "the node is not active", fix="ratchet ctl lifecycle activate")
        if self._busy():
            raise RatchetError("ros.busy", f"task {self._busy()!r} is being recorded", fix="wait for its end")
        if self.by_hand:
            raise RatchetError("recorder.busy", f"{self.by_hand} is being recorded", fix="stop it first")
        require_goal(task, instruction)
        name = self._name()
        recording.prepare(name, mode="demonstration")
        recording.begin(task, instruction, self._clock.now())
        self.by_hand, self._index, self._sent = name, 0, None
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
        sent, self._sent = self._sent, None
        moved = sent is not None and len(sent.action) > 0
        now = self._clock.now()
        tick = ControlTick(
            stamp=now,
            deadline=now,
            index=self._index,
            sampled=None,
            command=np.array(sent.action, np.float32) if sent is not None and moved else None,
            marks=Mark(sent.marks) if sent is not None else Mark.NONE,
            chunk_sequence=-1,
            chunk_offset=-1,
            adapter_id="",
            state=state,
        )
        self._index += 1
        recording.recorder.tick(tick)

    def _stop(self, discard: bool) -> str:
        recording = self._required()
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

            episode = request.episode or self._last()

            def work() -> Label:
                return self.annotate(episode, label, request.person, request.note)

            await settled(self._node, in_thread(work, "label"))
        except RatchetError as error:
            return convert.refused(response, error)
        response.success = True
        return response

    def on_operator(self, message: msg.OperatorInput) -> None:
        """A button that is pressed anew while nothing runs labels the episode that ended last; the press that ended it
        does not, however long it lasts. While something runs, the attempt's labeller listens instead."""
        before, self._button = self._button, BUTTONS.get(message.judge)
        label, recording = self._button, self._recording
        if label is None or label == before or recording is None or not recording.last:
            return
        if self._busy() or self.by_hand:
            return
        name, annotator = recording.last, message.person

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
        annotations = Annotations(EpisodeStore(self._required().folder))
        return annotations.annotate(episode, label, annotator, note=note, viewed=viewed)

    def _last(self) -> str:
        name = self._required().last
        if not name:
            raise RatchetError(
                "episode.unknown", "nothing was recorded since the node was started", fix="name an episode"
            )
        return name

    def _required(self) -> EpisodeRecording:
        if self._recording is None:
            raise RatchetError("recorder.off", "this node records nothing", fix="set its parameter `episodes`")
        return self._recording
