"""Rigid transforms as (4, 4) matrices, and small motions as 6 numbers.

Knows SE(3) with SciPy's rotations. Knows no camera and no robot.
A small motion is (rotation vector in rad, translation in m); it acts on the right: T exp(d), in the frame of T's child.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from ratchet_vla.errors import RatchetError

Float = NDArray[np.float64]


def transform(rotation: Float, translation: Float) -> Float:
    """rotation: (3, 3). translation: (3,) m. Returns (4, 4)."""
    pose = np.eye(4)
    pose[:3, :3] = rotation
    pose[:3, 3] = translation
    return pose


def small(motion: Float) -> Float:
    """(6,) rotation vector and translation -> (4, 4)."""
    return transform(Rotation.from_rotvec(motion[:3]).as_matrix(), motion[3:])


def inverse(pose: Float) -> Float:
    """(4, 4) or (..., 4, 4) rigid transforms, inverted."""
    # The inverse of a rotation is its transpose; no linear solve, so the result stays rigid.
    rotation = np.swapaxes(pose[..., :3, :3], -1, -2)
    inverse_pose = np.broadcast_to(np.eye(4), pose.shape).copy()
    inverse_pose[..., :3, :3] = rotation
    inverse_pose[..., :3, 3] = -(rotation @ pose[..., :3, 3:])[..., 0]
    return inverse_pose


def difference(a: Float, b: Float) -> Float:
    """(6,): the small motion that takes a to b, in a's frame: b = a small(d) up to first order in the translation."""
    relative = inverse(a) @ b
    return np.concatenate([Rotation.from_matrix(relative[:3, :3]).as_rotvec(), relative[:3, 3]])


def skew(vectors: Float) -> Float:
    """Cross products as matrices, (..., 3) -> (..., 3, 3): the one of v, times x, is v x x."""
    matrices = np.zeros((*vectors.shape[:-1], 3, 3))
    matrices[..., 0, 1] = -vectors[..., 2]
    matrices[..., 0, 2] = vectors[..., 1]
    matrices[..., 1, 2] = -vectors[..., 0]
    matrices[..., 1, 0] = vectors[..., 2]
    matrices[..., 2, 0] = -vectors[..., 1]
    matrices[..., 2, 1] = vectors[..., 0]
    return matrices


def from_quaternion(position: Sequence[float], xyzw: Sequence[float]) -> Float:
    """position: (3,) m. xyzw: (4,) quaternion, scalar last. Returns (4, 4)."""
    return transform(Rotation.from_quat(xyzw).as_matrix(), np.asarray(position, float))


def quaternion(pose: Float) -> Float:
    """(4,) xyzw, scalar last and not negative."""
    xyzw: Float = Rotation.from_matrix(pose[:3, :3]).as_quat(canonical=True)
    return xyzw


def require_rigid(pose: Float, where: str) -> Float:
    """The pose as float64 (4, 4), refused where it is none.

    Raises:
        RatchetError: calibration.not_a_pose (shape, NaN, not a rotation), calibration.mirrored_pose (a reflection),
            calibration.units (more than 20 m away: millimetres given as metres).
    """
    checked = np.asarray(pose, float)
    if checked.shape != (4, 4) or not np.isfinite(checked).all() or not np.allclose(checked[3], [0, 0, 0, 1]):
        raise RatchetError(
            "calibration.not_a_pose",
            f"not a finite (4, 4) rigid transform: shape {checked.shape}",
            where=where,
            fix="give rotation and translation as one matrix whose last row is 0 0 0 1",
        )
    rotation = checked[:3, :3]
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-4):
        raise RatchetError(
            "calibration.not_a_pose",
            "the rotation part is not orthogonal",
            where=where,
            fix="check the order of the quaternion (x y z w) and that it is normalised",
        )
    if np.linalg.det(rotation) < 0:
        raise RatchetError(
            "calibration.mirrored_pose", "the rotation part is a reflection", where=where, fix="check the axes' signs"
        )
    if np.linalg.norm(checked[:3, 3]) > 20.0:
        raise RatchetError(
            "calibration.units",
            f"{np.linalg.norm(checked[:3, 3]):.0f} m from the robot's base",
            where=where,
            fix="give metres, not millimetres",
        )
    return checked
