"""Devices for teleoperation: keyboard, gamepad (ROS joy or Linux joystick) and SpaceMouse, as intents.

Knows keys, axes, buttons and HID reports. Knows no arm. Each device takes its bytes or keys from a source that tests
replace by a fake.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import sys
import termios
import threading
import tty
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratchet_vla.episodes.library.labels import LabelValue
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.teleop.operator import Intent

SILENCE = 0.25  # s after which a device that should repeat itself counts as gone


class TerminalKeys:
    """Keys pressed in the terminal, without Enter. A terminal repeats held keys and tells no release."""

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream or sys.stdin
        self._before: list[Any] | None = None

    def open(self) -> None:
        """Raises RatchetError teleop.no_device where there is no terminal."""
        if not self._stream.isatty():
            raise RatchetError("teleop.no_device", "no terminal to read keys from", fix="start it in a terminal")
        self._before = termios.tcgetattr(self._stream)
        tty.setcbreak(self._stream)

    def __call__(self) -> str:
        """What was pressed since the last call."""
        pressed = b""
        while select.select([self._stream], [], [], 0.0)[0]:
            pressed += os.read(self._stream.fileno(), 64)
        return pressed.decode(errors="ignore")

    def close(self) -> None:
        if self._before is not None:
            termios.tcsetattr(self._stream, termios.TCSADRAIN, self._before)
            self._before = None


MOVES = {"w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1)}
TURNS = {"l": (0, 1), "j": (0, -1), "i": (1, 1), "k": (1, -1), "u": (2, 1), "o": (2, -1)}
LABEL_KEYS: dict[str, LabelValue] = {"1": "success", "2": "failure", "3": "discard"}


class Keyboard:
    """t starts and ends an intervention; w s a d r f move, l j i k u o turn, space is the gripper; 1 2 3 label.

    A key counts for `hold` seconds after it was last heard, which is longer than a terminal's repetition.
    """

    name = "keyboard"

    def __init__(self, keys: Any = None, hold: float = 0.15) -> None:
        """keys: gives what was pressed since the last call, with `open` and `close`; the terminal if absent."""
        self._keys = keys or TerminalKeys()
        self._hold = hold
        self._heard: dict[str, float] = {}
        self._engaged = False
        self._closed = False

    def open(self) -> None:
        self._keys.open()

    def read(self, now: float) -> Intent:
        label: LabelValue | None = None
        gripper = 0
        for key in self._keys():
            lower = key.lower()
            if lower == "t":
                self._engaged = not self._engaged
                self._heard.clear()
            elif lower == " ":
                self._closed = not self._closed
                gripper = 1 if self._closed else -1
            elif lower in LABEL_KEYS:
                label = LABEL_KEYS[lower]
            else:
                self._heard[lower] = now
        linear, angular = [0.0] * 3, [0.0] * 3
        for keys, values in ((MOVES, linear), (TURNS, angular)):
            for key, (axis, sign) in keys.items():
                if now - self._heard.get(key, -1e9) < self._hold:
                    values[axis] += sign
        return Intent(self._engaged, _three(linear), _three(angular), gripper if self._engaged else 0, label)

    def close(self) -> None:
        self._keys.close()


@dataclass(frozen=True)
class GamepadMap:
    """Which axes and buttons mean what; the defaults are those of ROS `joy` for a common two-stick gamepad.

    linear, angular: (axis, sign) per direction. up, down: triggers that rest at 1 and read -1 when pressed, for z.
    """

    linear: tuple[tuple[int, float], tuple[int, float]] = ((1, 1.0), (0, 1.0))
    angular: tuple[tuple[int, float], tuple[int, float], tuple[int, float]] = ((3, -1.0), (4, 1.0), (6, 1.0))
    up: int = 5
    down: int = 2
    engage: int = 4
    close: int = 0
    open: int = 1
    success: int = 7
    failure: int = 6
    discard: int = 8
    dead_zone: float = 0.08


class Gamepad:
    """The engage button is held while the person has the arm. Fed by `update`, such as from a subscription to joy."""

    name = "gamepad"

    def __init__(self, mapping: GamepadMap | None = None, silence: float = SILENCE) -> None:
        """silence: seconds without an update after which it counts as gone; joy must repeat (autorepeat_rate)."""
        self._map, self._silence = mapping or GamepadMap(), silence
        self._lock = threading.Lock()
        self._axes: Sequence[float] = ()
        self._buttons: Sequence[int] = ()
        self._stamp: float | None = None
        self._pressed: LabelValue | None = None
        self._moved: set[int] = set()  # triggers read 0 until they are touched for the first time

    def open(self) -> None:
        return

    def update(self, axes: Sequence[float], buttons: Sequence[int], stamp: float) -> None:
        """What the device says now. stamp: seconds, the loop's clock."""
        with self._lock:
            for label in ("success", "failure", "discard"):
                index = getattr(self._map, label)
                if _pressed(buttons, index) and not _pressed(self._buttons, index):
                    self._pressed = label
            self._moved |= {i for i in (self._map.up, self._map.down) if i < len(axes) and axes[i] != 0.0}
            self._axes, self._buttons, self._stamp = tuple(axes), tuple(buttons), stamp

    def read(self, now: float) -> Intent | None:
        with self._lock:
            if self._stamp is None or now - self._stamp > self._silence:
                return None
            mapping, label = self._map, self._pressed
            self._pressed = None
            grip = _pressed(self._buttons, mapping.close) - _pressed(self._buttons, mapping.open)
            lift = self._trigger(mapping.up) - self._trigger(mapping.down)
            return Intent(
                engaged=bool(_pressed(self._buttons, mapping.engage)),
                linear=_three([*(self._axis(*a) for a in mapping.linear), lift]),
                angular=_three([self._axis(*a) for a in mapping.angular]),
                gripper=grip,
                label=label,
            )

    def close(self) -> None:
        return

    def _axis(self, index: int, sign: float) -> float:
        value = self._axes[index] if index < len(self._axes) else 0.0
        return sign * value if abs(value) > self._map.dead_zone else 0.0

    def _trigger(self, index: int) -> float:
        return (1.0 - self._axes[index]) / 2.0 if index in self._moved and index < len(self._axes) else 0.0


