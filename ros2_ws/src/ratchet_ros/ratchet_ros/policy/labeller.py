"""Who says, over ROS, whether a task is solved: nobody, the operator's buttons, or the simulated scene.

Knows two messages and what they are worth. Knows no node: messages are handed in, from any thread.
"""

from __future__ import annotations

import threading

from ratchet_msgs import msg

from ratchet_ros.messages.times import seconds
from ratchet_vla.episodes.library.labels import HUMAN, annotator_name
from ratchet_vla.episodes.success_rules import already_solved, require_same
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ControlTick
from ratchet_vla.runtime.control.labelling import Attempt, SuccessLabel, label_by_scene

BUTTONS = {msg.OperatorInput.JUDGE_SUCCESS: True, msg.OperatorInput.JUDGE_FAILURE: False}


class RosLabeller:
    """See `ratchet_vla.runtime.control.labelling.Labeller`. kind: "none", "operator" or "scene".

    period: seconds between two control periods. wait: real seconds to wait for the scene's word on the newest tick; 0
    in a simulation that runs by itself.
    """

    def __init__(self, kind: str, period: float, wait: float) -> None:
        self.kind = kind
        self._period = period
        self._wait = wait
        # Protects the scene's status: the executor thread sets it, the control loop's thread waits for it.
        self._changed = threading.Condition()
        self._scene: msg.SceneStatus | None = None
        self._begin = 0.0
        self._tick: ControlTick | None = None
        self._pressed: bool | None = None
        self._annotator = ""

    # -- what is told ------------------------------------------------------------------------------------------------

    def scene(self, message: msg.SceneStatus) -> None:
        with self._changed:
            self._scene = message
            self._changed.notify_all()

    def operator(self, message: msg.OperatorInput) -> None:
        """A button that ends the attempt; the first one counts."""
        if self.kind == "operator" and message.judge in BUTTONS and self._pressed is None:
            self._pressed = BUTTONS[message.judge]
            self._annotator = message.person

    def ticked(self, tick: ControlTick) -> None:
        self._tick = tick

    @property
    def initial_state(self) -> int:
        """That the scene was reset to; -1 without one."""
        return -1 if self._scene is None else int(self._scene.initial_state)

    # -- before a goal -----------------------------------------------------------------------------------------------

    def refusal(self, task: str, instruction: str) -> RatchetError | None:
        """Why the scene, as it was last heard of, cannot label this goal; None where it can."""
        if self.kind != "scene":
            return None
        scene = self._scene
        if scene is None:
            return RatchetError(
                "goal.no_scene",
                "no scene has told what it watches for",
                where=task,
                fix="start sim_robot_node, or judge:=none",
            )
        try:
            require_same(task, instruction, scene.task, scene.instruction)
        except RatchetError as error:
            return error
        return already_solved(f"{task}: ratchet ctl reset") if scene.success else None

    def settle(self, task: str, instruction: str, patience: float) -> None:
        """Wait until the scene fits the goal: the status after a reset that was answered may still be on its way.
        patience: real seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.refusal(task, instruction) is None, patience)

    def begin(self, now: float) -> None:
        """An attempt starts. now: seconds, the robot's clock."""
        with self._changed:
            self._begin = now
            self._tick = None
            self._pressed = None
            self._annotator = ""

    # -- what the loop asks ------------------------------------------------------------------------------------------

    def outcome(self) -> bool | None:
        if self.kind != "scene":
            return self._pressed
        return True if self._scene_solved() else None

    def label(self, attempt: Attempt) -> SuccessLabel:
        """A person's word counts however the attempt ended, and needs a name to it; the scene's as machines' do."""
        if self.kind == "scene":
            return label_by_scene(attempt)
        if self._pressed is None:
            return SuccessLabel()
        try:
            return SuccessLabel(self._pressed, HUMAN + annotator_name(self._annotator))
        except RatchetError:
            return SuccessLabel()

    def _scene_solved(self) -> bool:
        tick = self._tick
        if tick is None:  # before the first period
            return self._scene is not None and self._scene.success
        after = tick.deadline + 0.75 * self._period
        with self._changed:
            if self._wait > 0.0 and tick.command is not None:  # a hold need not make the simulation go on
                self._changed.wait_for(lambda: self._scene_stamp() >= after, self._wait)
            return self._scene_stamp() > self._begin and self._scene is not None and self._scene.success

    def _scene_stamp(self) -> float:
        """Simulated seconds of the newest word of the scene."""
        return -1.0 if self._scene is None else seconds(self._scene.header.stamp)
