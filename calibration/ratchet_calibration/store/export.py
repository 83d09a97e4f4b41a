"""Export of a calibration: ROS CameraInfo, static transform, URDF.

Knows the fields of these formats. Knows no ROS package: everything is plain data or text.
"""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import yaml
from scipy.spatial.transform import Rotation

from ratchet_calibration.store.record import Calibration
from ratchet_vla.errors import RatchetError

# sensor_msgs/CameraInfo knows these; "radial" is plumb_bob with zeros.
ROS_MODEL = {
    "none": "plumb_bob",
    "radial": "plumb_bob",
    "brown5": "plumb_bob",
    "rational8": "rational_polynomial",
    "fisheye": "equidistant",
}


def camera_info(calibration: Calibration) -> dict[str, Any]:
    """Fields of sensor_msgs/CameraInfo without header: width, height, distortion_model, d, k, r, p."""
    camera_model = calibration.model
    distortion = list(camera_model.distortion)
    # ROS expects five coefficients, k1 k2 p1 p2 k3.
    if ROS_MODEL[camera_model.model] == "plumb_bob":
        distortion += [0.0] * (5 - len(distortion))
    return {
        "width": camera_model.width,
        "height": camera_model.height,
        "distortion_model": ROS_MODEL[camera_model.model],
        "d": [float(value) for value in distortion],
        "k": [float(value) for value in camera_model.matrix.ravel()],
        "r": [float(value) for value in np.eye(3).ravel()],
        "p": [float(value) for value in np.hstack([camera_model.matrix, np.zeros((3, 1))]).ravel()],
    }


def camera_info_yaml(calibration: Calibration) -> str:
    """The file that ROS camera drivers load (camera_info_manager's format)."""
    info = camera_info(calibration)

    def matrix(rows: int, columns: int, data: list[float]) -> dict[str, Any]:
        return {"rows": rows, "cols": columns, "data": data}

    return yaml.safe_dump(
        {
            "image_width": info["width"],
            "image_height": info["height"],
            "camera_name": calibration.camera,
            "camera_matrix": matrix(3, 3, info["k"]),
            "distortion_model": info["distortion_model"],
            "distortion_coefficients": matrix(1, len(info["d"]), info["d"]),
            "rectification_matrix": matrix(3, 3, info["r"]),
            "projection_matrix": matrix(3, 4, info["p"]),
        },
        sort_keys=False,
    )


def static_transform(calibration: Calibration) -> dict[str, Any]:
    """Fields of geometry_msgs/TransformStamped: parent, child, translation (m), rotation (xyzw).

    Raises:
        RatchetError: calibration.no_mount.
    """
    mount = calibration.mount
    if mount is None:
        raise RatchetError(
            "calibration.no_mount",
            "only the intrinsics are known",
            where=calibration.camera,
            fix="run ratchet calibrate handeye",
        )
    return {
        "parent": mount.parent,
        "child": mount.child,
        "translation": list(mount.position),
        "rotation": list(mount.orientation),
    }


def urdf(calibration: Calibration) -> str:
    """A link for the camera's optical frame (x right, y down, z ahead) and the fixed joint that holds it."""
    mount_transform = static_transform(calibration)
    x, y, z = mount_transform["translation"]
    # URDF's rpy is about fixed axes, in the order x, y, z.
    roll, pitch, yaw = Rotation.from_quat(mount_transform["rotation"]).as_euler("xyz")
    child = quoteattr(mount_transform["child"])
    parent = quoteattr(mount_transform["parent"])
    return (
        f"<!-- {calibration.camera}, calibration {calibration.id[:12]}, {calibration.date} -->\n"
        f"<link name={child}/>\n"
        f'<joint name={quoteattr(mount_transform["child"] + "_joint")} type="fixed">\n'
        f"  <parent link={parent}/>\n  <child link={child}/>\n"
        f'  <origin xyz="{x:.9f} {y:.9f} {z:.9f}" rpy="{roll:.9f} {pitch:.9f} {yaw:.9f}"/>\n</joint>\n'
    )
