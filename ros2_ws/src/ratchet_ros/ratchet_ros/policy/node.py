"""policy_node: cameras and state in, commands for the safety node out; RunTask, adapter exchange, status.

Knows topics, services and one action. The work is ratchet_vla.runtime's: the control loop runs in a thread of its own,
the policy in a process of its own, so neither a slow model nor this node's callbacks move a deadline.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ratchet_msgs import msg, srv
from ratchet_msgs.action import RunTask
from rclpy.action import ActionServer, CancelResponse
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rosgraph_msgs.msg import Clock as ClockMessage
from std_msgs.msg import Bool
from std_srvs.srv import Trigger

from ratchet_ros.messages import convert, qos
from ratchet_ros.messages.intake import Intake
from ratchet_ros.messages.times import SimulatedTime, SteadyTime, TimeBase, seconds
from ratchet_ros.nodes.base import ERROR, OK, WARN, Line, RatchetNode, spin
from ratchet_ros.nodes.waiting import answered, in_thread, settled
from ratchet_ros.policy import params as policy_params
from ratchet_ros.policy import task_run, wire_tap
from ratchet_ros.policy.episode_services import EpisodeServices
from ratchet_ros.policy.labeller import RosLabeller
from ratchet_ros.policy.recording import EpisodeRecording
from ratchet_ros.policy.robot import LockStepRosRobot, NotingSafety, RosRobot, StampedRosRobot
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.success_rules import require_goal, require_temperature
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, SafetyEvent, UInt8
from ratchet_vla.runtime.control.loop import ControlLoop
from ratchet_vla.runtime.control.priority import real_time
from ratchet_vla.runtime.control.sink import Tee, TickSink
from ratchet_vla.runtime.inference.client import PolicyClient
from ratchet_vla.runtime.session import rollout_requests
from ratchet_vla.runtime.session.controller import SessionController
from ratchet_vla.runtime.session.dispatch import recorded

STEADY = Clock(clock_type=ClockType.STEADY_TIME)
STATUS_PERIOD, FEEDBACK_PERIOD = 0.5, 0.2
UNSAID = -1.0  # a goal's temperature that is left to the learner's rollout request, or to acting greedily
SCENE_PATIENCE = 0.5  # s in which the scene's status after a reset must arrive
NOT_LATCHED = "safety.not_latched"
ANSWER = 5.0  # s that the safety node has to answer
RECENT = 1000  # ticks that the published jitter is taken over


class PolicyNode(RatchetNode):
    """See the module's words; topics and services are listed in docs/ros.md."""

    Parameters = policy_params.Parameters

    def __init__(self, **options: Any) -> None:
        super().__init__("policy_node", **options)
        self.client: PolicyClient | None = None
        self.intake: Intake | None = None
        self.sessions: SessionController | None = None
        self.recording: EpisodeRecording | None = None
        self.loop: ControlLoop | None = None
        self._things: list[Any] = []
        self._ticking: list[Any] = []
        self._goal: task_run.Goal | None = None
        self._thread: Any = None
        self._filter_status: msg.SafetyStatus | None = None
        self._episodes, self._started = 0, uuid.uuid4().hex[:8]

    # -- lifecycle -------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        settings = self.settings
        self.contract = RobotContract.load(settings.contract)
        simulated, lock_step = bool(self.get_parameter("use_sim_time").value), settings.lock_step
        if lock_step and not simulated:
            raise RatchetError("ros.bad_parameter", "lock_step needs use_sim_time", where="lock_step")
        timeout = settings.patience if lock_step else settings.clock_timeout
        self.clock: TimeBase = SimulatedTime(timeout) if simulated else SteadyTime()
        if simulated:
            profile = qos.LOCK_STEP if lock_step else qos.CLOCK
            self._keep(self.create_subscription(ClockMessage, "/clock", self._on_clock, profile))
        self.safety = NotingSafety(self.contract, policy_params.safety_config(settings, simulated))
        self.client = PolicyClient(self.contract, policy_params.launch(settings))
        spec = self.client.start()
        policy_params.executor(settings, settings.mode, self.contract, spec.chunk)
        if self.client.computing:
            self.get_logger().info(f"the policy computes in {self.client.computing}")
        for warning in self.client.warnings:
            self.get_logger().warning(warning)
        self.robot = self._make_robot(spec.cameras)
        self.safety.robot = self.robot
        self.robot.fail = self.safety.fail
        period = 1.0 / self.contract.control_hz
        self.labeller = RosLabeller(settings.judge, period, settings.patience if lock_step else 0.0)
        self.sink = task_run.NodeSink(self._on_chunk, self._on_event)
        calibrations = policy_params.calibrations(settings)
        if settings.episodes:
            on_the_wire = wire_tap.sources(self, self.contract, settings.record_wire, lock_step)
            self.recording = EpisodeRecording(
                Path(settings.episodes),
                self.contract,
                self.clock,
                self.robot,
                policy_params.recorder_config(settings),
                calibrations=calibrations,
                wire=wire_tap.channels(on_the_wire),
            )
            self._keep(wire_tap.WireTap(self, on_the_wire, self.recording.recorder.wire))
        if settings.robot:
            self._open_sessions(calibrations)
        elif settings.ordered:
            raise RatchetError(
                "ros.bad_parameter", "the learner's rollout request lies in the robot's folder", where="robot"
            )
        self._make_publishers()
        self._make_servers()

    def start(self) -> None:
        self._require_safety_node()  # active means that a goal can move the arm, also where discovery takes its time
        self.robot.connect()
        self._publish_status()

    def halt(self) -> None:
        if self.loop is not None and self._thread is not None:
            self.loop.cancel()
            wait = self.contract.watchdog.stop_time + 3.0
            self._join(wait)
        self._publish_status()

    def teardown(self) -> None:
        if self.client is not None:
            self.client.stop()
            self.client = None
        if self.recording is not None:
            self.recording.close()
            self.recording = None
        if self.sessions is not None:
            self._close_sessions(self.sessions)
            self.sessions = None
        if self.intake is not None:
            self.intake.close()
            self.intake = None
        for timer in self._ticking:
            self.destroy_timer(timer)
        for thing in self._things:
            thing.destroy()
        self._ticking, self._things = [], []

    def diagnose(self) -> list[Line]:
        assert self.client is not None
        assert self.intake is not None
        status = self.client.status()
        bad = status.state in ("failed", "stopped")
        level = ERROR if bad else WARN if status.state in ("starting", "restarting") else OK
        values = {
            "adapter": status.adapter_id,
            "asked": status.asked,
            "answered": status.answered,
            "restarts": status.restarts,
            "inference_s": f"{status.inference:.4f}",
        }
        lines: list[Line] = [(level, "policy", status.error or status.state, values)]
        missing, problems = self.intake.missing(), [str(e) for e in self.intake.problems.values()]
        text = f"missing {', '.join(missing)}" if missing else "; ".join(problems) or "complete"
        ages = {"state_age_s": f"{self.clock.now() - self.intake.aligner.state_stamp():.4f}"}
        if self.intake.aligner.cameras:
            ages["frame_age_s"] = f"{self.clock.now() - self.intake.aligner.frames_stamp():.4f}"
        lines.append((ERROR if missing or problems else OK, "observation", text, ages | {"skew_s": self.robot.skew}))
        if self._filter_status is None:
            lines.append((ERROR, "safety node", "not heard of", {}))
        if self.recording is not None:
            lines.append(self.recording.diagnose())
        if self.loop is not None:
            timing = self.loop.timing
            level = WARN if timing.missed else OK
            lines.append((level, "control loop", f"{timing.missed} missed", {"overruns": timing.overruns}))
        return lines

    # -- what goes in and out --------------------------------------------------------------------------------------

    def _make_robot(self, cameras: tuple[str, ...]) -> RosRobot:
        settings, lock_step = self.settings, self.settings.lock_step
        skew = settings.max_skew or self.contract.watchdog.observation_max_age
        self._commands = self._keep(self.create_publisher(msg.Command, "command", qos.COMMANDS))
        waker: list[Callable[[], None]] = []

        def wake() -> None:
            for arrived in waker:
                arrived()

        watched = [c.name for c in self.contract.cameras if c.name not in cameras] if settings.episodes else []
        self.intake = Intake(
            self,
            self.contract,
            self.clock,
            cameras=cameras,
            max_skew=skew,
            reliable=lock_step,
            on_data=wake,
            others=watched,
            on_frame=self._on_frame,
        )
        publish = self._commands.publish
        if lock_step:
            robot = LockStepRosRobot(self.contract, self.intake, self.clock, publish, settings.patience)
            waker.append(robot.arrived)
            return robot
        return StampedRosRobot(self.contract, self.intake, self.clock, publish)

    def _make_publishers(self) -> None:
        self._status = self._keep(self.create_publisher(msg.PolicyStatus, "policy_status", qos.STATUS))
        self._chunks = self._keep(self.create_publisher(msg.ActionChunk, "chunks", qos.EVENTS))
        self._events = self._keep(self.create_publisher(msg.SafetyEvent, "safety_events", qos.EVENTS))
        self._marks = self._keep(self.create_publisher(msg.EpisodeMark, "episode", qos.MARKS))
        for work in (self._publish_status, self._look):
            self._ticking.append(self.create_timer(STATUS_PERIOD, work, clock=STEADY))

    def _make_servers(self) -> None:
        keep = self._keep
        keep(self.create_subscription(msg.SafetyStatus, "safety_status", self._on_filter_status, qos.STATUS))
        keep(self.create_subscription(msg.OperatorInput, "operator", self._on_operator, qos.INPUT))
        for profile in qos.STOP_BUTTONS:
            keep(self.create_subscription(Bool, "e_stop", self._on_e_stop, profile))
        assert self.intake is not None
        self.episode_services = EpisodeServices(
            self,
            self.recording,
            self.intake,
            self.clock,
            self._new_name,
            lambda: self._goal.task if self._goal is not None else "",
        )
        keep(self.episode_services)
        if self.recording is not None:
            keep(self.create_subscription(msg.Applied, "applied", self._on_applied, qos.EVENTS))
            keep(self.create_subscription(msg.SafetyEvent, "safety_events", self._on_other_event, qos.EVENTS))
        if self.settings.judge == "scene":
            keep(self.create_subscription(msg.SceneStatus, "scene_status", self.labeller.scene, qos.STATUS))
        keep(self.create_service(srv.SwapAdapter, "~/swap_adapter", self._serve_swap))
        keep(self.create_service(srv.ListAdapters, "~/list_adapters", self._serve_list))
        apart = ReentrantCallbackGroup()  # a callback that awaits another node holds up its group, its answer too
        self._clear_command_filter = keep(
            self.create_client(srv.ClearFault, "safety_node/clear_fault", callback_group=apart)
        )
        keep(self.create_service(srv.ClearFault, "~/clear_fault", self._serve_clear, callback_group=apart))
        keep(self.create_service(Trigger, "~/resume", self._serve_resume))
        keep(ActionServer(self, RunTask, "~/run_task", self._run_task, cancel_callback=self._on_cancel))

    def _on_clock(self, message: ClockMessage) -> None:
        self.clock.update(seconds(message.clock))  # type: ignore[attr-defined]

    def _on_filter_status(self, message: msg.SafetyStatus) -> None:
        self._filter_status = message
        if message.latched and self._goal is not None:
            if isinstance(self.robot, LockStepRosRobot):
                self.robot.abandon(True)
            self.safety.fail(policy_params.FILTER_LATCHED, f"the safety node stopped the arm: {message.cause}")

    def _on_e_stop(self, message: Bool) -> None:
        self.safety.e_stop(message.data)

    def _on_operator(self, message: msg.OperatorInput) -> None:
        now = self.clock.now()
        self.safety.dead_man(message.dead_man, now)
        self.labeller.operator(message)
        self.episode_services.on_operator(message)
        if self.loop is None or self._goal is None:
            return
        wanted = message.intervene and len(message.action) == self.contract.action.size
        self.loop.human(np.frombuffer(message.action, np.float32) if wanted else None)

    def _on_frame(self, camera: str, pixels: UInt8, stamp: float) -> None:
        if self.recording is not None:
            self.recording.frame(camera, pixels, stamp)

    def _on_applied(self, message: msg.Applied) -> None:
        if self.recording is not None:
            self.recording.on_applied(message)
            self.episode_services.on_applied(message)

    def _on_other_event(self, message: msg.SafetyEvent) -> None:
        if message.node != "policy_node" and self.recording is not None:
            self.recording.on_event(message)

    def _on_chunk(self, chunk: ActionChunk) -> None:
        self._chunks.publish(convert.chunk(chunk, self.robot.image_stamps, self.clock))

    def _on_event(self, event: SafetyEvent) -> None:
        self._events.publish(convert.event(event, "policy_node", self.clock))
        log = self.get_logger()
        (log.error if event.latched else log.debug)(f"{event.code}: {event.message}")

    # -- services --------------------------------------------------------------------------------------------------

    async def _serve_swap(self, request: srv.SwapAdapter.Request, response: srv.SwapAdapter.Response) -> Any:
        try:
            assert self.client is not None
            report = await settled(self, self.client.swap(request.reference, request.expected_id))
        except RatchetError as error:
            self.get_logger().warning(str(error))
            return convert.refused(response, error)
        response.success = True
        response.old_id, response.new_id = report["old_id"], report["new_id"]
        response.ready, response.unavailable = float(report["ready"]), float(report["unavailable"])
        response.warnings = [str(w) for w in report["warnings"]]
        response.message = f"{report['old_id'][:12]} -> {report['new_id'][:12]}"
        self._publish_status()
        return response

    async def _serve_list(self, request: srv.ListAdapters.Request, response: srv.ListAdapters.Response) -> Any:
        try:
            assert self.client is not None
            rows = await settled(self, self.client.adapters())
        except RatchetError as error:
            return convert.refused(response, error)
        response.success = True
        response.adapters = [msg.AdapterInfo(**row) for row in rows]
        return response

    async def _serve_clear(self, request: srv.ClearFault.Request, response: srv.ClearFault.Response) -> Any:
        """Both filters of the arm, the one before the arm first, so that nothing moves while it is still latched."""
        cleared, said = [], []
        try:
            filter_answer = await answered(self, self._clear_command_filter, request, ANSWER)
            if filter_answer.success:
                cleared, said = [filter_answer.cleared], [filter_answer.message]
            elif filter_answer.code != NOT_LATCHED:
                return filter_answer
            cause = self.safety.cause
            try:
                event = self.safety.clear(request.person)
            except RatchetError as error:
                if error.code != NOT_LATCHED or not cleared:
                    raise
            else:
                self._on_event(event)
                cleared, said = [*cleared, cause], [*said, event.message]
        except RatchetError as error:
            return convert.refused(response, error)
        response.success, response.cleared = True, ", ".join(dict.fromkeys(cleared))
        response.message = "; ".join(dict.fromkeys(said))
        self._publish_status()
        return response

    def _serve_resume(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.safety.resume()
        response.success = True
        return response

    # -- the task --------------------------------------------------------------------------------------------------

    def _on_cancel(self, handle: Any) -> CancelResponse:
        if self.loop is not None:
            self.loop.cancel()
        return CancelResponse.ACCEPT

    async def _run_task(self, handle: Any) -> RunTask.Result:
        try:
            self._require_free()
            goal = self._wanted(handle.request)
            await self._scene_settled(goal)
            self._require_free()  # another goal may have come meanwhile
            self._check(goal)
            self._prepare(goal)
        except RatchetError as error:
            self.get_logger().warning(str(error))
            handle.abort()
            return task_run.refusal(error)
        assert self.loop is not None
        loop, robot, timeout = self.loop, self.robot, self.settings.hold_timeout
        feedback = self.create_timer(FEEDBACK_PERIOD, lambda: self._feed_back(handle), clock=STEADY)
        simulated = isinstance(self.clock, SimulatedTime)

        def work() -> RunTask.Result:
            if not simulated:
                self.get_logger().info(f"control loop: {real_time()}")
            return task_run.run(loop, robot, self.labeller, goal, timeout, self._mark, self.recording)

        self._thread = in_thread(work, "control-loop")
        try:
            result = await settled(self, self._thread)
        finally:
            self._goal = None
            self.destroy_timer(feedback)
        result.adapter_id = self.sink.progress.adapter_id
        self.get_logger().info(f"{goal.task}: {result.message}")
        self._publish_status()
        if handle.is_cancel_requested:
            handle.canceled()
        elif result.termination in (RunTask.Result.END_FAULT, RunTask.Result.END_REFUSED):
            handle.abort()
        else:
            handle.succeed()
        return result

    async def _scene_settled(self, goal: task_run.Goal) -> None:
        words = goal.task, goal.instruction
        if self.labeller.refusal(*words) is not None:
            await settled(self, in_thread(lambda: self.labeller.settle(*words, SCENE_PATIENCE), "scene"))

    def _require_free(self) -> None:
        if not self.active:
            raise RatchetError("ros.not_active", "the node is not active", fix="ratchet ctl lifecycle activate")
        if self._goal is not None:
            raise RatchetError("ros.busy", f"task {self._goal.task!r} is running", fix="cancel it or wait")
        if self.episode_services.by_hand:
            what = f"{self.episode_services.by_hand} is being recorded by hand"
            raise RatchetError("recorder.busy", what, fix="stop it")

    def _wanted(self, request: RunTask.Goal) -> task_run.Goal:
        """The goal with what the learner requested, or this node's defaults, filled in."""
        assert self.client is not None
        name, mode = self._new_name(), request.mode or self.settings.mode
        temperature = None if request.temperature == UNSAID else float(request.temperature)
        if temperature is not None:
            require_temperature(temperature)
        self._require_session(mode)
        if mode == "collect" and self.settings.ordered:
            goal = rollout_requests.requested(
                rollout_requests.read(Path(self.settings.robot)),
                task=request.task,
                instruction=request.instruction,
                horizon=int(request.horizon),
                temperature=temperature,
                seed=int(request.seed),
                active=self.client.adapter_id,
                episode=name,
            )
        else:
            goal = rollout_requests.unrequested(
                request.task, request.instruction, int(request.horizon), temperature, int(request.seed), episode=name
            )
        return task_run.Goal(
            task=goal.task,
            instruction=goal.instruction,
            horizon=goal.horizon or self.settings.horizon,
            mode=mode,
            temperature=goal.temperature,
            seed=goal.seed,
            expected_adapter=request.expected_adapter or goal.adapter,
            episode=name,
            noise=goal.noise,
            request_id=goal.request_id,
        )

    def _check(self, goal: task_run.Goal) -> None:
        """Everything else that can be refused before anything moves."""
        assert self.client is not None
        self._require_session(goal.mode)  # one may have ended while the scene was waited for
        require_goal(goal.task, goal.instruction)
        misfit = self.labeller.refusal(goal.task, goal.instruction)
        if misfit is not None:
            raise misfit
        filter_status = self._require_safety_node()
        if filter_status.latched:
            text = f"the safety node is latched by {filter_status.cause}"
            raise RatchetError("safety.latched", text, fix="ratchet ctl clear")
        status = self.client.status()
        if status.state != "ready":
            raise RatchetError("policy.not_ready", f"the policy is {status.state}", where=status.error)
        if goal.expected_adapter and goal.expected_adapter != status.adapter_id:
            raise RatchetError(
                "adapter.not_active", f"{goal.expected_adapter[:12]} is expected, {status.adapter_id[:12]} is active"
            )

    def _require_safety_node(self) -> msg.SafetyStatus:
        """What the safety node last said. Raises RatchetError ros.no_safety_node where none takes commands."""
        if self._filter_status is None or not self._commands.get_subscription_count():
            raise RatchetError("ros.no_safety_node", "no safety node listens", fix="start safety_node and activate it")
        return self._filter_status

    def _new_name(self) -> str:
        """Of the next episode; unique, also where a session goes on after its process was killed."""
        self._episodes += 1
        return f"{self._stem()}-{self._episodes:04d}"

    def _stem(self) -> str:
        return (
            f"{self.sessions.id}-{self._started}" if self.sessions is not None and self.sessions.id else self._started
        )

    # -- the session -----------------------------------------------------------------------------------------------

    def _require_session(self, mode: str) -> None:
        if mode == "collect" and self.sessions is not None and not self.sessions.id:
            raise RatchetError("session.none", "nothing is collected outside a session", fix="ratchet session start")

    def _open_sessions(self, calibrations: dict[str, str]) -> None:
        assert self.client is not None
        settings, client = self.settings, self.client
        checks = policy_params.checks(settings)
        store = str(Path(settings.episodes).resolve()) if settings.episodes else ""
        self.sessions = SessionController(
            Path(settings.robot),
            "nodes",
            self.contract,
            client.base_hash,
            lambda: client.adapter_id,
            calibrations=calibrations,
            episodes=lambda session: recorded(store, session),
            store=store,
        )
        if settings.session == "auto":
            self.sessions.start({"by": "policy_node"}, checks)

    def _close_sessions(self, sessions: SessionController) -> None:
        try:
            sessions.stop("powered down")
        except RatchetError as error:  # nothing may keep the node from ending; the next start ends the session
            self.get_logger().error(str(error))
        sessions.close()

    def _look(self) -> None:
        """Whether somebody wishes for a session; between two episodes, so that each belongs to one."""
        if self.sessions is None or self._goal is not None or self.episode_services.by_hand:
            return
        try:
            self.sessions.look()
        except RatchetError as error:
            self.get_logger().error(str(error))

    def _prepare(self, goal: task_run.Goal) -> None:
        assert self.client is not None
        assert self.client.spec is not None
        self.robot.connect()
        steps = policy_params.executor(self.settings, goal.mode, self.contract, self.client.spec.chunk)
        self.client.sample(goal.temperature, goal.seed, goal.noise)
        if isinstance(self.robot, LockStepRosRobot):
            self.robot.begin()
        sink: TickSink = self.sink
        if self.recording is not None:
            self.recording.prepare(
                goal.episode,
                session=self.sessions.id if self.sessions is not None else "",
                adapter_id=self.client.adapter_id,
                mode=goal.mode,
                seed=goal.seed,
                initial_state=self.labeller.initial_state,
                meta={"order": goal.request_id} if goal.request_id else {},
            )
            sink = Tee(self.sink, self.recording)
        self.loop = ControlLoop(
            self.robot,
            self.client,
            self.safety,
            steps,
            sink=sink,
            clock=self.clock,
            lock_step=self.settings.lock_step,
            patience=self.settings.patience,
            frozen_after=self.settings.frozen_after,
        )
        self._goal = goal

    def _feed_back(self, handle: Any) -> None:
        progress, loop = self.sink.progress, self.loop
        if not handle.is_active or loop is None:
            return
        feedback = RunTask.Feedback(
            tick=progress.ticks,
            seconds=float(progress.ticks * loop.period),
            motion=self.safety.state.value,
            motion_cause=self.safety.cause,
            adapter_id=progress.adapter_id,
            missed=loop.timing.missed,
        )
        handle.publish_feedback(feedback)

    def _mark(self, kind: int, result: RunTask.Result | None) -> None:
        goal, client = self._goal, self.client
        if goal is None or client is None:
            return
        mark = msg.EpisodeMark(
            stamp=self.clock.to_ros(self.clock.now()),
            kind=kind,
            episode=goal.episode,
            task=goal.task,
            instruction=goal.instruction,
            mode=goal.mode,
            contract_id=self.contract.id,
            adapter_id=client.adapter_id,
            temperature=goal.temperature,
            seed=goal.seed,
        )
        if result is not None:
            mark.termination, mark.outcome = result.termination, result.outcome
            mark.outcome_source = result.outcome_source
        self._marks.publish(mark)

    def _publish_status(self) -> None:
        client = self.client
        if client is None:
            return
        policy, goal, loop = client.status(), self._goal, self.loop
        if self.sessions is not None and self.sessions.session is not None and policy.adapter_id:
            self.sessions.session.adapter(policy.adapter_id)  # a policy that follows a tag swaps without being asked
        status = msg.PolicyStatus(
            state=policy.state,
            error=policy.error,
            contract_id=self.contract.id,
            base_hash=policy.base_hash,
            adapter_id=policy.adapter_id,
            swapping=policy.swapping,
            running=goal is not None,
            instruction=goal.instruction if goal else "",
            motion=self.safety.state.value,
            motion_cause=self.safety.cause,
            inference=policy.inference,
            asked=policy.asked,
            answered=policy.answered,
            restarts=policy.restarts,
            observation_skew=float(self.robot.skew),
        )
        if loop is not None:
            recent = loop.timing.jitter[-RECENT:]
            status.ticks, status.missed = self.sink.progress.ticks, loop.timing.missed
            status.jitter_p99 = float(np.percentile(recent, 99)) if len(recent) else 0.0
        status.header.stamp = self.clock.to_ros(self.clock.now())
        self._status.publish(status)

    def _join(self, wait: float) -> None:
        """The task's thread ends by itself after the controlled stop."""
        ended = threading.Event()
        self._thread.add_done_callback(lambda _: ended.set())
        if not ended.wait(wait):
            self.get_logger().error("[ros.stuck] the control loop did not end; the safety node holds the arm")

    def _keep(self, thing: Any) -> Any:
        self._things.append(thing)
        return thing


def main() -> int:
    return spin(PolicyNode)


if __name__ == "__main__":
    raise SystemExit(main())
