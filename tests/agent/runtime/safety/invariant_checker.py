"""An independent check of what a safety filter lets through: it sees times, commands and measured positions only.

Shares no code with the filter: differences of the commands it saw, divided by the time that passed (never more than one
period, jitter of a quarter period forgiven as docs/safety.md says), against the contract's numbers.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.transform import Rotation

from ratchet_vla.contract import RobotContract

FORGIVEN = 0.25


class InvariantChecker:
    """Call `see` with every command. `violations` lists what broke a limit, in words."""

    def __init__(self, contract: RobotContract, start: np.ndarray, orientation: np.ndarray, now: float) -> None:
        self.contract = contract
        self.period = 1.0 / contract.control_hz
        mode = contract.action.control_mode
        self.mode, self.delta, self.absolute = mode, mode.endswith("delta"), mode.endswith("absolute")
        self.rotation = contract.action.rotation
        self.turns = {"none": 0, "quaternion_xyzw": 4}.get(self.rotation, 3)
        self.limits = contract.limits
        self.last = np.asarray(start, float)
        self.turned = self._orientation(orientation) if self.absolute and self.turns else None
        self.gripper = math.nan
        self.speed = np.zeros(3 + (3 if self.turns else 0))
        self.push = np.zeros_like(self.speed)
        self.now = self.reckoned = now - self.period
        self.steps: list[float] = []
        self.violations: list[str] = []
        self.worst: dict[str, float] = {}

    def see(self, now: float, command: np.ndarray | None, measured: np.ndarray, braking: bool) -> None:
        """One decision. braking: the filter is in a controlled stop, which may overrun the box but no other limit."""
        if now - self.now > 2.0 * self.period:
            self.speed[:] = 0.0
            self.push[:] = 0.0
        self.now = now
        due = self.reckoned + self.period
        reckoned = now if now >= due else min(due, now + FORGIVEN * self.period)
        dt = min(reckoned - self.reckoned, self.period)
        self.reckoned = max(self.reckoned, reckoned)
        if command is None:
            self.speed[:] = 0.0
            self.push[:] = 0.0
            if self.absolute:
                self.last = np.asarray(measured, float)
            return
        moved = self._moved(np.asarray(command, float))
        if dt <= 1e-9:
            if self.mode != "joint_velocity" and np.abs(moved).max() > 1e-6:
                self.violations.append(f"moved {moved} in no time")
            return
        speed = moved / dt if self.mode != "joint_velocity" else np.asarray(command, float)[:3]
        push = (speed - self.speed) / dt
        self.steps = [*self.steps[-2:], dt]
        least = min(self.steps)
        grain = self._grain()
        self._judge("velocity", speed, self._each(self.limits.velocity), grain / dt)
        self._judge("acceleration", push, self._each(self.limits.acceleration), 2 * grain / (dt * least))
        if self.limits.jerk:
            self._judge("jerk", (push - self.push) / dt, self._each(self.limits.jerk), 4 * grain / (dt * least**2))
        if not braking:
            self._box(np.asarray(command, float), measured, speed[:3], dt)
        self._grip(float(command[-1]), dt)
        self.speed, self.push = speed, push

    def _moved(self, command: np.ndarray) -> np.ndarray:
        linear = command[:3] - self.last if self.absolute else command[:3]
        if self.absolute:
            self.last = command[:3]
        if not self.turns:
            return linear
        turn = command[3 : 3 + self.turns]
        if self.turned is not None:
            new = self._orientation(turn)
            angular = (new * self.turned.inv()).as_rotvec()
            self.turned = new
        elif self.turns == 4:
            angular = Rotation.from_quat(turn).as_rotvec()
        else:
            angular = turn
        return np.concatenate([linear, angular])

    def _box(self, command: np.ndarray, measured: np.ndarray, speed: np.ndarray, dt: float) -> None:
        low = np.array(self.limits.workspace_low or self.limits.position_low)
        high = np.array(self.limits.workspace_high or self.limits.position_high)
        end = command[:3] if self.absolute else np.asarray(measured, float) + speed * dt
        limit = np.array(self._each(self.limits.acceleration)[:3])
        hardest = np.maximum(np.abs(self.speed[:3]) - limit * dt, 0.0)  # as fast as full braking still allows
        hurry = np.abs(speed) > hardest + 1e-4
        outward = ((end > high + 1e-4) & (speed > 1e-4)) | ((end < low - 1e-4) & (speed < -1e-4))
        if (outward & hurry).any() and not self.limits.jerk:
            self.violations.append(f"leaves the box: {end}")
        if self.limits.jerk and outward.any() and self.absolute:
            self.violations.append(f"leaves the box: {end}")

    def _grip(self, value: float, dt: float) -> None:
        if not math.isnan(self.gripper):
            self._judge("gripper", np.array([(value - self.gripper) / dt]), [self.limits.velocity[-1]], 1e-6 / dt)
        self.gripper = value

    def _judge(self, what: str, values: np.ndarray, limits: list[float], grain: float) -> None:
        for value, limit in zip(values, limits, strict=True):
            excess = abs(float(value)) / limit if math.isfinite(limit) else 0.0
            self.worst[what] = max(self.worst.get(what, 0.0), (abs(float(value)) - grain) / limit)
            if excess > 1.0 and abs(float(value)) > limit * (1 + 1e-4) + grain:
                self.violations.append(f"{what} {value:.6g} over {limit:g}")

    def _each(self, limits: tuple[float, ...]) -> list[float]:
        return [*limits[:3], *([min(limits[3 : 3 + self.turns])] * 3 if self.turns else [])]

    def _grain(self) -> float:
        """What float32 cannot tell apart, in displacement."""
        return (1e-6 if self.turns else 4e-7) if self.absolute else 1e-8

    def _orientation(self, values: np.ndarray) -> Rotation:
        if self.rotation == "axis_angle":
            return Rotation.from_rotvec(values)
        return Rotation.from_euler("xyz", values) if self.rotation == "euler_xyz" else Rotation.from_quat(values)
