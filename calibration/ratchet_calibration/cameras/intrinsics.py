"""Camera intrinsics from views of a board: choice of views, rejection of outliers, error on held-out views.

Knows OpenCV's estimators. Knows no camera device and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from ratchet_calibration.boards import coverage
from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import Detection
from ratchet_calibration.cameras.model import COEFFICIENTS, CameraModel, Model
from ratchet_calibration.geometry import Float, skew, small, transform
from ratchet_vla.errors import RatchetError

__all__ = ["IntrinsicsResult", "ViewError", "calibrate"]

LEAST_VIEWS = 8
FLAGS = {
    "none": cv2.CALIB_FIX_K1 | cv2.CALIB_FIX_K2 | cv2.CALIB_FIX_K3 | cv2.CALIB_ZERO_TANGENT_DIST,
    "radial": cv2.CALIB_FIX_K3 | cv2.CALIB_ZERO_TANGENT_DIST,
    "brown5": 0,
    "rational8": cv2.CALIB_RATIONAL_MODEL,
}
FISHEYE = cv2.fisheye.CALIB_RECOMPUTE_EXTRINSIC | cv2.fisheye.CALIB_FIX_SKEW


@dataclass(frozen=True)
class ViewError:
    """Reprojection error of one view.

    Attributes:
        points: (n, 2) px, as seen.
        residual: (n, 2) px, seen minus predicted.
        rms: px, over points.
        used: False for rejected and held-out views.
    """

    name: str
    pose: Float
    points: Float
    residual: Float
    rms: float
    used: bool
    held_out: bool = False


@dataclass(frozen=True)
class IntrinsicsResult:
    """A camera, and how well it explains the views.

    Attributes:
        camera: with standard deviations.
        rms, held_out_rms: px over all points of the used and of the held-out views.
        noise: px per coordinate, estimated.
        views: in the order of the detections.
        rejected: why, by name.
    """

    camera: CameraModel
    rms: float
    held_out_rms: float
    noise: float
    views: tuple[ViewError, ...]
    rejected: dict[str, str]
    coverage: coverage.Coverage
    warnings: tuple[str, ...] = ()


def calibrate(
    board: Board,
    detections: Sequence[Detection],
    model: Model = "brown5",
    *,
    most: int = 40,
    held_out: int = 5,
) -> IntrinsicsResult:
    """Estimate a camera's intrinsics.

    Args:
        most: views to estimate from, chosen by coverage. held_out: views that only measure the error.

    Raises:
        RatchetError: calibration.mixed_sizes, calibration.duplicate_views, calibration.too_few_views,
            calibration.no_tilt, calibration.no_coverage, calibration.did_not_converge, calibration.bad_model.
    """
    _require_views(board, detections, model)
    # Ordered by what each view adds, so that both the estimate and the held-out set cover the image.
    view_order = coverage.choose(board, detections, len(detections))
    held_out_views = set(_held_out(view_order, held_out))
    used_views = [view for view in view_order if view not in held_out_views][:most]
    rejected: dict[str, str] = {}
    while True:
        camera, poses = _estimate(board, [detections[view] for view in used_views], model)
        error_by_view = {
            view: _error(board, camera, detections[view], pose) for view, pose in zip(used_views, poses, strict=True)
        }
        worst_view = max(used_views, key=lambda view: error_by_view[view][1])
        other_errors = np.array([error_by_view[view][1] for view in used_views if view != worst_view])
        robust_spread = 1.4826 * float(np.median(np.abs(other_errors - np.median(other_errors))))
        # At least half the median and 0.02 px above it: among near-perfect views none is an outlier.
        error_limit = float(np.median(other_errors)) + max(
            6 * robust_spread, 0.5 * float(np.median(other_errors)), 0.02
        )
        if error_by_view[worst_view][1] <= error_limit or len(used_views) <= LEAST_VIEWS:
            break
        used_views.remove(worst_view)
        view_name = detections[worst_view].name or str(worst_view)
        rejected[view_name] = (
            f"reprojection error {error_by_view[worst_view][1]:.2f} px, "
            f"the others' median is {np.median(other_errors):.2f}"
        )
    camera, noise = _with_deviations(
        board, camera, [detections[view] for view in used_views], [error_by_view[view][0] for view in used_views]
    )
    views = []
    held_out_residuals = []
    for view, detection in enumerate(detections):
        if view in error_by_view and view in used_views:
            pose, rms, residual = error_by_view[view]
            views.append(ViewError(detection.name or str(view), pose, detection.points, residual, rms, used=True))
        else:
            pose, rms, residual = _error(board, camera, detection, None)
            view_name = detection.name or str(view)
            views.append(
                ViewError(view_name, pose, detection.points, residual, rms, used=False, held_out=view in held_out_views)
            )
            if view in held_out_views:
                held_out_residuals.append(residual)
    used_residuals = [error_by_view[view][2] for view in used_views]
    covered = coverage.measure(board, [detections[view] for view in used_views])
    return IntrinsicsResult(
        camera,
        _rms(used_residuals),
        _rms(held_out_residuals),
        noise,
        tuple(views),
        rejected,
        covered,
        _warnings(camera, covered),
    )


def _warnings(camera: CameraModel, covered: coverage.Coverage) -> tuple[str, ...]:
    warnings = [f"show {hint}" for hint in covered.missing]
    if camera.deviations:
        if camera.deviations[0] > 2e-3 * camera.fx:
            warnings.append(f"fx is only known to {camera.deviations[0]:.2f} px")
        if max(camera.deviations[2:4]) > 2.0:
            warnings.append(f"the principal point is only known to {max(camera.deviations[2:4]):.1f} px")
    return tuple(warnings)


def _require_views(board: Board, detections: Sequence[Detection], model: str) -> None:
    if model not in COEFFICIENTS:
        raise RatchetError(
            "calibration.bad_model", f"unknown model '{model}'", fix=f"models: {', '.join(COEFFICIENTS)}"
        )
    image_sizes = {detection.size for detection in detections}
    if len(image_sizes) > 1:
        raise RatchetError(
            "calibration.mixed_sizes",
            "images of " + ", ".join(f"{width} x {height}" for width, height in sorted(image_sizes)),
            fix="calibrate each resolution from images of its own",
        )
    distinct_views = _distinct(detections)
    if len(distinct_views) < len(detections) and len(distinct_views) < LEAST_VIEWS:
        raise RatchetError(
            "calibration.duplicate_views",
            f"only {len(distinct_views)} of {len(detections)} views differ",
            fix="move the board between the images",
        )
    if len(detections) < LEAST_VIEWS:
        raise RatchetError(
            "calibration.too_few_views",
            f"{len(detections)} usable views, at least {LEAST_VIEWS} are needed",
            fix="take more images; 20 to 40 are good",
        )
    foreign_view = next(
        (detection for detection in detections if detection.ids.max(initial=0) >= len(board.corners)), None
    )
    if foreign_view is not None:
        raise RatchetError("calibration.wrong_board", "corners that the board does not have", where=foreign_view.name)
    tilts = np.array([coverage.describe(board, detection).tilt for detection in detections])
    if np.abs(tilts).max() < 0.05:
        raise RatchetError(
            "calibration.no_tilt",
            "all views show the board from straight ahead; focal length and distance cannot be told apart",
            fix="tilt the board by about 30 degrees, to all four sides",
        )
    share = coverage.measure(board, detections).share
    if share < 0.25:
        raise RatchetError(
            "calibration.no_coverage",
            f"corners in {share:.0%} of the image only; the distortion elsewhere would be a guess",
            fix="show the board in every part of the image",
        )


def _distinct(detections: Sequence[Detection]) -> list[Detection]:
    distinct: list[Detection] = []
    for detection in detections:
        same_ids = (
            kept_view
            for kept_view in distinct
            if len(kept_view) == len(detection) and np.array_equal(kept_view.ids, detection.ids)
        )
        if not any(np.abs(kept_view.points - detection.points).max() < 1.0 for kept_view in same_ids):
            distinct.append(detection)
    return distinct


def _held_out(order: list[int], requested: int) -> list[int]:
    """Every third of the best-spread views, as many as leave enough to estimate from."""
    held_out_count = max(0, min(requested, len(order) - LEAST_VIEWS))
    return order[1 : 1 + 3 * held_out_count : 3][:held_out_count]


def _estimate(board: Board, detections: Sequence[Detection], model: Model) -> tuple[CameraModel, list[Float]]:
    image_size = detections[0].size
    board_points = [board.corners[distortion_values.ids].astype(np.float32) for distortion_values in detections]
    image_points = [distortion_values.points.astype(np.float32) for distortion_values in detections]
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 200, 1e-12)
    try:
        if model == "fisheye":
            _, camera_matrix, distortion_values, rotations, translations = cv2.fisheye.calibrate(
                [points_3d.reshape(-1, 1, 3) for points_3d in board_points],
                [points_2d.reshape(-1, 1, 2) for points_2d in image_points],
                image_size,
                np.eye(3),
                np.zeros(4),
                flags=FISHEYE,
                criteria=criteria,
            )
        else:
            _, camera_matrix, distortion_values, rotations, translations = cv2.calibrateCamera(
                board_points, image_points, image_size, None, None, flags=FLAGS[model], criteria=criteria
            )
    except cv2.error as error:
        raise RatchetError(
            "calibration.did_not_converge",
            f"no camera explains these views ({error.err})",
            where=model,
            fix="check the board's description; try a simpler model; take sharper images from more sides",
        ) from None
    # A focal length far from the image's size, or a principal point outside it, is a local minimum and no lens.
    is_finite = np.isfinite(camera_matrix).all() and np.isfinite(distortion_values).all()
    if (
        not is_finite
        or not 0.1 * max(image_size) < camera_matrix[0, 0] < 50 * max(image_size)
        or not (0 < camera_matrix[0, 2] < image_size[0] and 0 < camera_matrix[1, 2] < image_size[1])
    ):
        raise RatchetError(
            "calibration.did_not_converge",
            f"the estimate makes no sense: fx {camera_matrix[0, 0]:.0f}, "
            f"principal point ({camera_matrix[0, 2]:.0f}, {camera_matrix[1, 2]:.0f})",
            where=model,
            fix="check the board's description; take images from more sides",
        )
    distortion = tuple(float(number) for number in np.ravel(distortion_values)[: COEFFICIENTS[model]])
    fx, fy, cx, cy = (
        float(number) for number in (camera_matrix[0, 0], camera_matrix[1, 1], camera_matrix[0, 2], camera_matrix[1, 2])
    )
    camera = CameraModel(image_size[0], image_size[1], fx, fy, cx, cy, model, distortion)
    poses = [
        transform(cv2.Rodrigues(np.ravel(rotation_vector))[0], np.ravel(translation))
        for rotation_vector, translation in zip(rotations, translations, strict=True)
    ]
    return camera, poses


def board_pose(board: Board, camera: CameraModel, detection: Detection) -> Float:
    """(4, 4): the board in the camera's frame, by least squares over the reprojection error.

    Raises:
        RatchetError: calibration.no_pose.
    """
    rays = camera.undistorted(detection.points)
    board_points = board.corners[detection.ids]
    best_pose = np.eye(4)
    lowest_rms = np.inf
    _, rotations, translations, _ = cv2.solvePnPGeneric(board_points, rays, np.eye(3), None, flags=cv2.SOLVEPNP_IPPE)
    for rotation, translation in zip(
        rotations, translations, strict=True
    ):  # a plane seen from afar has two poses; the better one wins
        pose = _polish(board, camera, detection, transform(cv2.Rodrigues(rotation)[0], translation.ravel()))
        rms = _rms([_residual(board, camera, detection, pose)])
        if rms < lowest_rms:
            best_pose = pose
            lowest_rms = rms
    if not np.isfinite(lowest_rms) or best_pose[2, 3] <= 0:
        raise RatchetError("calibration.no_pose", "no pose of the board explains the corners", where=detection.name)
    return best_pose


def _polish(board: Board, camera: CameraModel, detection: Detection, pose: Float) -> Float:
    """Refine a pose by Gauss-Newton over its six parameters."""
    for _ in range(20):
        board_points = board.corners[detection.ids]
        points = board_points @ pose[:3, :3].T + pose[:3, 3]
        if (points[:, 2] <= 1e-6).any():
            return pose
        residual = (detection.points - camera.project(points)).ravel()
        by_point = camera.derivative(points) @ pose[:3, :3]
        # (2 n, 6) px by a small motion on the right of the pose: rotation, then translation.
        jacobian = np.concatenate([-by_point @ skew(board_points), by_point], -1).reshape(-1, 6)
        step = np.linalg.lstsq(jacobian, residual, rcond=None)[0]
        pose = pose @ small(step)
        if np.abs(step).max() < 1e-12:
            break
    return pose


def _residual(board: Board, camera: CameraModel, detection: Detection, pose: Float) -> Float:
    points = board.corners[detection.ids] @ pose[:3, :3].T + pose[:3, 3]
    return detection.points - camera.project(points)


def _error(board: Board, camera: CameraModel, detection: Detection, pose: Float | None) -> tuple[Float, float, Float]:
    pose = board_pose(board, camera, detection) if pose is None else _polish(board, camera, detection, pose)
    residual = _residual(board, camera, detection, pose)
    return pose, _rms([residual]), residual


def _rms(residuals: Sequence[Float]) -> float:
    """px per point: root of the mean squared distance."""
    if not residuals:
        return float("nan")
    return float(np.sqrt(np.mean(np.concatenate([(residual**2).sum(1) for residual in residuals]))))


def _with_deviations(
    board: Board, camera: CameraModel, detections: Sequence[Detection], poses: Sequence[Float]
) -> tuple[CameraModel, float]:
    """The camera with standard deviations from the Jacobian of all corners, and the pixel noise that residuals show.

    The poses of the views are eliminated, so that their uncertainty is in the camera's.
    """
    parameter_count = 4 + len(camera.distortion)
    information = np.zeros((parameter_count, parameter_count))
    squared_sum = 0.0
    degrees_of_freedom = 0
    for detection, pose in zip(detections, poses, strict=True):
        board_points = board.corners[detection.ids]
        points = board_points @ pose[:3, :3].T + pose[:3, 3]
        by_point = camera.derivative(points) @ pose[:3, :3]
        of_pose = np.concatenate([-by_point @ skew(board_points), by_point], -1).reshape(-1, 6)
        of_camera = _by_camera(camera, points)
        pose_basis, _ = np.linalg.qr(of_pose)
        # What the view's own pose could explain as well is projected out.
        free_part = of_camera - pose_basis @ (pose_basis.T @ of_camera)
        information += free_part.T @ free_part
        squared_sum += float(((detection.points - camera.project(points)) ** 2).sum())
        # Six degrees of freedom went into the view's pose.
        degrees_of_freedom += 2 * len(detection) - 6
    noise = float(np.sqrt(squared_sum / max(degrees_of_freedom - parameter_count, 1)))
    covariance = noise**2 * np.linalg.pinv(information)
    deviations = tuple(float(deviation) for deviation in np.sqrt(np.maximum(np.diag(covariance), 0.0)))
    return replace(camera, deviations=deviations), noise


def _by_camera(camera: CameraModel, points: Float) -> Float:
    """(2 n, 4 + d) px per unit of fx, fy, cx, cy and each distortion coefficient."""
    no_motion = np.zeros(3)
    points_n13 = points.reshape(-1, 1, 3).astype(float)
    if camera.model == "fisheye":
        _, jacobian = cv2.fisheye.projectPoints(points_n13, no_motion, no_motion, camera.matrix, camera.coefficients)
        # Columns of the Jacobians: fisheye f, c, k first; the other model has rotation and translation (6) in front.
        columns = [*range(4), *range(4, 8)]
    else:
        _, jacobian = cv2.projectPoints(points_n13, no_motion, no_motion, camera.matrix, camera.coefficients)
        columns = [*range(6, 10), *range(10, 10 + len(camera.distortion))]
    return np.asarray(jacobian[:, columns], float)
