"""The contract's limits on an action vector: an action in, the nearest one the arm may be sent out.

Knows control modes, rotations and the gripper, and keeps the motion that was commanded so far. Knows no faults, no
ages and no clock: how much time has passed is an argument.
In every mode an action becomes a velocity per axis: a delta and an absolute target are what they move within one
period, a velocity is itself. Orientation targets move along the shortest rotation from the last command.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32
from ratchet_vla.runtime import rotation
from ratchet_vla.runtime.safety.axis import TOUCH, Axis, Cut, Motion
from ratchet_vla.runtime.safety.measured import Gauge, Measured

Vector = npt.NDArray[np.float64]
INF = math.inf


class Limiter:
    """Limits for one contract. Not thread-safe.

    Raises:
        RatchetError: safety.no_measured_pose where no state field (or more than one) can measure what is moved;
            safety.cannot_stop where the limits do not allow a stop within the contract's `stop_time`.
    """

    def __init__(self, contract: RobotContract, period: float) -> None:
        self.contract, self.period = contract, period
        action = contract.action
        names = [d.name for d in action.dims]
        self.gripper = names.index(action.gripper.dim) if action.gripper else -1
        moved = [i for i in range(action.size) if i != self.gripper]
        cartesian = action.control_mode.startswith("ee")
        turns = {"none": 0, "quaternion_xyzw": 4}.get(action.rotation, 3) if cartesian else 0
        self.linear = moved[: len(moved) - turns]
        self._turning = moved[len(moved) - turns :]
        if cartesian and len(self.linear) != 3:
            raise RatchetError(
                "safety.unknown_action",
                f"{len(moved)} dimensions beside the gripper do not make a position and rotation {action.rotation!r}",
                where=contract.name,
                fix="list x, y, z, then the rotation, then the gripper",
            )
        self.delta = action.control_mode.endswith("delta")
        self.absolute = action.control_mode.endswith("absolute")
        # Orientation targets and quaternion steps are no vectors: they are limited as rotations from the last command.
        self._as_rotation = bool(turns) and (self.absolute or turns == 4)
        self.gauge = Gauge(contract, self.linear, self.gripper, orientation=self._as_rotation)
        self.axes = self._make_axes()
        self._require_stop()
        self.names = [names[i] for i in self.linear]
        self.names += [f"rotation_{a}" for a in "xyz"] if self._as_rotation else [names[i] for i in self._turning]
        self.names += [names[self.gripper]] if self.gripper >= 0 else []
        self.motion = [Motion() for _ in self.axes]
        self._command = np.full(action.size, np.nan)  # absolute dimensions: the last command; NaN before the first
        self._orientation = np.full(4, np.nan)

    def measure(self, state: Mapping[str, Float32]) -> Measured:
        """See `Gauge.measure`."""
        return self.gauge.measure(state)

    # -- limiting ------------------------------------------------------------------------------------------------

    def start(self, measured: Measured) -> None:
        """The arm stands still at the measured pose; what was commanded before is forgotten, the gripper's aside."""
        self.motion = [Motion() for _ in self.axes]
        self._command[self.linear] = measured.position
        self._orientation = measured.orientation.copy()
        if self.gripper >= 0 and math.isnan(self._command[self.gripper]):
            self._command[self.gripper] = measured.gripper

    def halt(self) -> None:
        """The commanded motion has ended: the next command starts from standstill."""
        self.motion = [Motion() for _ in self.axes]

    @property
    def resting(self) -> bool:
        """Whether the last command left the arm (gripper aside) without speed and acceleration."""
        return all(m.v == 0.0 for m in self.motion[: self._moving])

    def apply(
        self, action: Float32, measured: Measured, dt: float, share: float = 1.0
    ) -> tuple[Float32, list[tuple[str, Cut]]]:
        """The nearest permitted action, and per cut dimension why. An action within all limits comes back unchanged.

        action: (D,) float32, finite, physical units. dt: seconds since the last command, at most one period.
        share: of the velocity range that is open, see `Axis.next`.
        """
        wanted, cuts = self._within_range(np.asarray(action, np.float64))
        if dt <= 0.0:
            return self._no_time(), [("", Cut("rate", 0.0, self.period))]
        wishes = self._wishes(wanted, dt)
        cuts += self._shorten(wishes, share)
        places = self._places(measured)
        speeds = np.empty(len(wishes))
        for i, axis in enumerate(self.axes):
            gripper = i >= self._moving
            v, a, cut = axis.next(wishes[i], places[i], self.motion[i], dt, 1.0 if gripper else share)
            if cut is not None:
                cuts.append((self.names[i], cut))
            speeds[i], self.motion[i] = v, Motion(v, a)
        if not cuts:
            out = np.array(action, np.float32)
            self._keep(out)
            return out, []
        return self._compose(speeds, dt), cuts

    def brake(self, measured: Measured, dt: float) -> Float32:
        """The next action of a stop with bounded deceleration; the gripper keeps its last command."""
        del measured  # braking does not depend on it: the stop is as quick as the limits allow
        if dt <= 0.0:
            return self._no_time()
        speeds = np.zeros(len(self.axes))
        for i, axis in enumerate(self.axes[: self._moving]):
            v, a = axis.brake(self.motion[i], dt)
            speeds[i], self.motion[i] = v, Motion(v, a)
        if self.gripper >= 0:
            self.motion[-1] = Motion()
        return self._compose(speeds, dt)

    def target(self) -> Vector:
        """(3,) or (J,): the last commanded position in absolute modes; the measured start elsewhere."""
        return self._command[self.linear]

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def _moving(self) -> int:
        return len(self.axes) - (1 if self.gripper >= 0 else 0)

    def _within_range(self, action: Vector) -> tuple[Vector, list[tuple[str, Cut]]]:
        cuts: list[tuple[str, Cut]] = []
        out = action.copy()
        for i, dim in enumerate(self.contract.action.dims):
            if self._as_rotation and i in self._turning and self.contract.action.rotation == "quaternion_xyzw":
                continue  # the four numbers of a rotation cannot be cut one by one
            slack = 1e-6 * max(abs(dim.low), abs(dim.high))
            if not dim.low - slack <= out[i] <= dim.high + slack:
                out[i] = min(max(out[i], dim.low), dim.high)
                cuts.append((dim.name, Cut("range", float(action[i]), float(out[i]))))
        return out, cuts

    def _wishes(self, wanted: Vector, dt: float) -> list[float]:
        """Wanted velocity per axis."""
        linear = wanted[self.linear]
        if self.delta:
            speeds = linear / dt
        elif self.absolute:
            speeds = (linear - self._command[self.linear]) / dt
        else:
            speeds = linear
        if self._as_rotation:
            turn = rotation.to_quaternion(wanted[self._turning], self.contract.action.rotation)
            if self.delta:
                angular = rotation.to_vector(turn) / dt
            else:
                angular = rotation.to_vector(rotation.product(turn, rotation.inverse(self._orientation))) / dt
        else:
            angular = wanted[self._turning] / dt if self.delta else wanted[self._turning]
        wishes: list[float] = [*speeds.tolist(), *angular.tolist()]
        if self.gripper >= 0:
            last = self._command[self.gripper]
            wishes.append(0.0 if math.isnan(last) else float(wanted[self.gripper] - last) / dt)
            if math.isnan(last):  # nothing measures the gripper: its first command is where it starts from
                self._command[self.gripper] = wanted[self.gripper]
        return wishes

    def _shorten(self, wishes: list[float], share: float) -> list[tuple[str, Cut]]:
        """Bring linear and angular wishes into the velocity limits by one factor each, so that the way is straight."""
        cuts = []
        count = len(self.linear)
        for first, last in ((0, count), (count, self._moving)):
            factor = 1.0
            for i in range(first, last):
                axis, wish = self.axes[i], wishes[i]
                limit = (axis.fast if wish > 0.0 else axis.slow) * min(1.0, share)
                if abs(wish) > abs(limit) * (1.0 + TOUCH):
                    factor = min(factor, limit / wish)
                    cuts.append((self.names[i], Cut("velocity", wish, limit)))
            if factor < 1.0:
                wishes[first:last] = [w * factor for w in wishes[first:last]]
        return cuts

    def _places(self, measured: Measured) -> list[float]:
        linear = self._command[self.linear] if self.absolute else measured.position
        places = [float(p) for p in linear] + [math.nan] * (self._moving - len(self.linear))
        return places + ([float(self._command[self.gripper])] if self.gripper >= 0 else [])

    def _compose(self, speeds: Vector, dt: float) -> Float32:
        """Velocities back to an action of the contract's mode."""
        count = len(self.linear)
        linear, angular = speeds[:count], speeds[count : self._moving]
        out = np.zeros(self.contract.action.size)
        if self.absolute:
            out[self.linear] = self._command[self.linear] + linear * dt
        else:
            out[self.linear] = linear * dt if self.delta else linear
        if self._as_rotation:
            turn = rotation.from_vector(angular * dt)
            form = self.contract.action.rotation
            if self.delta:
                out[self._turning] = rotation.from_quaternion(turn, form, np.array([0.0, 0.0, 0.0, 1.0]))
            else:
                aim = rotation.product(turn, self._orientation)
                last = self._command[self._turning]
                near = last if np.isfinite(last).all() else rotation.from_quaternion(aim, form, self._zero(form))
                out[self._turning] = rotation.from_quaternion(aim, form, near)
        elif self._turning:
            out[self._turning] = angular * dt if self.delta else angular
        if self.gripper >= 0:
            last = self._command[self.gripper]
            out[self.gripper] = self._open() if math.isnan(last) else last + speeds[-1] * dt
        sent: Float32 = out.astype(np.float32)
        self._keep(sent)
        return sent

    def _keep(self, sent: Float32) -> None:
        if self.absolute:
            self._command[self.linear] = sent[self.linear]
            if self._as_rotation:
                self._command[self._turning] = sent[self._turning]
                self._orientation = rotation.to_quaternion(
                    sent[self._turning].astype(np.float64), self.contract.action.rotation
                )
        if self.gripper >= 0:
            self._command[self.gripper] = sent[self.gripper]

    def _no_time(self) -> Float32:
        """What to send where no time has passed: no further displacement, the same target or the same velocity."""
        speeds = np.array([m.v for m in self.motion])
        if self.gripper >= 0:
            speeds[-1] = 0.0
        return self._compose(speeds, 0.0)

    def _open(self) -> float:
        gripper = self.contract.action.gripper
        return gripper.open if gripper else 0.0

    @staticmethod
    def _zero(form: str) -> Vector:
        return np.array([0.0, 0.0, 0.0, 1.0]) if form == "quaternion_xyzw" else np.zeros(3)

    def _make_axes(self) -> list[Axis]:
        limits, dims = self.contract.limits, self.contract.action.dims
        jerk = limits.jerk or (INF,) * len(dims)
        low = limits.position_low or limits.workspace_low or (-INF,) * len(self.linear)
        high = limits.position_high or limits.workspace_high or (INF,) * len(self.linear)
        if len(low) != len(self.linear):
            raise RatchetError(
                "safety.bad_box",
                f"the box has {len(low)} values, {len(self.linear)} dimensions move",
                where=self.contract.name,
                fix="give one value per dimension that is not the gripper",
            )
        axes = []
        for n, i in enumerate(self.linear):
            slow, fast = self._speeds(i, self.delta, self.contract.action.control_mode.endswith("velocity"))
            bottom, top = low[n], high[n]
            if self.absolute:
                bottom, top = max(bottom, dims[i].low), min(top, dims[i].high)
            axes.append(Axis(slow, fast, limits.acceleration[i], jerk[i], bottom, top, self.period))
        if self._as_rotation:
            speed = min(limits.velocity[i] for i in self._turning)
            acceleration = min(limits.acceleration[i] for i in self._turning)
            least = min(jerk[i] for i in self._turning)
            axes += [Axis(-speed, speed, acceleration, least, period=self.period)] * 3
        else:
            for i in self._turning:
                slow, fast = self._speeds(i, self.delta, not self.delta)
                axes.append(Axis(slow, fast, limits.acceleration[i], jerk[i], period=self.period))
        if self.gripper >= 0:
            i = self.gripper
            least, most = dims[i].low, dims[i].high  # with inertia of its own, a gripper must brake before its stops
            limit = limits.velocity[i]
            axes.append(Axis(-limit, limit, limits.acceleration[i], jerk[i], least, most, self.period))
        return axes

    def _speeds(self, i: int, delta: bool, velocity: bool) -> tuple[float, float]:
        """Velocity range of a dimension: its limit, and what its range per step means as a velocity."""
        dim, limit = self.contract.action.dims[i], self.contract.limits.velocity[i]
        scale = 1.0 / self.period if delta else 1.0
        if delta or velocity:
            return max(-limit, dim.low * scale), min(limit, dim.high * scale)
        return -limit, limit

    def _require_stop(self) -> None:
        slowest = max((axis.stop_time for axis in self.axes[: self._moving]), default=0.0)
        if slowest > self.contract.watchdog.stop_time:
            raise RatchetError(
                "safety.cannot_stop",
                f"a stop from full speed takes {slowest:.3g} s, stop_time is {self.contract.watchdog.stop_time} s",
                where=self.contract.name,
                fix="raise the acceleration limit or watchdog.stop_time, or lower the velocity limit",
            )

    def no_rotation(self, action: Float32) -> str:
        """What is wrong with the orientation in an action; empty where nothing is."""
        if not self._as_rotation or self.contract.action.rotation != "quaternion_xyzw":
            return ""
        norm = float(np.linalg.norm(np.asarray(action, np.float64)[self._turning]))
        return "" if abs(norm - 1.0) <= 0.05 else f"a quaternion of length {norm:.3g} is no rotation"
