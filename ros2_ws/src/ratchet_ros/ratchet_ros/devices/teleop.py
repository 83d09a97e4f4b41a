"""teleop_node: a gamepad or SpaceMouse (sensor_msgs/Joy) as an operator: dead-man switch, intervention, label.

Knows axes, buttons and the contract's action dimensions. What it sends passes both safety filters like any command.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from ratchet_msgs import msg
from rclpy.clock import Clock, ClockType
from sensor_msgs.msg import Joy

from ratchet_ros.messages import qos
from ratchet_ros.messages.times import to_time
from ratchet_ros.nodes.base import OK, WARN, Line, RatchetNode, spin
from ratchet_ros.nodes.params import parameter
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError


@dataclass(frozen=True)
class Parameters:
    contract: str = parameter("", "Path of the robot contract (YAML).")
    person: str = parameter("", "Who holds the device; stored with labels.")
    axes: list[str] = parameter([], "dimension=axis pairs, such as dx=1, dy=-0; a minus turns the axis round.")  # noqa: RUF009
    speed: float = parameter(0.5, "Share of the dimension's range at full deflection.", low=0.01, high=1.0, live=True)
    deadband: float = parameter(0.08, "Deflection below which an axis counts as centred.", low=0.0, high=0.9, live=True)
    dead_man_button: int = parameter(
        4, "Held: motion is allowed where the nodes demand it; -1 for none.", low=-1, high=63
    )
    intervene_button: int = parameter(
        5, "Held: the person's motion replaces the policy's; -1 for none.", low=-1, high=63
    )
    open_button: int = parameter(2, "Opens the gripper; -1 for none.", low=-1, high=63)
    close_button: int = parameter(3, "Closes the gripper; -1 for none.", low=-1, high=63)
    success_button: int = parameter(0, "The task is solved; -1 for none.", low=-1, high=63)
    failure_button: int = parameter(1, "The attempt failed; -1 for none.", low=-1, high=63)
    rate: float = parameter(50.0, "Reports per second.", low=5.0, high=500.0)
    timeout: float = parameter(
        0.25, "Seconds without /joy after which everything counts as released.", low=0.02, high=5.0
    )


class TeleopNode(RatchetNode):
    """Velocity-like control: contracts whose actions are deltas or velocities."""

    Parameters = Parameters

    def __init__(self, **options: Any) -> None:
        super().__init__("teleop_node", **options)
        self._things: list[Any] = []
        self._tick: Any = None
        self._joy: Joy | None = None
        self._heard = -np.inf
        self._gripper: float | None = None

    def setup(self) -> None:
        self.contract = RobotContract.load(self.settings.contract)
        action = self.contract.action
        if not action.control_mode.endswith(("delta", "velocity")):
            raise RatchetError(
                "ros.teleop_mode",
                f"a stick cannot command {action.control_mode}",
                where=self.contract.name,
                fix="use a contract with deltas or velocities for interventions",
            )
        names = [d.name for d in action.dims]
        self._axes: list[tuple[int, int, float]] = []
        for line in self.settings.axes:
            name, equals, axis = line.partition("=")
            if name not in names or not equals or not axis.lstrip("-").isdigit():
                raise RatchetError("ros.bad_parameter", f"{line!r} is not dimension=axis", where="axes", fix=str(names))
            self._axes.append((names.index(name), abs(int(axis)), -1.0 if axis.startswith("-") else 1.0))
        self._operator = self._keep(self.create_publisher(msg.OperatorInput, "operator", qos.INPUT))
        self._keep(self.create_subscription(Joy, "joy", self._on_joy, qos.STATES))

    def start(self) -> None:
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._tick = self.create_timer(1.0 / self.settings.rate, self._report, clock=steady)

    def halt(self) -> None:
        if self._tick is not None:
            self.destroy_timer(self._tick)
            self._tick = None
            self._operator.publish(msg.OperatorInput(stamp=self._now(), person=self.settings.person))

    def teardown(self) -> None:
        for thing in self._things:
            thing.destroy()
        self._things = []

    def diagnose(self) -> list[Line]:
        alive = time.monotonic() - self._heard < self.settings.timeout
        return [(OK if alive else WARN, "joystick", "heard" if alive else "silent: everything counts as released", {})]

    def _on_joy(self, message: Joy) -> None:
        self._joy, self._heard = message, time.monotonic()

    def _report(self) -> None:
        out = msg.OperatorInput(stamp=self._now(), person=self.settings.person)
        joy = self._joy
        if joy is not None and time.monotonic() - self._heard < self.settings.timeout:
            out.dead_man = self._pressed(joy, self.settings.dead_man_button)
            out.intervene = self._pressed(joy, self.settings.intervene_button)
            if self._pressed(joy, self.settings.success_button):
                out.judge = msg.OperatorInput.JUDGE_SUCCESS
            elif self._pressed(joy, self.settings.failure_button):
                out.judge = msg.OperatorInput.JUDGE_FAILURE
            if out.intervene:
                out.action = array("f", self._action(joy).tobytes())
        self._operator.publish(out)

    def _action(self, joy: Joy) -> Any:
        """(D,) float32, physical units; the gripper keeps what its buttons chose last, open at first."""
        action, gripper = self.contract.action, self.contract.action.gripper
        out = np.zeros(action.size, np.float32)
        for place, axis, sign in self._axes:
            deflection = joy.axes[axis] * sign if axis < len(joy.axes) else 0.0
            if abs(deflection) > self.settings.deadband:
                dim = action.dims[place]
                out[place] = deflection * self.settings.speed * (dim.high if deflection > 0 else -dim.low)
        if gripper is not None:
            if self._pressed(joy, self.settings.open_button):
                self._gripper = gripper.open
            elif self._pressed(joy, self.settings.close_button):
                self._gripper = gripper.closed
            place = [d.name for d in action.dims].index(gripper.dim)
            out[place] = gripper.open if self._gripper is None else self._gripper
        return out

    @staticmethod
    def _pressed(joy: Joy, button: int) -> bool:
        return 0 <= button < len(joy.buttons) and bool(joy.buttons[button])

    @staticmethod
    def _now() -> Any:
        return to_time(time.time())

    def _keep(self, thing: Any) -> Any:
        self._things.append(thing)
        return thing


def main() -> int:
    return spin(TeleopNode)


if __name__ == "__main__":
    raise SystemExit(main())
