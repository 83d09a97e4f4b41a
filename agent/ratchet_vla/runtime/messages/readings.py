"""From the arm's messages to the contract's fields: states by joint name, poses, images upright and RGB.

Knows the fields of messages by name and the contract's topic mapping. Imports no ROS: it reads live messages and those
of a recording alike. Knows no topic.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ratchet_vla.contract import CameraSpec, RobotContract, StateField
from ratchet_vla.contract.topics import StateSource
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, UInt8
from ratchet_vla.runtime import rotation

CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}


def image(message: Any, camera: CameraSpec) -> UInt8:
    """(H, W, 3) uint8, RGB, upright, contract size, of a sensor_msgs Image or CompressedImage. Raw images are not
    copied where their layout allows it.

    Raises:
        RatchetError: ros.bad_image for another size, encoding or step.
    """
    if not hasattr(message, "encoding"):
        return _upright(_decompress(message, camera), camera)
    wanted = (camera.width, camera.height) if camera.rotate in (0, 180) else (camera.height, camera.width)
    if (message.width, message.height) != wanted:
        raise _bad(camera, f"{message.width} x {message.height}, the contract says {wanted[0]} x {wanted[1]}")
    channels = CHANNELS.get(message.encoding)
    if channels is None:
        raise _bad(camera, f"encoding {message.encoding!r}; known: {', '.join(CHANNELS)}")
    step = message.step or message.width * channels
    if step < message.width * channels or len(message.data) != step * message.height:
        raise _bad(camera, f"{len(message.data)} bytes with step {step} do not make {message.height} rows")
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, step)
    pixels = rows[:, : message.width * channels].reshape(message.height, message.width, channels)
    if channels == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return _upright(pixels[..., 2::-1] if message.encoding.startswith("bgr") else pixels[..., :3], camera)


def _decompress(message: Any, camera: CameraSpec) -> UInt8:
    import cv2

    pixels = cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_COLOR)
    wanted = (camera.width, camera.height) if camera.rotate in (0, 180) else (camera.height, camera.width)
    if pixels is None or (pixels.shape[1], pixels.shape[0]) != wanted:
        size = "not an image" if pixels is None else f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise _bad(camera, f"{size}, the contract says {wanted[0]} x {wanted[1]}")
    return np.asarray(pixels[..., ::-1], np.uint8)


def _upright(pixels: UInt8, camera: CameraSpec) -> UInt8:
    turned = np.rot90(pixels, camera.rotate // 90)
    return turned[:, ::-1] if camera.mirror else turned


def _bad(camera: CameraSpec, what: str) -> RatchetError:
    return RatchetError("ros.bad_image", what, where=f"{camera.name} ({camera.topic})", fix="fix driver or contract")


class StateReader:
    """Picks one state field out of its messages.

    read: (size,) float32, or None where the message does not carry all of the field's joints (several publishers share
    /joint_states). Raises RatchetError ros.bad_state for values that are not finite or a wrong count.
    """

    def __init__(self, contract: RobotContract, source: StateSource) -> None:
        self.source = source
        self.field: StateField = next(s for s in contract.state if s.name == source.field)
        self._rotation = contract.action.rotation
        self._order: tuple[tuple[str, ...], list[int]] = ((), [])
        self._near = np.zeros(3)
        self._last: Any = None

    def read(self, message: Any) -> Float32 | None:
        if self.source.kind == "joint_state":
            values = self._joints(message)
        elif self.source.kind == "pose_stamped":
            values = self._pose(message)
        else:
            values = np.asarray(message.data[: self.field.size], np.float64)
        if values is None:
            return None
        if values.shape != (self.field.size,) or not np.isfinite(values).all():
            raise RatchetError(
                "ros.bad_state",
                f"got {values.tolist()}",
                where=f"{self.field.name} ({self.field.topic})",
                fix=f"{self.field.size} finite numbers are expected",
            )
        scaled: Float32 = (values * self.source.scale).astype(np.float32)
        return scaled

    def _sign(self, q: Any) -> float:
        """q and -q are one rotation: stay near the last one, and begin with the largest component positive. A rule such
        as w >= 0 would flip back and forth with noise where a gripper points straight down."""
        sign = _largest(q) if self._last is None else float(np.copysign(1.0, q @ self._last))
        self._last = q * sign
        return sign

    def _joints(self, message: Any) -> Any:
        names = tuple(message.name)
        if names != self._order[0]:  # the order seldom changes, but it may
            if not set(self.source.names) <= set(names):
                return None
            self._order = (names, [names.index(n) for n in self.source.names])
        values = getattr(message, self.source.part)
        if len(values) != len(names):
            return None
        return np.asarray(values, np.float64)[self._order[1]]

    def _pose(self, message: Any) -> Any:
        if self.source.part == "position":
            p = message.pose.position
            return np.array([p.x, p.y, p.z])
        o = message.pose.orientation
        q = np.array([o.x, o.y, o.z, o.w])
        norm = float(np.linalg.norm(q))
        if not abs(norm - 1.0) < 0.01:
            return np.full(self.field.size, math.nan)
        if not self.source.signed:
            q = q * self._sign(q)
        if self.field.size == 4:
            return q
        if self._rotation == "euler_xyz":
            self._near = rotation.from_quaternion(q, "euler_xyz", self._near)
            return self._near
        return vector(q)


def _largest(q: Any) -> float:
    return float(np.copysign(1.0, q[np.argmax(np.abs(q))]))


def vector(q: Any) -> Any:
    """Unit quaternion -> rotation vector (3,) rad; w < 0 stands for an angle above pi, so that the sign survives."""
    sine = float(np.linalg.norm(q[:3]))
    if sine < 1e-12:
        return np.zeros(3)
    return q[:3] * (2.0 * math.atan2(sine, float(q[3])) / sine)
