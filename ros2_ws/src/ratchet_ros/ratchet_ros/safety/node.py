"""safety_node: the independent command filter between whoever commands and the arm's own topics.

Knows the arm's command topics and is their only publisher. Commands come on `command`, what became of them goes out on
`applied`; kill the sender and the arm brakes and holds. Not a safety-rated function: the robot's own limits and
emergency stop stay in force, and stay necessary.
"""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ratchet_msgs import msg, srv
from rclpy.clock import Clock, ClockType
from rosgraph_msgs.msg import Clock as ClockMessage
from std_msgs.msg import Bool
from std_srvs.srv import SetBool, Trigger

from ratchet_ros.messages import convert, qos
from ratchet_ros.messages.intake import Intake, require_topic_mapping
from ratchet_ros.messages.times import TimeBase, seconds, time_base
from ratchet_ros.nodes.base import ERROR, OK, WARN, Line, RatchetNode, spin
from ratchet_ros.nodes.params import parameter
from ratchet_ros.safety.arm_outputs import ArmOutputs
from ratchet_ros.safety.command_filter import CommandFilter, FilterCallbacks, IncomingCommand
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Mark, SafetyEvent
from ratchet_vla.runtime.control.priority import real_time
from ratchet_vla.runtime.safety.filter import FilterResult, SafetyConfig, SafetyState
from ratchet_vla.runtime.safety.types import LATCHING

FILTER_DIED = 70  # exit status of a node whose command filter ended
NEVER_STALLS_S = 1e9  # in lock-step the clock stands still for as long as the policy thinks
STATUS_PERIOD_S = 0.5
KINDS: dict[int, Literal["action", "hold", "stop"]] = {
    msg.Command.ACTION: "action",
    msg.Command.HOLD: "hold",
    msg.Command.STOP: "stop",
}


