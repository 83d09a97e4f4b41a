"""camera_node: one camera of the contract onto its topic, as a RealSense, a UVC camera or a recording delivers it, with
its calibration beside it.

Knows one device and one thread that reads it. The process loads the shipped Fast DDS profile: without it images larger
than 512 kB get lost between processes.
"""

from __future__ import annotations

import threading
import time
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from sensor_msgs.msg import CameraInfo, Image

from ratchet_ros.messages import camera_calibration, decode, qos
from ratchet_ros.messages.times import SteadyTime
from ratchet_ros.nodes.base import ERROR, OK, Line, RatchetNode, spin
from ratchet_ros.nodes.params import parameter
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import UInt8
from ratchet_vla.runtime.cameras.devices import DEVICE_KINDS, Device, open_device


@dataclass(frozen=True)
class Parameters:
    contract: str = parameter("", "Path of the robot contract (YAML).")
    camera: str = parameter("", "Name of the camera in the contract.")
    device: str = parameter("uvc", "Kind of device.", one_of=DEVICE_KINDS)
    source: str = parameter("", "Serial, /dev/videoN, video file or folder of images; empty: the contract's source.")
    fps: float = parameter(30.0, "Frames per second.", low=0.5, high=240.0)
    calibrations: str = parameter("", "Folder of calibrations, for CameraInfo of the contract's; empty: none.")
    transform: bool = parameter(False, "Publish where the camera is on /tf_static; needs tf2_msgs.")


class CameraNode(RatchetNode):
    Parameters = Parameters

    def __init__(self, **options: Any) -> None:
        super().__init__("camera_node", **options)
        self._device: Device | None = None
        self._out: Any = None
        self._out_info: Any = None
        self._out_transform: Any = None
        self._info: CameraInfo | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._frames = self._silent = 0
        self._clock_map = SteadyTime()

    def setup(self) -> None:
        contract = RobotContract.load(self.settings.contract)
        self._camera = contract.camera(self.settings.camera)
        if decode.image_type(self._camera) is not Image:
            raise RatchetError(
                "camera.compressed",
                "camera_node publishes raw images",
                where=self._camera.topic,
                fix="name the raw topic in the contract",
            )
        calibration = None
        if self.settings.calibrations:
            calibration = camera_calibration.load(self.settings.calibrations, self._camera)
            self._info = camera_calibration.info(calibration, f"{self._camera.name}_optical_frame")
        if self.settings.transform:
            if calibration is None:
                raise RatchetError("ros.bad_parameter", "there is no transform without a calibration",
                                   where="transform", fix="give the parameter calibrations")  # fmt: skip
            where = camera_calibration.transform(calibration)
            self._out_transform = self.create_publisher(type(where), "/tf_static", qos.STATUS)
            for one in where.transforms:
                one.header.stamp = self._clock_map.to_ros(time.monotonic())
            self._out_transform.publish(where)
        source = self.settings.source or self._camera.source
        self._device = open_device(self.settings.device, source, self._camera, self.settings.fps)
        self._out = self.create_publisher(Image, self._camera.topic, qos.IMAGES)
        if self._info is not None:
            topic = camera_calibration.info_topic(self._camera.topic)
            self._out_info = self.create_publisher(CameraInfo, topic, qos.IMAGES)

    def start(self) -> None:
        self._stopping.clear()
        self._thread = threading.Thread(target=self._read, name="camera", daemon=True)
        self._thread.start()

    def halt(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(3.0)
            self._thread = None

    def teardown(self) -> None:
        if self._device is not None:
            self._device.close()
            self._device = None
        for name in ("_out", "_out_info", "_out_transform"):
            if getattr(self, name) is not None:
                self.destroy_publisher(getattr(self, name))
                setattr(self, name, None)
        self._info = None

    def diagnose(self) -> list[Line]:
        frames, self._frames = self._frames, 0
        level, text = (OK, f"{frames} frames in the last second") if frames else (ERROR, "no frames")
        return [(level, f"camera {self._camera.name}", text, {"fps": frames, "timeouts": self._silent})]

    def _read(self) -> None:
        device = self._device
        assert device is not None
        while not self._stopping.is_set():
            got = device.read()
            if got is None:
                self._silent += 1
                time.sleep(0.01)  # an unplugged device answers at once; do not spin on it
                continue
            self._publish(*got)
            self._frames += 1

    def _publish(self, pixels: UInt8, taken: float) -> None:
        message = Image(
            height=pixels.shape[0], width=pixels.shape[1], encoding=self._camera.encoding, step=pixels.shape[1] * 3
        )
        message.header.stamp = self._clock_map.to_ros(taken)
        message.header.frame_id = f"{self._camera.name}_optical_frame"
        data = array("B")
        data.frombytes(np.ascontiguousarray(pixels).data.cast("B"))
        message.data = data
        self._out.publish(message)
        if self._info is not None and self._out_info is not None:
            self._info.header.stamp = message.header.stamp
            self._out_info.publish(self._info)


def main() -> int:
    return spin(CameraNode)


if __name__ == "__main__":
    raise SystemExit(main())
