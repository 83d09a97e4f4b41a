"""Teleoperation: what a person's hands want, turned into commands of any contract, and interventions without a jump.

Knows intents, the `Teleoperator` protocol and control modes. Knows no device and no policy. A command starts where the
arm is measured to be, grows over the contract's ramp time, and passes the safety filter like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.library.labels import LabelValue
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ControlTick, Float32
from ratchet_vla.runtime import rotation
from ratchet_vla.runtime.safety.limits import Limiter
from ratchet_vla.runtime.safety.measured import Measured

LEASH = 0.25  # s of full speed that an absolute target may lie ahead of the measured pose


@dataclass(frozen=True)
class Intent:
    """What a person wants at this moment.

    engaged: the arm follows the person; the policy has it otherwise. linear: (3,) in [-1, 1], share of the speed along
    x, y, z of the action frame, or of joints 1 to 3. angular: (3,) in [-1, 1] about x, y, z, or joints 4 to 6.
    gripper: +1 close, -1 open, 0 leave it. label: pressed since the last look.
    """

    engaged: bool = False
    linear: tuple[float, float, float] = (0.0, 0.0, 0.0)
    angular: tuple[float, float, float] = (0.0, 0.0, 0.0)
    gripper: int = 0
    label: LabelValue | None = None


@runtime_checkable
class Teleoperator(Protocol):
    """A device in a person's hands."""

    @property
    def name(self) -> str: ...

    def open(self) -> None:
        """Raises RatchetError teleop.no_device."""
        ...

    def read(self, now: float) -> Intent | None:
        """The newest intent, at once; None where the device has gone silent. now: seconds, the loop's clock."""
        ...

    def close(self) -> None:
        """Safe to call more than once."""
        ...


class Jog:
    """Intents to actions of one contract.

    speed: share of the contract's velocity limits (or of a delta's range, where that is less) at full deflection, in
    (0, 1].

    Raises:
        RatchetError: teleop.bad_speed, and what a contract without a measured pose raises (safety.no_measured_pose).
    """

    def __init__(self, contract: RobotContract, speed: float = 0.5) -> None:
        if not 0 < speed <= 1:
            raise RatchetError("teleop.bad_speed", f"{speed} is no share", fix="give a number above 0, at most 1")
        self.contract, self.period = contract, 1.0 / contract.control_hz
        self._limiter = Limiter(contract, self.period)
        action = contract.action
        self._gripper = self._limiter.gripper
        moved = [i for i in range(action.size) if i != self._gripper]
        self._linear = self._limiter.linear
        self._turning = [i for i in moved if i not in self._linear]
        self._speeds = self._full_speeds(speed)
        self._taken = 0.0
        self._position = np.zeros(len(self._linear))
        self._orientation = np.array([0.0, 0.0, 0.0, 1.0])
        self._grip = math.nan

    def take(self, state: Mapping[str, Float32], now: float, last: Float32 | None = None) -> None:
        """An intervention starts: targets start at the measured pose. last: what the arm was sent last, if anything."""
        measured = self._limiter.measure(state)
        self._position = measured.position.copy()
        self._orientation = measured.orientation.copy()
        self._taken = now
        if self._gripper >= 0:
            self._grip = float(last[self._gripper]) if last is not None else measured.gripper

    def action(self, intent: Intent, state: Mapping[str, Float32], now: float) -> Float32 | None:
        """(D,) float32, physical units, for the coming period.

        None where it is not known how the gripper stands and the person has not said: nothing is sent then.
        """
        action = self.contract.action
        measured = self._limiter.measure(state)
        rates = self._rates(intent) * self._share(now)
        if self._gripper >= 0 and intent.gripper:
            spec = action.gripper
            assert spec is not None
            self._grip = spec.closed if intent.gripper > 0 else spec.open
        if self._gripper >= 0 and math.isnan(self._grip):
            return None
        out = np.zeros(action.size)
        straight, turn = rates[: len(self._linear)], rates[len(self._linear) :]
        if self._limiter.absolute:
            self._advance(straight, turn, measured)
            out[self._linear] = self._position
            if self._turning:
                near = rotation.from_quaternion(
                    measured.orientation, action.rotation, self._orientation[: len(self._turning)]
                )
                out[self._turning] = rotation.from_quaternion(self._orientation, action.rotation, near)
        else:
            step = self.period if self._limiter.delta else 1.0
            out[self._linear] = straight * step
            if len(self._turning) == 4:
                out[self._turning] = rotation.from_vector(turn * step)
            elif self._turning:
                out[self._turning] = turn * step
        if self._gripper >= 0:
            out[self._gripper] = self._grip
        lows, highs = np.array([d.low for d in action.dims]), np.array([d.high for d in action.dims])
        return np.clip(out, lows, highs).astype(np.float32)

    # -- inside -------------------------------------------------------------------------------------------------

    def _share(self, now: float) -> float:
        ramp = self.contract.limits.ramp_time
        return 1.0 if ramp <= 0 else min(max((now - self._taken + self.period) / ramp, 0.0), 1.0)

    def _rates(self, intent: Intent) -> npt.NDArray[np.float64]:
        wish = np.clip([*intent.linear, *intent.angular], -1.0, 1.0)
        axes = len(self._linear) + (3 if self._turning else 0)
        wish = np.concatenate([wish, np.zeros(max(axes - 6, 0))])[:axes]
        out: npt.NDArray[np.float64] = wish * self._speeds
        return out

    def _advance(self, straight: npt.NDArray[np.float64], turn: npt.NDArray[np.float64], measured: Measured) -> None:
        """Move the target; never further ahead of the arm than it covers within `LEASH`."""
        leash = self._speeds[: len(self._linear)] * LEASH
        target = self._position + straight * self.period
        self._position = np.clip(target, measured.position - leash, measured.position + leash)
        if not self._turning:
            return
        turned = rotation.product(rotation.from_vector(turn * self.period), self._orientation)
        ahead = rotation.to_vector(rotation.product(turned, rotation.inverse(measured.orientation)))
        limit = float(np.max(self._speeds[len(self._linear) :])) * LEASH
        length = float(np.linalg.norm(ahead))
        if length > limit:
            turned = rotation.product(rotation.from_vector(ahead * (limit / length)), measured.orientation)
        self._orientation = turned

    def _full_speeds(self, speed: float) -> npt.NDArray[np.float64]:
        """Units per second at full deflection, per linear axis and per axis of rotation."""
        limits, dims = self.contract.limits, self.contract.action.dims
        out = []
        for i in [*self._linear, *self._turning[:3]]:
            most = limits.velocity[i]
            quaternion = i in self._turning and len(self._turning) == 4  # its range says nothing about its speed
            if not self._limiter.absolute and not quaternion:
                most = min(most, min(abs(dims[i].low), dims[i].high) / (self.period if self._limiter.delta else 1.0))
            if math.isinf(most):
                raise RatchetError(
                    "teleop.no_limit", "no velocity limit says how fast", where=dims[i].name, fix="add limits.velocity"
                )
            out.append(most * speed)
        return np.array(out)