@dataclass(frozen=True)
class Parameters:
    """Typed, bounded parameters of safety_node."""

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
    """See the module's words; topics and services are listed in docs/ros.md.

    Callbacks run on the executor thread. `_send`, `_publish_event` and `_filter_died` are called from the command
    filter's thread, which must not wait for the executor.
    """

    Parameters = Parameters

    def __init__(self, **options: Any) -> None:
        super().__init__("safety_node", **options)
        self.command_filter: CommandFilter | None = None
        self.intake: Intake | None = None
        self._outputs: ArmOutputs | None = None
        self._status_timer: Any = None
        self._entities: list[Any] = []
        self._e_stop_pressed = False
        self._published_motion = ("", "")  # state and cause in the newest SafetyStatus

    # -- lifecycle -------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Make the filter, the arm's outputs and every topic; the filter's thread starts with `start`."""
        settings = self.settings
        self.contract = RobotContract.load(settings.contract)
        require_topic_mapping(self.contract)
        simulated = bool(self.get_parameter("use_sim_time").value)
        lock_step = bool(settings.lock_step)
        self.clock: TimeBase = time_base(
            simulated, lock_step, stall_timeout_s=NEVER_STALLS_S if lock_step else settings.clock_timeout
        )
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
            resume=settings.resume,
            dead_man=settings.dead_man,
            dead_man_timeout=settings.dead_man_timeout,
            clock_may_pause=simulated and not lock_step,
        )
        callbacks = FilterCallbacks(
            send=self._send,
            on_event=self._publish_event,
            on_thread_start=(lambda: None) if simulated else self._raise_priority,
            on_thread_death=self._filter_died,
        )
        self.command_filter = CommandFilter(
            self.contract, self.intake.aligner, self.clock, callbacks, config, lock_step=lock_step
        )
        gauge = self.command_filter.safety.limiter.gauge
        self._outputs = self._keep(ArmOutputs(self, self.contract, gauge.position_field, gauge.rotation_field))
        self._applied_publisher = self._keep(self.create_publisher(msg.Applied, "applied", qos.EVENTS))
        self._events = self._keep(self.create_publisher(msg.SafetyEvent, "safety_events", qos.EVENTS))
        self._status = self._keep(self.create_publisher(msg.SafetyStatus, "safety_status", qos.STATUS))
        self._keep(self.create_subscription(msg.Command, "command", self._on_command, qos.COMMANDS))
        self._keep(self.create_subscription(msg.OperatorInput, "operator", self._on_operator, qos.INPUT))
        for profile in qos.STOP_BUTTONS:
            self._keep(self.create_subscription(Bool, "e_stop", self._on_e_stop, profile))
        self._keep(self.create_service(SetBool, "~/e_stop", self._serve_e_stop))
        self._keep(self.create_service(Trigger, "~/resume", self._serve_resume))
        self._keep(self.create_service(srv.ClearFault, "~/clear_fault", self._serve_clear))
        steady_clock = Clock(clock_type=ClockType.STEADY_TIME)
        self._status_timer = self.create_timer(STATUS_PERIOD_S, self._publish_status, clock=steady_clock)

    def start(self) -> None:
        """Let commands through. Raises RatchetError ros.second_publisher, and in lock-step ros.no_arm."""
        assert self.command_filter is not None
        assert self._outputs is not None
        self._outputs.require_only_publisher()
        if self.settings.lock_step:
            self._outputs.require_arm()
        if self._e_stop_pressed:
            self.command_filter.e_stop(True)
        self.command_filter.start()
        self._publish_status()

    def halt(self) -> None:
        """Brake, hold, end the filter's thread."""
        if self.command_filter is not None:
            self.command_filter.stop()
            self._publish_status()

    def teardown(self) -> None:
        """Remove what `setup` made, also after half a setup."""
        self.command_filter = None
        self._outputs = None
        if self.intake is not None:
            self.intake.close()
            self.intake = None
        if self._status_timer is not None:
            self.destroy_timer(self._status_timer)
            self._status_timer = None
        for entity in self._entities:
            entity.destroy()
        self._entities = []

    def diagnose(self) -> list[Line]:
        """Lines on the filter, the state and other publishers; a second publisher is a fault of the filter."""
        assert self.command_filter is not None
        assert self.intake is not None
        assert self._outputs is not None
        text, complete = self.intake.describe()
        age_s = self.clock.now() - self.intake.aligner.state_stamp()
        lines = [
            self._filter_line(self.command_filter),
            (OK if complete else ERROR, "state", text, {"age_s": f"{age_s:.4f}"}),
        ]
        for error in self._outputs.second_publishers():
            self.command_filter.fail("safety.second_sender", error.what)
            lines.append((ERROR, "command topic", str(error), {}))
        return lines

    def _filter_line(self, command_filter: CommandFilter) -> Line:
        state = command_filter.safety.state
        cause = command_filter.safety.cause
        level = {SafetyState.LATCHED: ERROR, SafetyState.HOLDING: WARN}.get(state, OK)
        counts = {"commands": command_filter.commands, "interventions": command_filter.changed_commands}
        return (level, "safety", f"{state.value} ({cause})" if cause else state.value, counts)

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
        assert self._outputs is not None
        state = self._measured()
        if result.command is not None:
            self._outputs.command(result.command, state, stamp)
        elif new:
            self._outputs.hold(state, stamp)
        self._applied_publisher.publish(
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
        motion = (result.state.value, self.command_filter.safety.cause if self.command_filter else "")
        # An arm that waits for the next chunk does so every few periods; the status timer tells of that.
        if motion != self._published_motion and result.state != SafetyState.WAITING:
            self._publish_status()

    def _raise_priority(self) -> None:
        self.get_logger().info(f"command filter: {real_time()}")

    def _filter_died(self, error: BaseException) -> None:
        """The filter's thread ended: one last hold, then the process goes, so that nobody takes it for alive."""
        self.get_logger().fatal("".join(traceback.format_exception(error)))
        try:
            if self._outputs is not None:
                self._outputs.hold(self._measured(), self.clock.to_ros(self.clock.now()))
        finally:
            os._exit(FILTER_DIED)

    def _publish_event(self, event: SafetyEvent) -> None:
        self._events.publish(convert.event(event, "safety_node", self.clock))
        line = f"{event.code}: {event.message}"
        if event.latched:
            self.get_logger().error(line)
        else:
            self.get_logger().debug(line)

    def _publish_status(self) -> None:
        command_filter = self.command_filter
        if command_filter is None or self.intake is None:
            return
        state = command_filter.safety.state
        now = self.clock.now()
        self._published_motion = (state.value, command_filter.safety.cause)
        age_s = now - self.intake.aligner.state_stamp()
        status = msg.SafetyStatus(
            state=state.value,
            cause=command_filter.safety.cause,
            latched=state is SafetyState.LATCHED,
            e_stop=self._e_stop_pressed,
            dead_man_required=bool(self.settings.dead_man),
            commands=command_filter.commands,
            interventions=command_filter.changed_commands,
            state_age=float(age_s) if np.isfinite(age_s) else -1.0,
        )
        status.header.stamp = self.clock.to_ros(now)
        self._status.publish(status)

    def _measured(self) -> dict[str, Any]:
        """The newest state; empty before the first."""
        if self.intake is None:
            return {}
        try:
            return self.intake.aligner.newest_state()[0]
        except RatchetError:
            return {}

    def _keep(self, entity: Any) -> Any:
        """Remember what teardown has to destroy."""
        self._entities.append(entity)
        return entity


def main() -> int:
    """Run safety_node; the process's exit status."""
    return spin(SafetyNode)


if __name__ == "__main__":
    raise SystemExit(main())
