"""A stored calibration as ROS messages: CameraInfo beside the images, and where the camera is.

Knows the store and the two messages. tf2_msgs is imported when a transform is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geometry_msgs.msg import TransformStamped
from sensor_msgs.msg import CameraInfo

from ratchet_calibration.store import export
from ratchet_calibration.store.folder import CalibrationStore
from ratchet_calibration.store.record import Calibration
from ratchet_vla.contract import CameraSpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.cameras.devices import raw_size


def load(folder: str, camera: CameraSpec) -> Calibration:
    """The calibration that the contract demands for this camera.

    Raises:
        RatchetError: camera.not_calibrated where the contract names none; camera.other_size; what the store raises.
    """
    if not camera.calibration_id:
        raise RatchetError(
            "camera.not_calibrated", "the contract names no calibration", where=camera.name,
            fix="give calibration_id in the contract, or leave the parameter calibrations empty",
        )  # fmt: skip
    found = CalibrationStore(Path(folder)).load(camera.calibration_id)
    if (found.model.width, found.model.height) != raw_size(camera):
        raise RatchetError(
            "camera.other_size",
            f"calibrated at {found.model.width} x {found.model.height}, the contract says {raw_size(camera)}",
            where=camera.name,
            fix="calibrate at the contract's size; a calibration is of the raw image, before any rotation",
        )
    return found


def info(calibration: Calibration, frame: str) -> CameraInfo:
    """Without a stamp. frame: of the image's header."""
    out = CameraInfo(**export.camera_info(calibration))
    out.header.frame_id = frame
    return out


def info_topic(image_topic: str) -> str:
    """Where image_transport looks for it: beside the images."""
    return "/".join([*image_topic.split("/")[:-1], "camera_info"])


def transform(calibration: Calibration) -> Any:
    """tf2_msgs/TFMessage for /tf_static, without a stamp.

    Raises:
        RatchetError: calibration.no_mount, camera.no_tf.
    """
    fields = export.static_transform(calibration)
    try:
        from tf2_msgs.msg import TFMessage
    except ImportError:
        raise RatchetError(
            "camera.no_tf", "tf2_msgs is not installed", where=calibration.camera,
            fix="install it, or publish the transform with `ratchet calibrate export --form transform`",
        ) from None  # fmt: skip
    out = TransformStamped(child_frame_id=fields["child"])
    out.header.frame_id = fields["parent"]
    place, turn = out.transform.translation, out.transform.rotation
    place.x, place.y, place.z = fields["translation"]
    turn.x, turn.y, turn.z, turn.w = fields["rotation"]
    return TFMessage(transforms=[out])
