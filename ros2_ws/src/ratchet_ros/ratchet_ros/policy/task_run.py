"""One RunTask goal, from the checks before motion to the result, in the thread that keeps the control loop's deadlines.

Knows the control loop and its labeller. Knows no ROS node: what it publishes goes through the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ratchet_msgs import msg
from ratchet_msgs.action import RunTask

from ratchet_ros.policy.labeller import RosLabeller
from ratchet_ros.policy.recording import EpisodeRecording
from ratchet_ros.policy.robot import RosRobot
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, ControlTick, Observation, SafetyEvent
from ratchet_vla.runtime.control.loop import ControlLoop, EpisodeEnd, Termination
from ratchet_vla.runtime.control.sink import ChunkOutcome
from ratchet_vla.runtime.inference.source import Noise


@dataclass
class Goal:
    """A RunTask goal with the learner's rollout request or the node's defaults filled in. temperature 0 acts greedily.

    noise: of the sampling, independent numbers if absent. request_id: of the learner's rollout request, empty for none.
    """

    task: str
    instruction: str
    horizon: int
    mode: str
    temperature: float
    seed: int
    expected_adapter: str
    episode: str
    noise: Noise | None = None
    request_id: str = ""


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
        self.progress.tick = tick
        self.progress.ticks = tick.index + 1
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
    labeller: RosLabeller,
    goal: Goal,
    hold_timeout: float,
    mark: Callable[[int, RunTask.Result | None], None],
    recording: EpisodeRecording | None = None,
) -> RunTask.Result:
    """Run the goal to its end; then the command filter is told that nothing more comes. mark: told begin and end."""
    robot.instruction = goal.instruction
    labeller.begin(loop.clock.now())
    mark(msg.EpisodeMark.BEGIN, None)
    try:
        end = loop.run_episode(
            goal.task,
            goal.instruction,
            horizon=goal.horizon,
            labeller=None if labeller.kind == "none" else labeller,
            hold_timeout=hold_timeout,
            on_tick=labeller.ticked,
        )
        result = finished(end, loop)
    except RatchetError as error:
        result = refusal(error)
    finally:
        robot.release()
    if recording is not None:
        try:
            result.episode = recording.finish()
        except RatchetError as error:
            result.message += f"; {error}"
    mark(msg.EpisodeMark.END, result)
    return result


OUTCOMES = {
    None: RunTask.Result.OUTCOME_UNJUDGED,
    True: RunTask.Result.OUTCOME_SUCCESS,
    False: RunTask.Result.OUTCOME_FAILURE,
}


def finished(end: EpisodeEnd, loop: ControlLoop) -> RunTask.Result:
    result = RunTask.Result()
    result.outcome = OUTCOMES[end.success]
    result.outcome_source = end.source
    result.termination = end.termination.value
    if end.termination in (Termination.FAULT, Termination.HOLD_TIMEOUT):
        result.code = end.reason
    result.message = f"{result.termination} after {end.ticks} ticks"
    if end.termination in (Termination.SUCCESS, Termination.FAILURE) and end.success is None:
        result.message += ", labelled by nobody: no decision of the policy, an intervention, or no person's name"
    result.ticks = end.ticks
    result.seconds = float(end.seconds)
    result.events = end.events
    result.missed = loop.timing.missed
    return result


def refusal(error: RatchetError) -> RunTask.Result:
    """Nothing moved, and why."""
    result: Any = RunTask.Result()
    result.termination = RunTask.Result.END_REFUSED
    result.code = error.code
    result.message = str(error)
    return result