class Loop(Protocol):
    """What an intervention needs of `loop.ControlLoop`."""

    def human(self, action: Float32 | None) -> None: ...
    def cancel(self) -> None: ...


class Intervention:
    """Connects a device to a running loop: give `on_tick` to `ControlLoop.run_episode`.

    Engaging starts an intervention, disengaging ends it. A device that goes silent while engaged ends nothing: its last
    command grows too old, and the safety filter holds the arm until the person is there again. A label ends the
    episode and is kept in `label`.
    """

    def __init__(
        self,
        device: Teleoperator,
        loop: Loop,
        jog: Jog,
        *,
        on_event: Callable[[str], None] | None = None,
        frames: Callable[[float], None] | None = None,
    ) -> None:
        """on_event: told "taken", "returned", "lost" or "found".

        frames: called with each tick's stamp while engaged, for arms whose cameras do not record by themselves.
        """
        self._device, self._loop, self._jog = device, loop, jog
        self._tell = on_event or (lambda event: None)
        self._frames = frames
        self._last: Float32 | None = None
        self.engaged = False
        self.lost = False
        self.label: LabelValue | None = None

    def on_tick(self, tick: ControlTick) -> None:
        """After every tick: what holds for the next one."""
        if tick.command is not None:
            self._last = tick.command
        intent = self._device.read(tick.stamp)
        if intent is None:
            if not self.lost:
                self.lost = True
                self._tell("lost")
            return
        if self.lost:
            self.lost = False
            self._tell("found")
        if intent.label is not None:
            self.label = intent.label
            self._loop.cancel()
        if intent.engaged:
            if not self.engaged:
                self.engaged = True
                self._jog.take(tick.state, tick.stamp, self._last)
                self._tell("taken")
            action = self._jog.action(intent, tick.state, tick.stamp)
            if action is not None:
                self._loop.human(action)
            if self._frames is not None:
                self._frames(tick.stamp)
        elif self.engaged:
            self.engaged = False
            self._loop.human(None)
            self._tell("returned")
