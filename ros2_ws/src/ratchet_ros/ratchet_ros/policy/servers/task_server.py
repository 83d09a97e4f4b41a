"""The action `~/run_task`: one goal at a time, checked, prepared, run in a thread of its own, answered.

Knows the control loop, and which thread does what: goals come, are prepared and answered on the executor thread; in
between, the thread "control-loop" runs the episode and calls `_publish_mark` and the sink.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ratchet_msgs import msg
from ratchet_msgs.action import RunTask
from rclpy.action import ActionServer, CancelResponse
from rclpy.clock import Clock, ClockType

from ratchet_ros.messages import qos
from ratchet_ros.messages.times import SimulatedTime
from ratchet_ros.nodes.waiting import in_thread, settled
from ratchet_ros.policy import params as policy_params
from ratchet_ros.policy import task_run
from ratchet_ros.policy.goal_checks import GoalChecks
from ratchet_ros.policy.parts import PolicyParts
from ratchet_ros.policy.robot import LockStepRosRobot
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.control.loop import ControlLoop
from ratchet_vla.runtime.control.priority import real_time
from ratchet_vla.runtime.control.sink import Tee, TickSink

FEEDBACK_PERIOD_S = 0.2
STOP_MARGIN_S = 3.0  # beyond the contract's stop time, until the control loop counts as stuck
FAILED_ENDS = (RunTask.Result.END_FAULT, RunTask.Result.END_REFUSED)


class TaskServer:
    """Serves run_task.

    sink: gets what the loop does, beside the recording. episode_by_hand: the episode that a person records, empty for
    none. on_end: called on the executor thread after every task.
    """

    def __init__(
        self,
        parts: PolicyParts,
        sink: task_run.NodeSink,
        episode_by_hand: Callable[[], str],
        on_end: Callable[[], None],
    ) -> None:
        self.parts = parts
        self.sink = sink
        self.recording = parts.recording
        self.goal: task_run.Goal | None = None  # runs now; set and taken back on the executor thread
        self.loop: ControlLoop | None = None  # of the running or the last task
        self._checks = GoalChecks(parts)
        self._episode_by_hand = episode_by_hand
        self._on_end = on_end
        self._task_future: Future[RunTask.Result] | None = None
        node = parts.node
        self._marks = node.create_publisher(msg.EpisodeMark, "episode", qos.MARKS)
        self._action = ActionServer(node, RunTask, "~/run_task", self.run_task, cancel_callback=self._on_cancel)

    def destroy(self) -> None:
        """Remove the action and the publisher."""
        self._action.destroy()
        self._marks.destroy()

    @property
    def running_task(self) -> str:
        """Empty at rest."""
        return self.goal.task if self.goal is not None else ""

    def stop(self) -> None:
        """Cancel what runs and wait for its controlled stop. Executor thread; must not raise."""
        if self.loop is None or self._task_future is None:
            return
        self.loop.cancel()
        ended = threading.Event()
        self._task_future.add_done_callback(lambda _: ended.set())
        if not ended.wait(self.parts.contract.watchdog.stop_time + STOP_MARGIN_S):
            self.parts.node.get_logger().error(
                "[ros.stuck] the control loop did not end; the safety node holds the arm"
            )

    async def run_task(self, handle: Any) -> RunTask.Result:
        """One goal, from its checks to its answer. Executor thread; awaits the control loop's."""
        node = self.parts.node
        try:
            goal = await self._accept(handle.request)
        except RatchetError as error:
            node.get_logger().warning(str(error))
            handle.abort()
            return task_run.refusal(error)
        steady_clock = Clock(clock_type=ClockType.STEADY_TIME)  # feedback also while simulated time stands still
        feedback = node.create_timer(FEEDBACK_PERIOD_S, lambda: self._feed_back(handle), clock=steady_clock)
        self._task_future = in_thread(self._episode_work(goal), "control-loop")
        try:
            result = await settled(node, self._task_future)
        finally:
            self.goal = None
            node.destroy_timer(feedback)
        result.adapter_id = self.sink.progress.adapter_id
        node.get_logger().info(f"{goal.task}: {result.message}")
        self._on_end()
        if handle.is_cancel_requested:
            handle.canceled()
        elif result.termination in FAILED_ENDS:
            handle.abort()
        else:
            handle.succeed()
        return result

    # -- before motion ---------------------------------------------------------------------------------------------

    async def _accept(self, request: RunTask.Goal) -> task_run.Goal:
        """The complete goal, with the loop ready to run it. Raises RatchetError for every reason not to."""
        self._require_free()
        goal = self._checks.complete(request, self.parts.sessions.next_episode_name())
        await self._checks.wait_for_scene(goal)
        self._require_free()  # another goal may have come meanwhile
        self._checks.require_ready(goal)
        self.prepare(goal)
        return goal

    def _require_free(self) -> None:
        if not self.parts.node.active:
            raise RatchetError("ros.not_active", "the node is not active", fix="ratchet ctl lifecycle activate")
        if self.goal is not None:
            raise RatchetError("ros.busy", f"task {self.goal.task!r} is running", fix="cancel it or wait")
        episode = self._episode_by_hand()
        if episode:
            raise RatchetError("recorder.busy", f"{episode} is being recorded by hand", fix="stop it")

    def prepare(self, goal: task_run.Goal) -> None:
        """Make the loop for a goal; from here on the node is busy."""
        parts = self.parts
        settings = parts.node.settings
        parts.robot.connect()
        chunk_executor = policy_params.executor(settings, goal.mode, parts.contract, parts.chunk_steps)
        parts.client.sample(goal.temperature, goal.seed, goal.noise)
        if isinstance(parts.robot, LockStepRosRobot):
            parts.robot.begin()
        sink: TickSink = self.sink
        if self.recording is not None:
            self.recording.prepare(
                goal.episode,
                session=parts.sessions.id,
                adapter_id=parts.client.adapter_id,
                mode=goal.mode,
                seed=goal.seed,
                initial_state=parts.labeller.initial_state,
                meta={"order": goal.request_id} if goal.request_id else {},
            )
            sink = Tee(self.sink, self.recording)
        self.loop = ControlLoop(
            parts.robot,
            parts.client,
            parts.safety,
            chunk_executor,
            sink=sink,
            clock=parts.clock,
            lock_step=settings.lock_step,
            patience=settings.patience,
            frozen_after=settings.frozen_after,
        )
        self.goal = goal

    # -- in motion -------------------------------------------------------------------------------------------------

    def _episode_work(self, goal: task_run.Goal) -> Callable[[], RunTask.Result]:
        """What the thread "control-loop" does. The settings are those of the goal's start."""
        parts = self.parts
        loop = self.loop
        recording = self.recording
        hold_timeout = parts.node.settings.hold_timeout
        simulated = isinstance(parts.clock, SimulatedTime)
        assert loop is not None

        def work() -> RunTask.Result:
            if not simulated:
                parts.node.get_logger().info(f"control loop: {real_time()}")
            return task_run.run(loop, parts.robot, parts.labeller, goal, hold_timeout, self._publish_mark, recording)

        return work

    def _on_cancel(self, handle: Any) -> CancelResponse:
        if self.loop is not None:
            self.loop.cancel()
        return CancelResponse.ACCEPT

    def _feed_back(self, handle: Any) -> None:
        progress = self.sink.progress
        loop = self.loop
        if not handle.is_active or loop is None:
            return
        feedback = RunTask.Feedback(
            tick=progress.ticks,
            seconds=float(progress.ticks * loop.period),
            motion=self.parts.safety.state.value,
            motion_cause=self.parts.safety.cause,
            adapter_id=progress.adapter_id,
            missed=loop.timing.missed,
        )
        handle.publish_feedback(feedback)

    def _publish_mark(self, kind: int, result: RunTask.Result | None) -> None:
        """Tell recorders that an episode begins or ends. Called from the thread "control-loop"."""
        goal = self.goal
        if goal is None:
            return
        clock = self.parts.clock
        mark = msg.EpisodeMark(
            stamp=clock.to_ros(clock.now()),
            kind=kind,
            episode=goal.episode,
            task=goal.task,
            instruction=goal.instruction,
            mode=goal.mode,
            contract_id=self.parts.contract.id,
            adapter_id=self.parts.client.adapter_id,
            temperature=goal.temperature,
            seed=goal.seed,
        )
        if result is not None:
            mark.termination = result.termination
            mark.outcome = result.outcome
            mark.outcome_source = result.outcome_source
        self._marks.publish(mark)
