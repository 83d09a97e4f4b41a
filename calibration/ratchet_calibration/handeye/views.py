"""Checks of hand-eye pose sets: degenerate ones are refused with their reason before anything is estimated.

Knows poses, image sizes and counts. Knows no estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from ratchet_calibration.boards.detection import Detection
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.geometry import Float, difference, require_rigid
from ratchet_vla.errors import RatchetError

LEAST_POSES = 8
LEAST_TURN = np.radians(10.0)  # between two views, for the turn to say something


def require_views(
    camera: CameraModel, mounting: str, poses: Sequence[Float], detections: Sequence[Detection]
) -> list[Float]:
    """The poses, checked. Raises RatchetError; `estimate.calibrate` lists the codes."""
    if mounting not in ("eye_in_hand", "eye_to_hand"):
        raise RatchetError(
            "calibration.bad_mounting", f"unknown mounting '{mounting}'", fix="eye_in_hand or eye_to_hand"
        )
    if len(poses) != len(detections):
        raise RatchetError(
            "calibration.mismatch",
            f"{len(poses)} robot poses and {len(detections)} views",
            fix="give one pose for every image, in the same order",
        )
    checked_poses = [require_rigid(pose, detections[view].name or f"pose {view}") for view, pose in enumerate(poses)]
    wrong_size = next((detection for detection in detections if detection.size != (camera.width, camera.height)), None)
    if wrong_size is not None:
        raise RatchetError(
            "calibration.wrong_size",
            f"an image of {wrong_size.size[0]} x {wrong_size.size[1]}, "
            f"the intrinsics are for {camera.width} x {camera.height}",
            where=wrong_size.name,
            fix="use the intrinsics of this resolution",
        )
    if len(checked_poses) < LEAST_POSES:
        raise RatchetError(
            "calibration.too_few_poses",
            f"{len(checked_poses)} poses, at least {LEAST_POSES} are needed",
            fix="take 15 to 25, turned about different axes",
        )
    pair_motions = [
        np.abs(difference(first_pose, second_pose)) for first_pose, second_pose in combinations(checked_poses, 2)
    ]
    pair_sizes = np.array(
        [[np.linalg.norm(detection[:3]), np.linalg.norm(detection[3:])] for detection in pair_motions]
    )
    # Below 0.5 degrees and 2 mm two poses are one view, taken twice.
    is_duplicate = (pair_sizes[:, 0] < np.radians(0.5)) & (pair_sizes[:, 1] < 0.002)
    if is_duplicate.sum() > len(checked_poses):
        raise RatchetError(
            "calibration.duplicate_poses",
            f"{is_duplicate.sum()} pairs of poses are the same",
            fix="move between the images",
        )
    pair_turns = np.array(
        [difference(first_pose, second_pose)[:3] for first_pose, second_pose in combinations(checked_poses, 2)]
    )
    is_turned = np.linalg.norm(pair_turns, axis=1) > LEAST_TURN
    if is_turned.mean() < 0.2:
        largest_turn_deg = np.degrees(np.linalg.norm(pair_turns, axis=1).max())
        raise RatchetError(
            "calibration.pure_translation",
            f"the arm turned by at most {largest_turn_deg:.1f} degrees between poses",
            fix="turn the hand by 20 to 40 degrees between images; translation alone does not determine the pose",
        )
    turn_axes = pair_turns[is_turned] / np.linalg.norm(pair_turns[is_turned], axis=1, keepdims=True)
    # Singular values of the unit turn axes: one that dominates means that all turns share an axis.
    singular_values = np.linalg.svd(turn_axes, compute_uv=False)
    if singular_values[1] < 0.15 * singular_values[0]:
        raise RatchetError(
            "calibration.one_axis",
            "all turns are about the same axis, along which the camera's position is undetermined",
            fix="turn the hand about a second axis too",
        )
    return checked_poses
