"""Rotations as the contract writes them, to and from unit quaternions and rotation vectors. Plain NumPy, float64.

Knows axis-angle, extrinsic x-y-z Euler angles and quaternions (x, y, z, w). Knows no robot.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


def to_quaternion(values: Vector, form: str) -> Vector:
    """(4,) unit quaternion (x, y, z, w). form: axis_angle (3,) rad, euler_xyz (3,) rad, quaternion_xyzw (4,)."""
    if form == "axis_angle":
        return from_vector(values)
    if form == "euler_xyz":
        parts = [from_vector(np.eye(3)[i] * values[i]) for i in range(3)]
        return product(parts[2], product(parts[1], parts[0]))
    out: Vector = values / np.linalg.norm(values)
    return out


def from_quaternion(q: Vector, form: str, near: Vector) -> Vector:
    """The inverse of `to_quaternion`; of equal ways to write a rotation, the one closest to `near`."""
    if form == "axis_angle":
        vector = to_vector(q)
        angle = float(np.linalg.norm(vector))
        if angle < 1e-12:
            return vector
        other = vector * (1.0 - 2.0 * math.pi / angle)
        return other if np.linalg.norm(other - near) < np.linalg.norm(vector - near) else vector
    if form == "euler_xyz":
        x, y, z, w = q
        pitch = math.asin(max(-1.0, min(1.0, 2.0 * (w * y - z * x))))
        roll = math.atan2(2.0 * (w * x + y * z), 1.0 - 2.0 * (x * x + y * y))
        yaw = math.atan2(2.0 * (w * z + x * y), 1.0 - 2.0 * (y * y + z * z))
        angles = np.array([roll, pitch, yaw])
        flipped = np.array([roll + math.pi, math.pi - pitch, yaw + math.pi])
        turns = [a + 2.0 * math.pi * np.round((near - a) / (2.0 * math.pi)) for a in (angles, flipped)]
        best: Vector = min(turns, key=lambda a: float(np.abs(a - near).max()))
        return best
    return -q if float(q @ near) < 0.0 else q


def product(a: Vector, b: Vector) -> Vector:
    """a after b."""
    ax, ay, az, aw = a
    bx, by, bz, bw = b
    return np.array(
        [
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
            aw * bw - ax * bx - ay * by - az * bz,
        ]
    )


def inverse(q: Vector) -> Vector:
    out: Vector = q * np.array([-1.0, -1.0, -1.0, 1.0])
    return out


def from_vector(vector: Vector) -> Vector:
    """Rotation vector (3,) rad -> unit quaternion."""
    angle = float(np.linalg.norm(vector))
    scale = 0.5 - angle * angle / 48.0 if angle < 1e-6 else math.sin(0.5 * angle) / angle
    return np.array([*(vector * scale), math.cos(0.5 * angle)])


def to_vector(q: Vector) -> Vector:
    """Unit quaternion -> rotation vector (3,) rad of length at most pi."""
    if q[3] < 0.0:
        q = -q
    sine = float(np.linalg.norm(q[:3]))
    scale = 2.0 if sine < 1e-9 else 2.0 * math.atan2(sine, float(q[3])) / sine
    out: Vector = q[:3] * scale
    return out
