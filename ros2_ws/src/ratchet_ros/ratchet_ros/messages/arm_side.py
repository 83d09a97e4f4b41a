"""The other end of the wire: an arm's own view of the contract's topics. Commands are read, states and images are made.

Knows message types and the contract's topic mapping; the mirror image of encode and decode. Knows no simulator.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray

from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.contract.topics import CommandSink
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, UInt8
from ratchet_vla.runtime import rotation


def command_values(contract: RobotContract, sink: CommandSink, message: Any) -> Any:
    """(len(dims),) float64, physical units of the contract: what the sender meant.

    Raises:
        RatchetError: ros.unsupported_sink for kinds that no simulated arm here takes.
    """
    if sink.kind == "twist_stamped":
        linear, angular = message.twist.linear, message.twist.angular
        values = np.array([linear.x, linear.y, linear.z]) / contract.control_hz
        if len(sink.dims) > 3:
            turn = np.array([angular.x, angular.y, angular.z]) / contract.control_hz
            if contract.action.rotation != "axis_angle":
                near = np.array([0.0, 0.0, 0.0, 1.0]) if len(sink.dims) == 7 else np.zeros(3)
                turn = rotation.from_quaternion(rotation.from_vector(turn), contract.action.rotation, near)
            values = np.concatenate([values, turn])
        return values
    if sink.kind == "float64_multi_array":
        return (np.asarray(message.data, np.float64) - sink.offset) / sink.scale
    if sink.kind == "joint_trajectory":
        names = list(message.joint_names)
        positions = np.asarray(message.points[-1].positions, np.float64)
        return (positions[[names.index(n) for n in sink.names]] - sink.offset) / sink.scale
    raise RatchetError("ros.unsupported_sink", f"no simulated arm takes {sink.kind}", where=sink.topic)


def image_message(pixels: UInt8, camera: CameraSpec, stamp: Time) -> Image:
    """An upright (H, W, 3) RGB image as the camera's driver delivers it: turned back, in the driver's encoding."""
    raw = pixels[:, ::-1] if camera.mirror else pixels
    raw = np.rot90(raw, -(camera.rotate // 90))
    if camera.encoding == "bgr8":
        raw = raw[..., ::-1]
    raw = np.ascontiguousarray(raw)
    message = Image(height=raw.shape[0], width=raw.shape[1], encoding=camera.encoding, step=raw.shape[1] * 3)
    message.header.stamp, message.header.frame_id = stamp, f"{camera.name}_optical_frame"
    data = array("B")
    data.frombytes(raw.data.cast("B"))  # a bytes-like of another kind is copied element by element on assignment
    message.data = data
    return message


def state_messages(contract: RobotContract, state: dict[str, Float32], stamp: Time) -> dict[str, Any]:
    """Topic -> message that carries every state field of the contract that travels there."""
    out: dict[str, Any] = {}
    assert contract.ros is not None
    fields = {s.name: s for s in contract.state}
    for source in contract.ros.state:
        field = fields[source.field]
        values = np.asarray(state[field.name], np.float64) / source.scale
        if source.kind == "joint_state":
            message = out.setdefault(field.topic, JointState())
            message.header.stamp = stamp
            if source.part == "position":
                message.name = [*message.name, *source.names]
                message.position = [*message.position, *(float(v) for v in values)]
        elif source.kind == "pose_stamped":
            message = out.setdefault(field.topic, PoseStamped())
            message.header.stamp, message.header.frame_id = stamp, field.frame
            if source.part == "position":
                p = message.pose.position
                p.x, p.y, p.z = (float(v) for v in values)
            else:
                form = "quaternion_xyzw" if len(values) == 4 else "euler_xyz"
                if len(values) == 3 and contract.action.rotation != "euler_xyz":
                    form = "axis_angle"
                o = message.pose.orientation
                o.x, o.y, o.z, o.w = (float(v) for v in rotation.to_quaternion(values, form))
        else:
            out[field.topic] = Float64MultiArray(data=[float(v) for v in values])
    return out
