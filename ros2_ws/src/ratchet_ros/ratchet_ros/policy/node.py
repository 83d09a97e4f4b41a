"""policy_node: cameras and state in, commands for the safety node out; RunTask, adapter exchange, status.

Knows the node's lifecycle and the topics that come in; each server has a module of its own beside this one. The work is
ratchet_vla.runtime's: the control loop runs in a thread of its own, the policy in a process of its own, so neither a
slow model nor this node's callbacks move a deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ratchet_msgs import msg
from rclpy.clock import Clock, ClockType
from rosgraph_msgs.msg import Clock as ClockMessage
from std_msgs.msg import Bool

from ratchet_ros.messages import convert, qos
from ratchet_ros.messages.intake import Intake
from ratchet_ros.messages.times import TimeBase, seconds, time_base
from ratchet_ros.nodes.base import Line, RatchetNode, spin
from ratchet_ros.policy import params as policy_params
from ratchet_ros.policy import task_run, wire_tap
from ratchet_ros.policy.labeller import RosLabeller
from ratchet_ros.policy.parts import PolicyParts
from ratchet_ros.policy.recording import EpisodeRecording
from ratchet_ros.policy.robot import LockStepRosRobot, NotingSafety, RosRobot, StampedRosRobot
from ratchet_ros.policy.safety_link import SafetyNodeLink
from ratchet_ros.policy.servers.adapter_services import AdapterServices
from ratchet_ros.policy.servers.episode_services import EpisodeServices
from ratchet_ros.policy.servers.fault_services import FaultServices
from ratchet_ros.policy.servers.status import StatusReports
from ratchet_ros.policy.servers.task_server import TaskServer
from ratchet_ros.policy.sessions import NodeSessions, open_sessions
from ratchet_vla.contract import RobotContract
from ratchet_vla.records import ActionChunk, SafetyEvent, UInt8
from ratchet_vla.runtime.inference.client import PolicyClient

STATUS_PERIOD_S = 0.5


class PolicyNode(RatchetNode):
    """See the module's words; topics and services are listed in docs/ros.md.

    Every callback here runs on the executor thread, except `_publish_chunk` and `_publish_event`: those are the control
    loop's sink and run in its thread.
    """

    Parameters = policy_params.Parameters
    TaskServer: type[TaskServer] = TaskServer

    def __init__(self, **options: Any) -> None:
        super().__init__("policy_node", **options)
        # Kept one by one, as a setup that fails half-way leaves some of them to be closed.
        self.client: PolicyClient | None = None
        self.intake: Intake | None = None
        self.recording: EpisodeRecording | None = None
        self.sessions: NodeSessions | None = None
        self.tasks: TaskServer | None = None
        self.reports: StatusReports | None = None
        self._entities: list[Any] = []
        self._timers_kept: list[Any] = []

    # -- lifecycle -------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Start the policy process and, where asked for, the recorder; create publishers and servers."""
        settings = self.settings
        self.contract = RobotContract.load(settings.contract)
        simulated = bool(self.get_parameter("use_sim_time").value)
        lock_step = bool(settings.lock_step)
        self.clock: TimeBase = time_base(
            simulated, lock_step, stall_timeout_s=settings.patience if lock_step else settings.clock_timeout
        )
        if simulated:
            profile = qos.LOCK_STEP if lock_step else qos.CLOCK
            self._keep(self.create_subscription(ClockMessage, "/clock", self._on_clock, profile))
        self.safety = NotingSafety(self.contract, policy_params.safety_config(settings, simulated))
        self.client = PolicyClient(self.contract, policy_params.launch(settings))
        spec = self.client.start()
        policy_params.executor(settings, settings.mode, self.contract, spec.chunk)  # refuses a bad mode or use now
        if self.client.computing:
            self.get_logger().info(f"the policy computes in {self.client.computing}")
        for warning in self.client.warnings:
            self.get_logger().warning(warning)
        self.safety_node = self._keep(SafetyNodeLink(self, self._on_safety_status))
        self.robot = self._make_robot(spec.cameras)
        self.safety.robot = self.robot
        self.robot.fail = self.safety.fail
        control_period_s = 1.0 / self.contract.control_hz
        self.labeller = RosLabeller(settings.judge, control_period_s, settings.patience if lock_step else 0.0)
        calibrations = policy_params.calibrations(settings)
        if settings.episodes:
            self._open_recording(calibrations)
        self.sessions = open_sessions(settings, self.contract, self.client, calibrations, self.get_logger())
        assert self.intake is not None
        parts = PolicyParts(
            node=self,
            contract=self.contract,
            clock=self.clock,
            client=self.client,
            intake=self.intake,
            robot=self.robot,
            safety=self.safety,
            safety_node=self.safety_node,
            labeller=self.labeller,
            recording=self.recording,
            sessions=self.sessions,
            chunk_steps=spec.chunk,
        )
        self._make_servers(parts)
        self._make_subscriptions()
        for work in (self._publish_status, self._look_for_sessions):
            self._timers_kept.append(
                self.create_timer(STATUS_PERIOD_S, work, clock=Clock(clock_type=ClockType.STEADY_TIME))
            )

    def start(self) -> None:
        """Active means that a goal can move the arm, so the safety node and every source must be there."""
        self.safety_node.require()
        self.robot.connect()
        self._publish_status()

    def halt(self) -> None:
        """Cancel the running task and wait for its controlled stop."""
        if self.tasks is not None:
            self.tasks.stop()
        self._publish_status()

    def teardown(self) -> None:
        """The policy process ends first, so that nothing decides any more; what it told is written before ROS goes."""
        if self.client is not None:
            self.client.stop()
            self.client = None
        if self.recording is not None:
            self.recording.close()
            self.recording = None
        if self.sessions is not None:
            self.sessions.close()
            self.sessions = None
        if self.intake is not None:
            self.intake.close()
            self.intake = None
        for timer in self._timers_kept:
            self.destroy_timer(timer)
        for entity in self._entities:
            entity.destroy()
        self.tasks = None
        self.reports = None
        self._timers_kept = []
        self._entities = []

    def diagnose(self) -> list[Line]:
        """See `StatusReports.diagnose`."""
        assert self.reports is not None
        return self.reports.diagnose()

    # -- setup, piece by piece -------------------------------------------------------------------------------------

    def _make_robot(self, cameras: tuple[str, ...]) -> RosRobot:
        """The arm and its intake. cameras: those that the policy sees; a recording keeps the others too."""
        settings = self.settings
        max_skew_s = settings.max_skew or self.contract.watchdog.observation_max_age
        on_data: list[Callable[[], None]] = []  # of the robot in lock-step, which is made after the intake

        def wake() -> None:
            for callback in on_data:
                callback()

        recorded_only: list[str] = []
        if settings.episodes:
            recorded_only = [camera.name for camera in self.contract.cameras if camera.name not in cameras]
        self.intake = Intake(
            self,
            self.contract,
            self.clock,
            cameras=cameras,
            max_skew=max_skew_s,
            reliable=settings.lock_step,
            on_data=wake,
            others=recorded_only,
            on_frame=self._on_frame,
        )
        publish = self.safety_node.commands.publish
        if settings.lock_step:
            robot = LockStepRosRobot(self.contract, self.intake, self.clock, publish, settings.patience)
            on_data.append(robot.arrived)
            return robot
        return StampedRosRobot(self.contract, self.intake, self.clock, publish)

    def _open_recording(self, calibrations: dict[str, str]) -> None:
        settings = self.settings
        wire_sources = wire_tap.sources(self, self.contract, settings.record_wire, settings.lock_step)
        self.recording = EpisodeRecording(
            Path(settings.episodes),
            self.contract,
            self.clock,
            self.robot,
            policy_params.recorder_config(settings),
            calibrations=calibrations,
            wire=wire_tap.channels(wire_sources),
        )
        self._keep(wire_tap.WireTap(self, wire_sources, self.recording.recorder.wire))

    def _make_servers(self, parts: PolicyParts) -> None:
        self._chunks = self._keep(self.create_publisher(msg.ActionChunk, "chunks", qos.EVENTS))
        self._events = self._keep(self.create_publisher(msg.SafetyEvent, "safety_events", qos.EVENTS))
        sink = task_run.NodeSink(self._publish_chunk, self._publish_event)
        self.tasks = self._keep(
            self.TaskServer(parts, sink, lambda: self.episode_services.by_hand, self._publish_status)
        )
        tasks = self.tasks
        assert tasks is not None
        self.reports = self._keep(StatusReports(parts, tasks))
        self.episode_services = self._keep(
            EpisodeServices(
                self,
                parts.recording,
                parts.intake,
                parts.clock,
                next_name=parts.sessions.next_episode_name,
                running_task=lambda: tasks.running_task,
            )
        )
        self._keep(AdapterServices(self, parts.client, self._publish_status))
        self._keep(FaultServices(self, parts.safety, parts.safety_node, self._publish_event, self._publish_status))

    def _make_subscriptions(self) -> None:
        self._keep(self.create_subscription(msg.OperatorInput, "operator", self._on_operator, qos.INPUT))
        for profile in qos.STOP_BUTTONS:
            self._keep(self.create_subscription(Bool, "e_stop", self._on_e_stop, profile))
        if self.recording is not None:
            self._keep(self.create_subscription(msg.Applied, "applied", self._on_applied, qos.EVENTS))
            self._keep(self.create_subscription(msg.SafetyEvent, "safety_events", self._on_foreign_event, qos.EVENTS))
        if self.settings.judge == "scene":
            self._keep(self.create_subscription(msg.SceneStatus, "scene_status", self.labeller.scene, qos.STATUS))

    # -- what comes in ---------------------------------------------------------------------------------------------

    def _on_clock(self, message: ClockMessage) -> None:
        self.clock.update(seconds(message.clock))  # type: ignore[attr-defined]

    def _on_safety_status(self, status: msg.SafetyStatus) -> None:
        """A safety node that is latched ends the running task: it lets nothing through any more."""
        if not status.latched or self.tasks is None or self.tasks.goal is None:
            return
        if isinstance(self.robot, LockStepRosRobot):
            self.robot.abandon(True)
        self.safety.fail(policy_params.FILTER_LATCHED, f"the safety node stopped the arm: {status.cause}")

    def _on_e_stop(self, message: Bool) -> None:
        self.safety.e_stop(message.data)

    def _on_operator(self, message: msg.OperatorInput) -> None:
        self.safety.dead_man(message.dead_man, self.clock.now())
        self.labeller.operator(message)
        self.episode_services.on_operator(message)
        if self.tasks is None or self.tasks.loop is None or self.tasks.goal is None:
            return
        intervenes = message.intervene and len(message.action) == self.contract.action.size
        self.tasks.loop.human(np.frombuffer(message.action, np.float32) if intervenes else None)

    def _on_frame(self, camera: str, image: UInt8, stamp: float) -> None:
        if self.recording is not None:
            self.recording.frame(camera, image, stamp)

    def _on_applied(self, message: msg.Applied) -> None:
        if self.recording is not None:
            self.recording.on_applied(message)
            self.episode_services.on_applied(message)

    def _on_foreign_event(self, message: msg.SafetyEvent) -> None:
        """Events of other nodes; this node's own reach the recording through the loop's sink."""
        if message.node != "policy_node" and self.recording is not None:
            self.recording.on_event(message)

    # -- what goes out ---------------------------------------------------------------------------------------------

    def _publish_chunk(self, chunk: ActionChunk) -> None:
        self._chunks.publish(convert.chunk(chunk, self.robot.image_stamps, self.clock))

    def _publish_event(self, event: SafetyEvent) -> None:
        self._events.publish(convert.event(event, "policy_node", self.clock))
        line = f"{event.code}: {event.message}"
        if event.latched:
            self.get_logger().error(line)
        else:
            self.get_logger().debug(line)

    def _publish_status(self) -> None:
        if self.reports is not None and self.client is not None:
            self.reports.publish()

    def _look_for_sessions(self) -> None:
        """Start or stop a session where somebody wishes it; between two episodes, so that each belongs to one."""
        busy = self.tasks is None or self.tasks.goal is not None or self.episode_services.by_hand
        if self.sessions is not None and not busy:
            self.sessions.look()

    def _keep(self, entity: Any) -> Any:
        """Remember what teardown has to destroy."""
        self._entities.append(entity)
        return entity


def main() -> int:
    """Run policy_node; the process's exit status."""
    return spin(PolicyNode)


if __name__ == "__main__":
    raise SystemExit(main())
