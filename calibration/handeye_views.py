"""Pose sets that say too little of where a camera is, each refused with its reason before anything is estimated.

Knows poses, pictures' sizes and counts. Knows no estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from agent.errors import RatchetError
from calibration.camera_model import CameraModel
from calibration.detection import Detection
from calibration.geometry import Float, difference, require_rigid

LEAST_POSES = 8
LEAST_TURN = np.radians(10.0)  # between two views, for the turn to say something


def require_views(
    camera: CameraModel, mounting: str, poses: Sequence[Float], detections: Sequence[Detection]
) -> list[Float]:
    """The poses, checked. Raises RatchetError; `handeye.calibrate` lists the codes."""
    if mounting not in ("eye_in_hand", "eye_to_hand"):
        raise RatchetError(
            "calibration.bad_mounting", f"unknown mounting '{mounting}'", fix="eye_in_hand or eye_to_hand"
        )
    if len(poses) != len(detections):
        raise RatchetError(
            "calibration.mismatch",
            f"{len(poses)} robot poses and {len(detections)} views",
            fix="give one pose for every picture, in the same order",
        )
    checked = [require_rigid(p, detections[i].name or f"pose {i}") for i, p in enumerate(poses)]
    other = next((d for d in detections if d.size != (camera.width, camera.height)), None)
    if other is not None:
        raise RatchetError(
            "calibration.wrong_size",
            f"a picture of {other.size[0]} x {other.size[1]}, the intrinsics are for {camera.width} x {camera.height}",
            where=other.name,
            fix="use the intrinsics of this resolution",
        )
    if len(checked) < LEAST_POSES:
        raise RatchetError(
            "calibration.too_few_poses", f"{len(checked)} poses, at least {LEAST_POSES} are needed",
            fix="take 15 to 25, turned about different axes",
        )  # fmt: skip
    apart = [np.abs(difference(a, b)) for a, b in combinations(checked, 2)]
    moved = np.array([[np.linalg.norm(d[:3]), np.linalg.norm(d[3:])] for d in apart])
    same = (moved[:, 0] < np.radians(0.5)) & (moved[:, 1] < 0.002)
    if same.sum() > len(checked):
        raise RatchetError(
            "calibration.duplicate_poses", f"{same.sum()} pairs of poses are the same", fix="move between the pictures"
        )
    turns = np.array([difference(a, b)[:3] for a, b in combinations(checked, 2)])
    far = np.linalg.norm(turns, axis=1) > LEAST_TURN
    if far.mean() < 0.2:
        raise RatchetError(
            "calibration.pure_translation",
            f"the arm turned by at most {np.degrees(np.linalg.norm(turns, axis=1).max()):.1f} degrees between poses",
            fix="turn the hand by 20 to 40 degrees between pictures; moving alone says nothing of the camera's place",
        )
    axes = turns[far] / np.linalg.norm(turns[far], axis=1, keepdims=True)
    values = np.linalg.svd(axes, compute_uv=False)
    if values[1] < 0.15 * values[0]:
        raise RatchetError(
            "calibration.one_axis",
            "all turns are about the same axis; the camera's place along it cannot be told",
            fix="turn the hand about a second axis too",
        )
    return checked
