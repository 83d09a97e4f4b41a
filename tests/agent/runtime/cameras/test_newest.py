"""Frames that waited in a queue make a policy act on the past: a camera is drained, and a broken one is told.

Pinned: the camera suite for recordings (folder and video) and for UVC and RealSense through stand-ins of their
libraries; what a slow asker gets is the newest; a driver that breaks or falls silent raises in who waits. Determinism:
devices that answer when the test lets them.
"""

from __future__ import annotations

import queue
import sys
import time
import types
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ratchet_vla.contract import CameraSpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import UInt8
from ratchet_vla.runtime.cameras.devices import Device, open_device
from ratchet_vla.runtime.cameras.newest import NewestFrame
from ratchet_vla.testing.conformance.camera import CameraConformance, Open

FPS = 60.0
SPEC = CameraSpec("front", 48, 32)


def image(k: int, width: int = 48, height: int = 32) -> UInt8:
    return np.full((height, width, 3), [10 + k, 100, 200], np.uint8)  # RGB


class Settings:
    @pytest.fixture
    def spec(self) -> CameraSpec:
        return SPEC

    @pytest.fixture
    def fps(self) -> float:
        return FPS


class TestFolder(Settings, CameraConformance):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Open:
        for k in range(4):
            cv2.imwrite(str(tmp_path / f"{k}.png"), image(k)[..., ::-1])
        return lambda spec: open_device("recorded", str(tmp_path), spec, FPS)


class TestVideo(Settings, CameraConformance):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Open:
        path = tmp_path / "video.avi"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), FPS, (48, 32))
        for k in range(8):
            writer.write(image(k)[..., ::-1])
        writer.release()
        return lambda spec: open_device("recorded", str(path), spec, FPS)


class TestUvc(Settings, CameraConformance):
    """OpenCV's capture replaced by one that delivers at the rate of a camera."""

    @pytest.fixture
    def opener(self, monkeypatch: pytest.MonkeyPatch) -> Open:
        class Capture:
            def __init__(self, source: object, backend: int) -> None:
                self.count = 0

            def isOpened(self) -> bool:  # noqa: N802 - as cv2.VideoCapture has it
                return True

            def set(self, name: int, value: float) -> bool:
                return True  # a camera that has one size only, whatever it is asked for

            def get(self, name: int) -> float:
                return {cv2.CAP_PROP_FRAME_WIDTH: 48.0, cv2.CAP_PROP_FRAME_HEIGHT: 32.0}[name]

            def read(self) -> tuple[bool, UInt8]:
                time.sleep(1 / FPS)  # the camera's own pace
                self.count += 1
                return True, image(self.count)[..., ::-1].copy()

            def release(self) -> None:
                self.count = 0

        monkeypatch.setattr(cv2, "VideoCapture", Capture)
        return lambda spec: open_device("uvc", "0", spec, FPS)

    def test_colours_are_in_the_contracts_order(self, device: Device) -> None:
        got = device.read()
        assert got is not None
        assert got[0][0, 0, 1:].tolist() == [100, 200]


class TestRealSense(Settings, CameraConformance):
    """pyrealsense2 replaced by a module with the calls that the driver makes."""

    @pytest.fixture
    def opener(self, monkeypatch: pytest.MonkeyPatch) -> Open:
        module: Any = types.ModuleType("pyrealsense2")

        class Frame:
            def __init__(self, k: int) -> None:
                self.k, self.stamp = k, 1e3 * time.time()

            def get_color_frame(self) -> Frame:
                return self

            def get_timestamp(self) -> float:
                return self.stamp

            def get_data(self) -> UInt8:
                return image(self.k)

        class Config:
            def enable_device(self, serial: str) -> None:
                self.serial = serial

            def enable_stream(self, stream: str, width: int, height: int, form: str, fps: int) -> None:
                self.size = (width, height)

        class Pipeline:
            def __init__(self) -> None:
                self.k = 0

            def start(self, config: Config) -> None:
                if config.size != (48, 32):
                    raise RuntimeError("Couldn't resolve requests")

            def wait_for_frames(self, timeout: int) -> Frame:
                time.sleep(1 / FPS)  # the camera's own pace
                self.k += 1
                return Frame(self.k)

            def stop(self) -> None:
                self.k = 0

        module.config, module.pipeline = Config, Pipeline
        module.format = types.SimpleNamespace(rgb8="rgb8", bgr8="bgr8")
        module.stream = types.SimpleNamespace(color="color")
        monkeypatch.setitem(sys.modules, "pyrealsense2", module)
        return lambda spec: open_device("realsense", "123", spec, FPS)

    def test_another_size_is_refused(self, opener: Open, spec: CameraSpec) -> None:
        with pytest.raises(RatchetError, match=r"camera\.not_found.*123"):  # librealsense does not say why
            opener(CameraSpec("front", 50, 32))


def test_without_its_package_a_realsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrealsense2", None)
    with pytest.raises(RatchetError, match=r"camera\.no_driver"):
        open_device("realsense", "123", SPEC, FPS)


def test_a_kind_that_nobody_knows_is_refused_and_opens_no_webcam() -> None:
    with pytest.raises(RatchetError, match=r"camera\.unknown_kind.*uvc, realsense, recorded"):
        open_device("webcam", "0", SPEC, FPS)


class Fed:
    """A device that gives what the test feeds it: frames, None for silence, exceptions."""

    def __init__(self) -> None:
        self.waiting: queue.Queue[Any] = queue.Queue()
        self.closed = False

    def read(self) -> tuple[UInt8, float] | None:
        try:
            item = self.waiting.get(timeout=0.05)
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        return image(int(item)), float(item)

    def close(self) -> None:
        self.closed = True


def test_a_slow_asker_gets_the_newest() -> None:
    device = Fed()
    camera = NewestFrame(device, "front")
    for k in range(1, 8):
        device.waiting.put(k)
    frame, stamp = camera.newest(after=6.5)
    assert (stamp, frame[0, 0, 0]) == (7.0, 17)
    assert camera.newest()[1] == 7.0  # and again, where no newer one has come
    camera.close()
    assert device.closed
    assert camera.count == 7


def test_a_broken_driver_is_told_to_who_waits() -> None:
    device = Fed()
    camera = NewestFrame(device, "front")
    device.waiting.put(OSError("unplugged"))
    with pytest.raises(RatchetError, match=r"camera\.failed.*unplugged.*front"):
        camera.newest(timeout=10.0)
    camera.close()


def test_silence_is_an_error() -> None:
    camera = NewestFrame(Fed(), "front")
    with pytest.raises(RatchetError, match=r"camera\.silent.*front"):
        camera.newest(timeout=0.2)
    camera.close()
