"""One RunTask goal, from the checks before motion to the result, in the thread that keeps the control loop's deadlines.

Knows the control loop and who judges. Knows no ROS node: what it publishes goes through the arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ratchet_msgs import msg
from ratchet_msgs.action import RunTask

from agent.errors import RatchetError
from agent.records import ActionChunk, ControlTick, Observation, SafetyEvent
from agent.runtime.loop import ControlLoop, EpisodeEnd, Termination
from agent.runtime.sink import ChunkOutcome
from ratchet_ros.robot import RosRobot
from ratchet_ros.times import seconds

PERSON = {msg.OperatorInput.JUDGE_SUCCESS: True, msg.OperatorInput.JUDGE_FAILURE: False}


@dataclass
class Goal:
    """A RunTask goal with the node's defaults filled in. temperature 0 acts greedily."""

    task: str
    instruction: str
    horizon: int
    mode: str
    temperature: float
    seed: int
    expected_adapter: str
    episode: str


class Judge:
    """Who says whether the task is solved. kind: "none", "operator" or "scene"; methods from any thread.

    wait: real seconds to wait for the scene's word on the newest tick; 0 in a simulation that runs by itself.
    """

    def __init__(self, kind: str, period: float, wait: float) -> None:
        self.kind, self._period, self._wait = kind, period, wait
        self._changed = threading.Condition()
        self._scene: tuple[float, bool] | None = None
        self._begin = 0.0
        self._tick: ControlTick | None = None
        self.person = ""
        self.verdict: bool | None = None
        self.on_failure: Callable[[], None] = lambda: None

    def begin(self, now: float, on_failure: Callable[[], None]) -> None:
        with self._changed:
            self._begin, self._tick, self.verdict, self.person = now, None, None, ""
            self.on_failure = on_failure

    def scene(self, message: msg.SceneStatus) -> None:
        with self._changed:
            self._scene = (seconds(message.header.stamp), message.success)
            self._changed.notify_all()

    def operator(self, message: msg.OperatorInput) -> None:
        if self.kind != "operator" or message.judge not in PERSON:
            return
        with self._changed:
            self.verdict, self.person = PERSON[message.judge], message.person or "unnamed"
        if not self.verdict:
            self.on_failure()

    def ticked(self, tick: ControlTick) -> None:
        self._tick = tick

    def __call__(self) -> bool:
        """Whether the task is solved, as far as is known after this tick."""
        if self.kind == "operator":
            return bool(self.verdict)
        after = self._begin if self._tick is None else self._tick.deadline + 0.75 * self._period
        with self._changed:
            if self._wait > 0.0:
                self._changed.wait_for(lambda: self._scene is not None and self._scene[0] >= after, self._wait)
            return self._scene is not None and self._scene[0] > self._begin and self._scene[1]

    def outcome(self, end: EpisodeEnd) -> tuple[int, str]:
        """RunTask's outcome and its source."""
        if self.kind == "operator":
            if self.verdict is None:
                return RunTask.Result.OUTCOME_UNJUDGED, ""
            good = RunTask.Result.OUTCOME_SUCCESS if self.verdict else RunTask.Result.OUTCOME_FAILURE
            return good, f"human:{self.person}"
        if self.kind == "none" or end.success is None:
            return RunTask.Result.OUTCOME_UNJUDGED, ""
        return (RunTask.Result.OUTCOME_SUCCESS if end.success else RunTask.Result.OUTCOME_FAILURE), "simulator"


@dataclass
class Progress:
    """What status and feedback tell; written by the loop's thread, read by the node's."""

    tick: ControlTick | None = None
    ticks: int = 0
    adapter_id: str = ""


@dataclass
class NodeSink:
    """The loop's TickSink: chunks and events go out as messages, the newest tick is kept for feedback."""

    on_chunk: Callable[[ActionChunk], None]
    on_event: Callable[[SafetyEvent], None]
    progress: Progress = field(default_factory=Progress)

    def begin(self, task: str, instruction: str, now: float) -> None:
        self.progress = Progress()

    def observation(self, observation: Observation) -> None:
        return

    def chunk(self, chunk: ActionChunk) -> None:
        self.on_chunk(chunk)

    def tick(self, tick: ControlTick) -> None:
        self.progress.tick, self.progress.ticks = tick, tick.index + 1
        self.progress.adapter_id = tick.adapter_id or self.progress.adapter_id

    def event(self, event: SafetyEvent) -> None:
        self.on_event(event)

    def outcome(self, outcome: ChunkOutcome) -> None:
        return

    def end(self, reason: str, success: bool | None, source: str, now: float) -> None:
        return


def run(
    loop: ControlLoop,
    robot: RosRobot,
    judge: Judge,
    goal: Goal,
    hold_timeout: float,
    mark: Callable[[int, RunTask.Result | None], None],
) -> RunTask.Result:
    """Run the goal to its end; then the last stage is told that nothing more comes. mark: told begin and end."""
    robot.instruction = goal.instruction
    judge.begin(loop.clock.now(), loop.cancel)
    mark(msg.EpisodeMark.BEGIN, None)
    try:
        end = loop.run_episode(
            goal.task,
            goal.instruction,
            horizon=goal.horizon,
            success=None if judge.kind == "none" else judge,
            hold_timeout=hold_timeout,
            on_tick=judge.ticked,
        )
        result = finished(end, judge, goal, loop)
    except RatchetError as error:
        result = refusal(error)
    finally:
        robot.release()
    result.episode = goal.episode
    mark(msg.EpisodeMark.END, result)
    return result


def finished(end: EpisodeEnd, judge: Judge, goal: Goal, loop: ControlLoop) -> RunTask.Result:
    result = RunTask.Result()
    result.outcome, result.outcome_source = judge.outcome(end)
    result.termination = end.termination.value
    if end.termination is Termination.CANCELLED and judge.verdict is False:
        result.termination = RunTask.Result.END_FAILURE
    if end.termination in (Termination.FAULT, Termination.HOLD_TIMEOUT):
        result.code = end.reason
    result.message = f"{result.termination} after {end.ticks} ticks"
    result.ticks, result.seconds, result.events = end.ticks, float(end.seconds), end.events
    result.missed = loop.timing.missed
    return result


def refusal(error: RatchetError) -> RunTask.Result:
    """Nothing moved, and why."""
    result: Any = RunTask.Result()
    result.termination, result.code, result.message = RunTask.Result.END_REFUSED, error.code, str(error)
    return result
