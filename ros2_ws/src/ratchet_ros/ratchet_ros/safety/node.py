"""safety_node: the independent command filter between whoever commands and the arm's own topics.

Knows the arm's command topics and is their only publisher. Commands come on `command`, what became of them goes out on
`applied`; kill the sender and the arm brakes and holds. Not a safety-rated function: the robot's own limits and
emergency stop stay in force, and stay necessary.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ratchet_msgs import msg, srv
from rclpy.action import ActionClient
from rosgraph_msgs.msg import Clock as ClockMessage
from std_msgs.msg import Bool
from std_srvs.srv import SetBool, Trigger

from ratchet_ros.messages import convert, encode, qos
from ratchet_ros.messages.intake import Intake, require_topic_mapping
from ratchet_ros.messages.times import SimulatedTime, SteadyTime, TimeBase, seconds
from ratchet_ros.nodes.base import ERROR, OK, WARN, Line, RatchetNode, spin
from ratchet_ros.nodes.params import parameter
from ratchet_ros.safety.command_filter import CommandFilter, IncomingCommand
from ratchet_vla.contract import CommandSink, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Mark, SafetyEvent
from ratchet_vla.runtime.control.priority import real_time
from ratchet_vla.runtime.safety.filter import FilterResult, SafetyConfig, SafetyState
from ratchet_vla.runtime.safety.types import LATCHING

BROKEN = 70  # exit status of a node whose command filter ended
FOREVER = 1e9  # s; in lock-step the clock stands still for as long as the policy thinks
KINDS = {msg.Command.ACTION: "action", msg.Command.HOLD: "hold", msg.Command.STOP: "stop"}


@dataclass(frozen=True)
class Parameters:
    contract: str = parameter("", "Path of the robot contract (YAML).")
    resume: str = parameter(
        "automatic",
        "After a hold that is not latched: go on by itself with the ramp, or wait for ~/resume.",
        one_of=("automatic", "manual"),
    )
    dead_man: bool = parameter(False, "Motion needs the dead-man switch of an OperatorInput.")
    dead_man_timeout: float = parameter(
        0.2, "Seconds for which one report of the dead-man switch holds.", low=0.02, high=2.0
    )
    lock_step: bool = parameter(False, "Simulation only: time stands still while commands travel.")
    clock_timeout: float = parameter(
        1.0, "Simulation only: real seconds without /clock after which the arm is held.", low=0.1, high=600.0
    )


class SafetyNode(RatchetNode):
    """See the module's words; topics and services are listed in docs/ros.md."""

    Parameters = Parameters

    def __init__(self, **options: Any) -> None:
        super().__init__("safety_node", **options)
        self.command_filter: CommandFilter | None = None
        self._things: list[Any] = []
        self._kinds: dict[str, Any] = {}
        self._e_stop_pressed = False

    # -- lifecycle -------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        self.contract = RobotContract.load(self.settings.contract)
        topic_mapping = require_topic_mapping(self.contract)
        simulated = bool(self.get_parameter("use_sim_time").value)
        timeout = FOREVER if self.settings.lock_step else self.settings.clock_timeout
        self.clock: TimeBase = SimulatedTime(timeout) if simulated else SteadyTime()
        lock_step = bool(self.settings.lock_step)
        if lock_step and not simulated:
            raise RatchetError("ros.bad_parameter", "lock_step needs use_sim_time", where="lock_step")
        if simulated:
            profile = qos.LOCK_STEP if lock_step else qos.CLOCK
            self._keep(self.create_subscription(ClockMessage, "/clock", self._on_clock, profile))
        self.intake = Intake(
            self,
            self.contract,
            self.clock,
            cameras=(),
            max_skew=np.inf,
            reliable=lock_step,
            on_data=lambda: self.command_filter.arrived() if self.command_filter else None,
        )
        config = SafetyConfig(
            latch_on=LATCHING | {"safety.second_sender"},
            resume=self.settings.resume,
            dead_man=self.settings.dead_man,
            dead_man_timeout=self.settings.dead_man_timeout,
            clock_may_pause=simulated and not lock_step,
        )
        self.command_filter = CommandFilter(
            self.contract,
            self.intake.aligner,
            self.clock,
            self._send,
            self._told,
            config,
            broken=self._broken,
            lock_step=lock_step,
            wake=(lambda: None) if simulated else self._hurry,
        )
        gauge = self.command_filter.safety.limiter.gauge
        self._sinks: list[tuple[CommandSink, Any, list[int], Callable[[Any], None]]] = []
        self._to_arm: list[Any] = []
        names = [d.name for d in self.contract.action.dims]
        for sink in topic_mapping.commands:
            encoder = encode.make_encoder(self.contract, sink, gauge.position_field, gauge.rotation_field)
            self._require_alone(sink.topic)
            out = self._output(sink)
            self._sinks.append((sink, encoder, [names.index(d) for d in sink.dims], out))
        self._applied_out = self._keep(self.create_publisher(msg.Applied, "applied", qos.EVENTS))
        self._events = self._keep(self.create_publisher(msg.SafetyEvent, "safety_events", qos.EVENTS))
        self._status = self._keep(self.create_publisher(msg.SafetyStatus, "safety_status", qos.STATUS))
        self._keep(self.create_subscription(msg.Command, "command", self._on_command, qos.COMMANDS))
        self._keep(self.create_subscription(msg.OperatorInput, "operator", self._on_operator, qos.INPUT))
        for profile in qos.STOP_BUTTONS:
            self._keep(self.create_subscription(Bool, "e_stop", self._on_e_stop, profile))
        self._keep(self.create_service(SetBool, "~/e_stop", self._serve_e_stop))
        self._keep(self.create_service(Trigger, "~/resume", self._serve_resume))
        self._keep(self.create_service(srv.ClearFault, "~/clear_fault", self._serve_clear))
        self._timer = self.create_timer(0.5, self._publish_status, clock=self._steady())

    def start(self) -> None:
        for sink, _, _, _ in self._sinks:
            self._require_alone(sink.topic)
        if self.settings.lock_step:
            self._require_arm()
        assert self.command_filter is not None
        if self._e_stop_pressed:
            self.command_filter.e_stop(True)
        self.command_filter.start()
        self._publish_status()

    def halt(self) -> None:
        if self.command_filter is not None:
            self.command_filter.stop()
            self._publish_status()

    def teardown(self) -> None:
        if self.command_filter is None and not self._things:
            return
        self.command_filter = None
        if hasattr(self, "intake"):
            self.intake.close()
        if hasattr(self, "_timer"):
            self.destroy_timer(self._timer)
        for thing in self._things:
            thing.destroy()
        self._things = []
        self._kinds = {}

    def diagnose(self) -> list[Line]:
        assert self.command_filter is not None
        command_filter = self.command_filter
        lines: list[Line] = []
        state = command_filter.safety.state
        level = ERROR if state is SafetyState.LATCHED else WARN if state is SafetyState.HOLDING else OK
        text = f"{state.value}{f' ({command_filter.safety.cause})' if command_filter.safety.cause else ''}"
        lines.append(
            (
                level,
                "safety",
                text,
                {"commands": command_filter.commands, "interventions": command_filter.changed_commands},
            )
        )
        missing = self.intake.missing()
        problems = "; ".join(str(e) for e in self.intake.problems.values())
        text = f"missing {', '.join(missing)}" if missing else problems or "complete"
        age = self.clock.now() - self.intake.aligner.state_stamp()
        lines.append((ERROR if missing or problems else OK, "state", text, {"age_s": f"{age:.4f}"}))
        for sink, _, _, _ in self._sinks:
            try:
                self._require_alone(sink.topic)
            except RatchetError as error:
                command_filter.fail("safety.second_sender", error.what)
                lines.append((ERROR, "command topic", str(error), {}))
        return lines

    # -- in --------------------------------------------------------------------------------------------------------

    def _on_clock(self, message: ClockMessage) -> None:
        self.clock.update(seconds(message.clock))  # type: ignore[attr-defined]

    def _on_command(self, message: msg.Command) -> None:
        if not self.active or self.command_filter is None:
            return
        kind = KINDS.get(message.kind)
        if kind is None:
            self.command_filter.fail("safety.bad_action", f"a command of unknown kind {message.kind}")
            return
        action = np.frombuffer(message.action, np.float32) if kind == "action" else None
        self.command_filter.put(
            IncomingCommand(
                kind=kind,
                action=action,
                stamp=self.clock.from_ros(message.stamp),
                due=self.clock.from_ros(message.due),
                session=message.session,
                number=message.number,
                chunk_sequence=message.chunk_sequence,
                chunk_offset=message.chunk_offset,
                adapter_id=message.adapter_id,
                marks=Mark(message.marks),
            )
        )

    def _on_operator(self, message: msg.OperatorInput) -> None:
        if self.command_filter is not None:
            self.command_filter.dead_man(message.dead_man)

    def _on_e_stop(self, message: Bool) -> None:
        self._e_stop_pressed = message.data
        if self.command_filter is not None:
            self.command_filter.e_stop(message.data)
            self._publish_status()

    def _serve_e_stop(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._on_e_stop(Bool(data=request.data))
        response.success = True
        response.message = "pressed: clear_fault is needed before motion" if request.data else "released"
        return response

    def _serve_resume(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        assert self.command_filter is not None
        self.command_filter.safety.resume()
        response.success = True
        return response

    def _serve_clear(self, request: srv.ClearFault.Request, response: srv.ClearFault.Response) -> Any:
        assert self.command_filter is not None
        try:
            response.cleared = self.command_filter.safety.cause
            event = self.command_filter.clear(request.person)
        except RatchetError as error:
            return convert.refused(response, error)
        response.success, response.message = True, event.message
        self._publish_status()
        return response

    # -- out -------------------------------------------------------------------------------------------------------

    def _send(self, result: FilterResult, command: IncomingCommand | None, new: bool) -> None:
        """To the arm first, then what became of it to whoever wants to know. Called from the filter's thread."""
        stamp = self.clock.to_ros(self.clock.now())
        state = self._measured()
        if result.command is not None:
            values = result.command.astype(np.float64)
            for _, encoder, places, out in self._sinks:
                message = encoder.action(values[places], state, stamp)
                if message is not None:
                    out(message)
        elif new:
            for _, encoder, _, out in self._sinks:
                message = encoder.hold(state, stamp)
                if message is not None:
                    out(message)
        self._applied_out.publish(
            msg.Applied(
                stamp=stamp,
                session=command.session if command else 0,
                number=command.number if command else 0,
                marks=int(result.marks),
                sent=result.command is not None or new,
                action=convert.floats(result.command) if result.command is not None else convert.floats([]),
                chunk_sequence=command.chunk_sequence if command else -1,
                chunk_offset=command.chunk_offset if command else -1,
                adapter_id=command.adapter_id if command else "",
            )
        )
        words = (result.state.value, self.command_filter.safety.cause if self.command_filter else "")
        if words != self._said and result.state != SafetyState.WAITING:
            self._publish_status()

    _said = ("", "")

    def _hurry(self) -> None:
        self.get_logger().info(f"command filter: {real_time()}")

    def _broken(self, error: BaseException) -> None:
        """The filter's thread ended: one last hold, then the process goes, so that nobody takes it for alive."""
        self.get_logger().fatal("".join(traceback.format_exception(error)))
        try:
            for _, encoder, _, out in self._sinks:
                message = encoder.hold(self._measured(), self.clock.to_ros(self.clock.now()))
                if message is not None:
                    out(message)
        finally:
            os._exit(BROKEN)

    def _told(self, event: SafetyEvent) -> None:
        self._events.publish(convert.event(event, "safety_node", self.clock))
        log = self.get_logger()
        (log.error if event.latched else log.debug)(f"{event.code}: {event.message}")

    def _publish_status(self) -> None:
        command_filter = self.command_filter
        if command_filter is None:
            return
        state, now = command_filter.safety.state, self.clock.now()
        self._said = (state.value, command_filter.safety.cause)
        age = now - self.intake.aligner.state_stamp()
        status = msg.SafetyStatus(
            state=state.value,
            cause=command_filter.safety.cause,
            latched=state is SafetyState.LATCHED,
            e_stop=self._e_stop_pressed,
            dead_man_required=bool(self.settings.dead_man),
            commands=command_filter.commands,
            interventions=command_filter.changed_commands,
            state_age=float(age) if np.isfinite(age) else -1.0,
        )
        status.header.stamp = self.clock.to_ros(now)
        self._status.publish(status)

    def _measured(self) -> dict[str, Any]:
        try:
            return self.intake.aligner.newest_state()[0]
        except RatchetError:
            return {}

    def _output(self, sink: Any) -> Any:
        if sink.kind == "gripper_command":
            client = self._keep(ActionClient(self, encode.gripper_action(), sink.topic))
            return client.send_goal_async
        publisher = self._keep(self.create_publisher(encode.COMMAND_TYPES[sink.kind], sink.topic, qos.COMMANDS))
        self._to_arm.append(publisher)
        return publisher.publish

    def _require_arm(self) -> None:
        """A command that is sent before this node and the arm have found each other is lost. A simulation in lock-step
        would wait for it, and everybody for the simulation."""
        deaf = [p.topic_name for p in self._to_arm if not p.get_subscription_count()]
        if deaf:
            raise RatchetError("ros.no_arm", "nobody takes commands yet", where=", ".join(deaf), fix="start the arm")

    def _require_alone(self, topic: str) -> None:
        """Two publishers on one command topic fight over the arm."""
        mine = self.get_fully_qualified_name()
        others = {f"{i.node_namespace.rstrip('/')}/{i.node_name}" for i in self.get_publishers_info_by_topic(topic)} - {
            mine
        }
        if others:
            raise RatchetError(
                "ros.second_publisher",
                f"{', '.join(sorted(others))} publishes commands too",
                where=topic,
                fix="stop it; only the safety node may command the arm",
            )

    def _keep(self, thing: Any) -> Any:
        self._things.append(thing)
        return thing

    def _steady(self) -> Any:
        from rclpy.clock import Clock, ClockType

        return Clock(clock_type=ClockType.STEADY_TIME)


def main() -> int:
    return spin(SafetyNode)


if __name__ == "__main__":
    raise SystemExit(main())