class LinuxGamepad(Gamepad):
    """A gamepad at /dev/input/js*, read without ROS. The kernel sends changes only, so silence is no sign of loss."""

    EVENT = struct.Struct("<IhBB")  # time, value, type, number

    def __init__(self, path: str = "/dev/input/js0", mapping: GamepadMap | None = None) -> None:
        super().__init__(mapping, silence=float("inf"))
        self.name = f"gamepad {path}"
        self._path = path
        self._descriptor = -1
        self._state: dict[tuple[int, int], int] = {}

    def open(self) -> None:
        self._descriptor = _open(self._path)

    def read(self, now: float) -> Intent | None:
        if self._descriptor < 0:
            return None
        try:
            while data := _available(self._descriptor, self.EVENT.size):
                _, value, kind, number = self.EVENT.unpack(data)
                self._state[kind & 0x7F, number] = value
        except OSError:
            self.close()  # unplugged
            return None
        axes = [self._value(2, i) / -32767.0 for i in range(self._count(2))]  # joy counts up and left as positive
        buttons = [self._value(1, i) for i in range(self._count(1))]
        self.update(axes, buttons, now)
        return super().read(now)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _count(self, kind: int) -> int:
        return max((n + 1 for k, n in self._state if k == kind), default=0)

    def _value(self, kind: int, number: int) -> int:
        return self._state.get((kind, number), 0)


class SpaceMouse:
    """A 3Dconnexion SpaceMouse through its hidraw device: pushing moves, twisting turns, no drivers needed.

    The right button engages while it is held; pressing the left one closes and opens the gripper.
    """

    name = "spacemouse"
    RANGE = 350.0

    def __init__(self, path: str = "", report: Callable[[], list[bytes]] | None = None) -> None:
        """path: /dev/hidrawN; the first of 3Dconnexion if empty. report: gives reports instead of a device."""
        self._path, self._report = path, report
        self._descriptor = -1
        self._axes = [0.0] * 6
        self._buttons = 0
        self._closed = False

    def open(self) -> None:
        if self._report is None:
            self._descriptor = _open(self._path or self._find())

    def read(self, now: float) -> Intent | None:
        gripper = 0
        try:
            reports = self._reports()
        except OSError:
            self.close()  # unplugged
            return None
        for report in reports:
            kind, data = report[0], report[1:]
            if kind == 1 and len(data) >= 12:
                self._axes = [v / self.RANGE for v in struct.unpack("<6h", data[:12])]
            elif kind == 1 and len(data) >= 6:
                self._axes[:3] = [v / self.RANGE for v in struct.unpack("<3h", data[:6])]
            elif kind == 2 and len(data) >= 6:
                self._axes[3:] = [v / self.RANGE for v in struct.unpack("<3h", data[:6])]
            elif kind == 3 and data:
                gripper = self._button(data[0]) or gripper
        x, y, z, roll, pitch, yaw = self._axes
        # The device's y points to its user and z down; the arm's frame has x forward, y left, z up.
        return Intent(
            engaged=bool(self._buttons & 2),
            linear=_three([-y, -x, -z]),
            angular=_three([-pitch, -roll, -yaw]),
            gripper=gripper,
        )

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _button(self, buttons: int) -> int:
        pressed, self._buttons = buttons & ~self._buttons, buttons
        if not pressed & 1:
            return 0
        self._closed = not self._closed
        return 1 if self._closed else -1

    def _reports(self) -> list[bytes]:
        if self._report is not None:
            return self._report()
        if self._descriptor < 0:
            raise OSError("not open")
        found = []
        while data := _available(self._descriptor, 64):
            found.append(data)
        return found

    @staticmethod
    def _find() -> str:
        for folder in sorted(Path("/sys/class/hidraw").glob("hidraw*")):
            with contextlib.suppress(OSError):
                facts = (folder / "device/uevent").read_text().upper()
                if "000046D:0000C6" in facts or "0000256F:" in facts:
                    return f"/dev/{folder.name}"
        raise RatchetError("teleop.no_device", "no SpaceMouse is connected", fix="plug it in, or name its /dev/hidraw")


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = (min(max(float(v), -1.0), 1.0) for v in values)
    return x, y, z


def _pressed(buttons: Sequence[int], index: int) -> int:
    return int(bool(buttons[index])) if index < len(buttons) else 0


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise RatchetError(
            "teleop.no_device", error.strerror or str(error), where=path, fix="plug it in; check that you may read it"
        ) from error


def _available(descriptor: int, size: int) -> bytes:
    try:
        return os.read(descriptor, size)
    except BlockingIOError:
        return b""
