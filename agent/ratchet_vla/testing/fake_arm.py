"""FakeArm: an arm without hardware, for tests, benchmarks and dry runs: it goes where it is told, on a given clock.

Knows a contract of any control mode and every way a driver can fail. Draws no scene: its frames are noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, Observation, UInt8
from ratchet_vla.runtime.clock import Clock, ManualClock
from ratchet_vla.runtime.safety.limits import Limiter


@dataclass
class Faults:
    """What is wrong with the arm at this moment; all off at first.

    frozen_frames: cameras stop (their stamps too). frozen_state: the driver repeats the last state and stamp.
    not_finite: the state is NaN. shift: added to the measured position at once. refuse: `act` is refused.
    delay: seconds by which states arrive late.
    """

    frozen_frames: bool = False
    frozen_state: bool = False
    not_finite: bool = False
    shift: float = 0.0
    refuse: bool = False
    delay: float = 0.0


class FakeArm:
    """Perfect tracking: a delta or target is reached within the period, a velocity is held for it.

    commands: everything sent, as (time, action or None for hold). clock: stamps what is observed; with a ManualClock
    of its own (`advance_clock`) each `act` takes one period.
    """

    def __init__(
        self,
        contract: RobotContract,
        clock: Clock | None = None,
        *,
        start: Float32 | None = None,
        instruction: str = "move",
        keep: bool = True,
    ) -> None:
        """start: (3,) m or (J,) where it stands at first; the middle of its box if absent. keep: record commands."""
        self._contract = contract
        self._instruction = instruction
        self._own = ManualClock() if clock is None else None
        self.clock: Clock = self._own if self._own is not None else clock if clock is not None else ManualClock()
        self.faults = Faults()
        self.commands: list[tuple[float, Float32 | None]] = []
        self._keep = keep
        self._limits = Limiter(contract, 1.0 / contract.control_hz)
        self._start = self._middle() if start is None else np.asarray(start, np.float64)
        self._connected = False
        self._position = self._start.copy()
        gripper = contract.action.gripper
        self._opening = gripper.open if gripper else 0.0
        self._sequence = 0
        self._seen: Observation | None = None
        self._frames: dict[str, UInt8] = {}
        self._frames_stamp = 0.0
        self.on_act: Callable[[Float32], None] | None = None

    @property
    def contract(self) -> RobotContract:
        return self._contract

    @property
    def position(self) -> Float32:
        """Where it really is, (3,) m or (J,)."""
        return self._position.astype(np.float32)

    def connect(self) -> None:
        self._connected = True
        self._position = self._start.copy()
        self._sequence = 0
        self._refresh()

    def frames_stamp(self) -> float:
        if not self.faults.frozen_frames:
            return self.clock.now()
        return self._frames_stamp

    def observe(self, cameras: bool = True) -> Observation:
        self._require_connected()
        if not self.faults.frozen_frames:
            self._frames_stamp = self.clock.now()
        if self.faults.frozen_state and self._seen is not None:
            return Observation(
                self._images() if cameras else {}, self._seen.state, self._instruction, self._seen.stamp, self._next()
            )
        seen = Observation(
            images=self._images() if cameras else {},
            state=self._state(),
            instruction=self._instruction,
            stamp=(self._frames_stamp if cameras else self.clock.now()) - self.faults.delay,
            sequence=self._next(),
        )
        self._seen = seen
        return seen

    def act(self, action: Float32) -> None:
        self._require_connected()
        command = np.asarray(action, np.float32)
        if command.shape != (self._contract.action.size,) or not np.isfinite(command).all():
            raise RatchetError(
                "robot.bad_action",
                f"{command.tolist()} is no command of {self._contract.action.size} finite values",
                where=self._contract.name,
                fix="nothing was sent",
            )
        if self.faults.refuse:
            raise RatchetError("robot.refused", "the controller refuses", where=self._contract.name)
        if self._keep:
            self.commands.append((self.clock.now(), command.copy()))
        linear = command[self._limits.linear].astype(np.float64)
        mode = self._contract.action.control_mode
        if mode.endswith("absolute"):
            self._position = linear
        else:
            self._position = self._position + linear * (1.0 if mode.endswith("delta") else self._limits.period)
        if self._limits.gripper >= 0:
            self._opening = float(command[self._limits.gripper])
        if self._own is not None:
            self._own.advance(self._limits.period)
        if self.on_act is not None:
            self.on_act(command)

    def hold(self) -> None:
        if self._keep:
            self.commands.append((self.clock.now(), None))

    def close(self) -> None:
        self._connected = False

    # -- inside --------------------------------------------------------------------------------------------------

    def _middle(self) -> np.ndarray:
        middle = []
        for axis in self._limits.axes[: len(self._limits.linear)]:
            both = np.isfinite(axis.low) and np.isfinite(axis.high)
            middle.append((axis.low + axis.high) / 2.0 if both else 0.0)
        return np.array(middle)

    def _state(self) -> dict[str, Float32]:
        out: dict[str, Float32] = {}
        for field in self._contract.state:
            values = np.zeros(field.size, np.float32)
            if field.size == 4 and field.name == self._limits.gauge.rotation_field:
                values[3] = 1.0
            if field.name == self._limits.gauge.position_field:
                values = (self._position + self.faults.shift).astype(np.float32)
            if field.name == self._limits.gauge.gripper_field:
                values[0] = self._opening
            out[field.name] = np.full_like(values, np.nan) if self.faults.not_finite else values
        return out

    def _images(self) -> dict[str, UInt8]:
        if not self.faults.frozen_frames:
            self._refresh()
        return dict(self._frames)

    def _refresh(self) -> None:
        """One random frame per camera, made once; a counter in its corner says which it is."""
        if not self._frames:
            generator = np.random.default_rng(0)
            for camera in self._contract.cameras:
                self._frames[camera.name] = generator.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
        count = self._sequence % 256
        self._frames = {name: _with_count(frame, count) for name, frame in self._frames.items()}

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence - 1

    def _require_connected(self) -> None:
        if not self._connected:
            raise RatchetError("robot.not_connected", "the robot is not connected", fix="call connect() first")


def _with_count(frame: UInt8, count: int) -> UInt8:
    out = frame.copy()
    out[0, 0] = count
    return out
