"""Cameras that camera_node can open: RealSense, UVC (Video4Linux through OpenCV), and recorded files.

Knows devices and raw frames with the moment they were taken. Knows no ROS. Vendor packages are imported when asked for.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from ratchet_vla.contract import CameraSpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import UInt8

__all__ = ["DEVICE_KINDS", "Device", "DeviceKind", "RealSense", "Recorded", "Uvc", "open_device"]

DeviceKind = Literal["uvc", "realsense", "recorded"]
"""The words for a kind of camera, wherever one is named: options of the command, parameters of a node."""
DEVICE_KINDS: tuple[str, ...] = get_args(DeviceKind)
"""The same words, for whoever lists or checks them."""

VIDEOS = (".mp4", ".avi", ".mkv", ".mov")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class Device(Protocol):
    """One open camera. Frames are raw: as mounted, in the contract's encoding."""

    def read(self) -> tuple[UInt8, float] | None:
        """(H, W, 3) uint8 and the seconds on the monotonic clock when it was taken; None where none came in time."""
        ...

    def close(self) -> None: ...


def open_device(kind: str, source: str, camera: CameraSpec, fps: float) -> Device:
    """kind: realsense (source: serial, empty for the only one), uvc (source: /dev/videoN or N), recorded (source: video
    file or folder of images, repeated for ever).

    Raises:
        RatchetError: camera.unknown_kind, camera.no_driver, camera.not_found, camera.bad_size.
    """
    if kind == "realsense":
        return RealSense(source, camera, fps)
    if kind == "recorded":
        return Recorded(source, camera, fps)
    if kind == "uvc":
        return Uvc(source, camera, fps)
    raise RatchetError(
        "camera.unknown_kind", f"no kind of camera '{kind}'", where=camera.name, fix=f"kinds: {', '.join(DEVICE_KINDS)}"
    )


def raw_size(camera: CameraSpec) -> tuple[int, int]:
    """(width, height) before the contract's rotation."""
    return (camera.width, camera.height) if camera.rotate in (0, 180) else (camera.height, camera.width)


class RealSense:
    """Colour stream of a RealSense; stamps are the device's, moved to the monotonic clock when a frame arrives."""

    def __init__(self, serial: str, camera: CameraSpec, fps: float) -> None:
        try:
            import pyrealsense2 as rs
        except ImportError:
            raise RatchetError(
                "camera.no_driver",
                "pyrealsense2 is not installed",
                where=camera.name,
                fix="install pyrealsense2, or run realsense2_camera instead of camera_node",
            ) from None
        width, height = raw_size(camera)
        config = rs.config()
        if serial:
            config.enable_device(serial)
        form = rs.format.bgr8 if camera.encoding == "bgr8" else rs.format.rgb8
        config.enable_stream(rs.stream.color, width, height, form, int(fps))
        self._pipeline = rs.pipeline()
        try:
            self._pipeline.start(config)
        except RuntimeError as error:
            raise RatchetError(
                "camera.not_found", str(error), where=f"{camera.name} {serial}", fix="check cable, serial and size"
            ) from None

    def read(self) -> tuple[UInt8, float] | None:
        try:
            frame = self._pipeline.wait_for_frames(1000).get_color_frame()
        except RuntimeError:
            return None
        now = time.monotonic()
        age = max(time.time() * 1e3 - frame.get_timestamp(), 0.0) * 1e-3  # global time: the host's clock, ms
        return np.array(frame.get_data(), np.uint8), now - (age if age < 1.0 else 0.0)

    def close(self) -> None:
        self._pipeline.stop()


class Uvc:
    """A webcam through OpenCV; the moment is when the frame was handed over."""

    def __init__(self, source: str, camera: CameraSpec, fps: float) -> None:
        import cv2

        self._rgb = camera.encoding == "rgb8"
        self._capture: Any = cv2.VideoCapture(int(source) if source.isdigit() else source, cv2.CAP_V4L2)
        width, height = raw_size(camera)
        if not self._capture.isOpened():
            raise RatchetError("camera.not_found", "cannot be opened", where=f"{camera.name} {source}", fix="check it")
        wanted = ((cv2.CAP_PROP_FRAME_WIDTH, width), (cv2.CAP_PROP_FRAME_HEIGHT, height), (cv2.CAP_PROP_FPS, fps))
        for name, value in (*wanted, (cv2.CAP_PROP_BUFFERSIZE, 1)):
            self._capture.set(name, value)
        got = tuple(int(self._capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if got != (width, height):
            self._capture.release()
            raise RatchetError(
                "camera.bad_size",
                f"gives {got[0]} x {got[1]}, the contract says {width} x {height}",
                where=camera.name,
                fix="choose a size that the camera has",
            )

    def read(self) -> tuple[UInt8, float] | None:
        there, frame = self._capture.read()
        if not there:
            return None
        return np.asarray(frame[..., ::-1] if self._rgb else frame, np.uint8), time.monotonic()

    def close(self) -> None:
        self._capture.release()


class Recorded:
    """A video file or a folder of images as a camera, at the rate asked for, over and over."""

    def __init__(self, source: str, camera: CameraSpec, fps: float) -> None:
        import cv2

        path = Path(source)
        frames: list[Any] = []
        if path.is_dir():
            frames = [cv2.imread(str(p)) for p in sorted(path.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES]
        elif path.suffix.lower() in VIDEOS and path.is_file():
            capture = cv2.VideoCapture(str(path))
            while (got := capture.read())[0]:
                frames.append(got[1])
            capture.release()
        frames = [f for f in frames if f is not None]
        if not frames:
            raise RatchetError("camera.not_found", "no images there", where=source, fix="a video or a folder of images")
        width, height = raw_size(camera)
        if any(f.shape != (height, width, 3) for f in frames):
            raise RatchetError(
                "camera.bad_size",
                f"{frames[0].shape[1]} x {frames[0].shape[0]}, the contract says {width} x {height}",
                where=source,
                fix="record at the contract's size",
            )
        rgb = camera.encoding == "rgb8"
        self._frames = [np.ascontiguousarray(f[..., ::-1]) if rgb else f for f in frames]
        self._period, self._next, self._count = 1.0 / fps, time.monotonic(), 0

    def read(self) -> tuple[UInt8, float] | None:
        self._next = max(self._next + self._period, time.monotonic())
        time.sleep(max(self._next - time.monotonic(), 0.0))
        frame = self._frames[self._count % len(self._frames)]
        self._count += 1
        return frame, time.monotonic()

    def close(self) -> None:
        self._frames = []
