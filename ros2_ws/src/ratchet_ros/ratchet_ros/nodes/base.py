"""The base of every node: lifecycle, parameters, diagnostics, and refusals worded in one line.

Knows rclpy's lifecycle and one SingleThreadedExecutor. Knows no robot and no policy.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from lifecycle_msgs.msg import State as LifecycleState
from rcl_interfaces.msg import SetParametersResult
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.lifecycle import LifecycleState as State
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions

from ratchet_ros.messages import dds
from ratchet_ros.nodes import params
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.startup_retries import passes, waits

REFUSED = 2  # exit status of a node that was given what it cannot run with
AGAIN = 0.5  # s between two attempts to come up
REMIND = 5.0  # s between two lines on the same wait
OK, WARN, ERROR, STALE = (DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR, DiagnosticStatus.STALE)
SWITCH_INTERVAL = 0.0005  # s; with Python's 5 ms a busy callback delays the command thread visibly

Line = tuple[bytes, str, str, dict[str, Any]]  # level, task, message, values


class RatchetNode(LifecycleNode):  # type: ignore[misc]  # rclpy is not among the packages that are checked
    """A lifecycle node. Subclasses give `Parameters` and override `setup`, `start`, `halt`, `teardown`, `diagnose`."""

    Parameters: type[Any]

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.declare_parameter("autostart", False)
        params.declare(self, self.Parameters)
        self.settings: Any = None
        self.refused: RatchetError | None = None
        self.given_up = False  # what it was given cannot work, however long it waits
        self._active = False
        self.add_on_set_parameters_callback(self._on_parameters)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._diagnose_timer = self.create_timer(1.0, self._publish_diagnostics, clock=rclpy.clock.Clock())
        self._kick: Any = None
        if self.get_parameter("autostart").value:
            self._kick = self.create_timer(0.0, self._autostart, clock=rclpy.clock.Clock())

    # -- what subclasses do ----------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Configure: read files, create publishers and subscriptions. Raises RatchetError to refuse."""

    def start(self) -> None:
        """Activate. Raises RatchetError to refuse."""

    def halt(self) -> None:
        """Deactivate: come to rest. Must not raise."""

    def teardown(self) -> None:
        """Clean up what `setup` made. Must not raise, also after half a setup."""

    def diagnose(self) -> list[Line]:
        """Lines for /diagnostics, once a second."""
        return []

    def changed(self) -> None:
        """Live parameters changed; `settings` is new."""

    # -- lifecycle -------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return self._active

    def on_configure(self, state: State) -> TransitionCallbackReturn:
        try:
            self.refused = None
            self.settings = params.read(self, self.Parameters)
            self.setup()
        except Exception as error:  # rclpy drops what a transition raises without a word
            self._refuse(error)
            self.teardown()
            return TransitionCallbackReturn.FAILURE
        return super().on_configure(state)

    def on_activate(self, state: State) -> TransitionCallbackReturn:
        try:
            self.refused = None
            self.start()
        except Exception as error:
            self._refuse(error)
            return TransitionCallbackReturn.FAILURE
        self._active = True
        self.get_logger().info("active")
        return super().on_activate(state)

    def on_deactivate(self, state: State) -> TransitionCallbackReturn:
        self._active = False
        self.halt()
        return super().on_deactivate(state)

    def on_cleanup(self, state: State) -> TransitionCallbackReturn:
        self.teardown()
        return super().on_cleanup(state)

    def on_shutdown(self, state: State) -> TransitionCallbackReturn:
        if self._active:
            self._active = False
            self.halt()
        self.teardown()
        return super().on_shutdown(state)

    def on_error(self, state: State) -> TransitionCallbackReturn:
        self._active = False
        self.halt()
        self.teardown()
        return super().on_error(state)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _refuse(self, error: Exception) -> None:
        if not isinstance(error, RatchetError):
            self.get_logger().error(traceback.format_exc())
            error = RatchetError("ros.internal", f"{type(error).__name__}: {error}", where=self.get_name())
        self.refused = error
        log = self.get_logger()
        if not self.get_parameter("autostart").value or not passes(error.code):
            log.error(str(error))
        elif waits(error.code):
            log.info(f"waiting: {error}", throttle_duration_sec=REMIND)
        else:
            log.error(str(error), throttle_duration_sec=REMIND)

    def _autostart(self) -> None:
        """One step per call, until active. A refusal that may pass is tried again, as drivers may come up later; after
        any other the process ends."""
        self._kick.cancel()
        self.destroy_timer(self._kick)
        self._kick = None
        state = self._state_machine.current_state[0]
        if state == LifecycleState.PRIMARY_STATE_UNCONFIGURED:
            done = self.trigger_configure() == TransitionCallbackReturn.SUCCESS
        elif state == LifecycleState.PRIMARY_STATE_INACTIVE:
            done = self.trigger_activate() == TransitionCallbackReturn.SUCCESS
        else:
            return
        if not done and self.refused is not None and not passes(self.refused.code):
            self.given_up = True
            return
        self._kick = self.create_timer(0.0 if done else AGAIN, self._autostart, clock=rclpy.clock.Clock())

    def _on_parameters(self, changed: list[Parameter]) -> SetParametersResult:
        configured = self.settings is not None
        reason = params.refusal(self.Parameters, self._active, changed)
        if not reason and configured:
            self._apply = self.create_timer(0.0, self._applied, clock=rclpy.clock.Clock())
        return SetParametersResult(successful=not reason, reason=reason)

    def _applied(self) -> None:
        self._apply.cancel()
        self.settings = params.read(self, self.Parameters)
        self.changed()

    def _publish_diagnostics(self) -> None:
        lines = self.diagnose() if self._active else []
        if self.refused is not None:
            lines.append((ERROR, "lifecycle", str(self.refused), {"code": self.refused.code}))
        elif not lines:
            lines.append((OK, "lifecycle", "active" if self._active else "not active", {}))
        message = DiagnosticArray()
        message.header.stamp = self.get_clock().now().to_msg()
        for level, task, text, values in lines:
            message.status.append(
                DiagnosticStatus(
                    level=level,
                    name=f"{self.get_fully_qualified_name().lstrip('/')}: {task}",
                    message=text,
                    hardware_id="",
                    values=[KeyValue(key=k, value=str(v)) for k, v in values.items()],
                )
            )
        self._diagnostics.publish(message)


def spin(make: Callable[[], RatchetNode], *, loopback: bool = False) -> int:
    """Run one node until SIGINT, SIGTERM, rclpy's shutdown or a refusal for good; the process's exit status."""
    dds.load_profile(loopback)
    sys.setswitchinterval(SWITCH_INTERVAL)
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        executor.wake()

    executor = SingleThreadedExecutor()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    node = make()
    executor.add_node(node)
    try:
        while rclpy.ok() and not stopped and not node.given_up:
            executor.spin_once(timeout_sec=1.0)
    except ExternalShutdownException:
        pass  # somebody else shut ROS down; the node comes to rest below all the same
    finally:
        if node.active:
            node.trigger_deactivate()
        node.trigger_shutdown()
        executor.shutdown(timeout_sec=2.0)
        node.destroy_node()
        rclpy.try_shutdown()
    return REFUSED if node.given_up else 0
