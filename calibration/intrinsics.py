"""Intrinsics from views of a board: choice of views, rejection of bad ones, error on views that were held out.

Knows OpenCV's estimators. Knows no camera device and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from agent.errors import RatchetError
from calibration import coverage
from calibration.boards import Board
from calibration.camera_model import COEFFICIENTS, CameraModel, Model
from calibration.detection import Detection
from calibration.geometry import Float, skew, small, transform

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
    """points: (n, 2) px, as seen. residual: (n, 2) px, seen minus predicted. rms: px, over points. used: False for
    rejected and held-out views."""

    name: str
    pose: Float
    points: Float
    residual: Float
    rms: float
    used: bool
    held_out: bool = False


@dataclass(frozen=True)
class IntrinsicsResult:
    """camera: with standard deviations. rms, held_out_rms: px over all points of the used and of the held-out views.

    noise: px per coordinate, estimated. views: in the order of the detections. rejected: why, by name.
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
    """Estimate a camera.

    Args:
        most: views to estimate from, chosen by coverage. held_out: views that only measure the error.

    Raises:
        RatchetError: calibration.mixed_sizes, calibration.duplicate_views, calibration.too_few_views,
            calibration.no_tilt, calibration.no_coverage, calibration.did_not_converge, calibration.bad_model.
    """
    _require_views(board, detections, model)
    order = coverage.choose(board, detections, len(detections))
    held = set(_held_out(order, held_out))
    used = [i for i in order if i not in held][:most]
    rejected: dict[str, str] = {}
    while True:
        camera, poses = _estimate(board, [detections[i] for i in used], model)
        errors = {i: _error(board, camera, detections[i], p) for i, p in zip(used, poses, strict=True)}
        worst = max(used, key=lambda i: errors[i][1])
        others = np.array([errors[i][1] for i in used if i != worst])
        spread = 1.4826 * float(np.median(np.abs(others - np.median(others))))
        limit = float(np.median(others)) + max(6 * spread, 0.5 * float(np.median(others)), 0.02)
        if errors[worst][1] <= limit or len(used) <= LEAST_VIEWS:
            break
        used.remove(worst)
        name = detections[worst].name or str(worst)
        rejected[name] = f"reprojection error {errors[worst][1]:.2f} px, the others' median is {np.median(others):.2f}"
    camera, noise = _with_deviations(board, camera, [detections[i] for i in used], [errors[i][0] for i in used])
    views = []
    outside = []
    for i, detection in enumerate(detections):
        if i in errors and i in used:
            pose, rms, residual = errors[i]
            views.append(ViewError(detection.name or str(i), pose, detection.points, residual, rms, used=True))
        else:
            pose, rms, residual = _error(board, camera, detection, None)
            name = detection.name or str(i)
            views.append(ViewError(name, pose, detection.points, residual, rms, used=False, held_out=i in held))
            if i in held:
                outside.append(residual)
    inside = [errors[i][2] for i in used]
    covered = coverage.measure(board, [detections[i] for i in used])
    return IntrinsicsResult(
        camera, _rms(inside), _rms(outside), noise, tuple(views), rejected, covered, _warnings(camera, covered)
    )


def _warnings(camera: CameraModel, covered: coverage.Coverage) -> tuple[str, ...]:
    out = [f"show {what}" for what in covered.missing]
    if camera.deviations:
        if camera.deviations[0] > 2e-3 * camera.fx:
            out.append(f"fx is only known to {camera.deviations[0]:.2f} px")
        if max(camera.deviations[2:4]) > 2.0:
            out.append(f"the principal point is only known to {max(camera.deviations[2:4]):.1f} px")
    return tuple(out)


def _require_views(board: Board, detections: Sequence[Detection], model: str) -> None:
    if model not in COEFFICIENTS:
        raise RatchetError(
            "calibration.bad_model", f"unknown model '{model}'", fix=f"models: {', '.join(COEFFICIENTS)}"
        )
    sizes = {d.size for d in detections}
    if len(sizes) > 1:
        raise RatchetError(
            "calibration.mixed_sizes",
            "pictures of " + ", ".join(f"{w} x {h}" for w, h in sorted(sizes)),
            fix="calibrate each resolution from pictures of its own",
        )
    apart = _distinct(detections)
    if len(apart) < len(detections) and len(apart) < LEAST_VIEWS:
        raise RatchetError(
            "calibration.duplicate_views",
            f"only {len(apart)} of {len(detections)} views differ",
            fix="move the board between the pictures",
        )
    if len(detections) < LEAST_VIEWS:
        raise RatchetError(
            "calibration.too_few_views",
            f"{len(detections)} usable views, at least {LEAST_VIEWS} are needed",
            fix="take more pictures; 20 to 40 are good",
        )
    bad = next((d for d in detections if d.ids.max(initial=0) >= len(board.corners)), None)
    if bad is not None:
        raise RatchetError("calibration.wrong_board", "corners that the board does not have", where=bad.name)
    tilts = np.array([coverage.describe(board, d).tilt for d in detections])
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
            f"corners in {share:.0%} of the picture only; the distortion elsewhere would be a guess",
            fix="show the board in every part of the picture",
        )


def _distinct(detections: Sequence[Detection]) -> list[Detection]:
    out: list[Detection] = []
    for d in detections:
        same = (o for o in out if len(o) == len(d) and np.array_equal(o.ids, d.ids))
        if not any(np.abs(o.points - d.points).max() < 1.0 for o in same):
            out.append(d)
    return out


def _held_out(order: list[int], wanted: int) -> list[int]:
    """Every third of the best-spread views, as many as leave enough to estimate from."""
    number = max(0, min(wanted, len(order) - LEAST_VIEWS))
    return order[1 : 1 + 3 * number : 3][:number]


def _estimate(board: Board, detections: Sequence[Detection], model: Model) -> tuple[CameraModel, list[Float]]:
    size = detections[0].size
    objects = [board.corners[d.ids].astype(np.float32) for d in detections]
    images = [d.points.astype(np.float32) for d in detections]
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 200, 1e-12)
    try:
        if model == "fisheye":
            _, k, d, r, t = cv2.fisheye.calibrate(
                [o.reshape(-1, 1, 3) for o in objects], [i.reshape(-1, 1, 2) for i in images], size, np.eye(3),
                np.zeros(4), flags=FISHEYE, criteria=criteria,
            )  # fmt: skip
        else:
            _, k, d, r, t = cv2.calibrateCamera(
                objects, images, size, None, None, flags=FLAGS[model], criteria=criteria
            )
    except cv2.error as error:
        raise RatchetError(
            "calibration.did_not_converge", f"no camera explains these views ({error.err})", where=model,
            fix="check the board's description; try a simpler model; take sharper pictures from more sides",
        ) from None  # fmt: skip
    good = np.isfinite(k).all() and np.isfinite(d).all()
    if (
        not good
        or not 0.1 * max(size) < k[0, 0] < 50 * max(size)
        or not (0 < k[0, 2] < size[0] and 0 < k[1, 2] < size[1])
    ):
        raise RatchetError(
            "calibration.did_not_converge",
            f"the estimate makes no sense: fx {k[0, 0]:.0f}, principal point ({k[0, 2]:.0f}, {k[1, 2]:.0f})",
            where=model,
            fix="check the board's description; take pictures from more sides",
        )
    distortion = tuple(float(x) for x in np.ravel(d)[: COEFFICIENTS[model]])
    fx, fy, cx, cy = (float(x) for x in (k[0, 0], k[1, 1], k[0, 2], k[1, 2]))
    camera = CameraModel(size[0], size[1], fx, fy, cx, cy, model, distortion)
    poses = [transform(cv2.Rodrigues(np.ravel(a))[0], np.ravel(b)) for a, b in zip(r, t, strict=True)]
    return camera, poses


def board_pose(board: Board, camera: CameraModel, detection: Detection) -> Float:
    """(4, 4): the board in the camera's frame, by least squares over the reprojection error.

    Raises:
        RatchetError: calibration.no_pose.
    """
    rays = camera.undistorted(detection.points)
    flat = board.corners[detection.ids]
    best = np.eye(4)
    lowest = np.inf
    _, rotations, translations, _ = cv2.solvePnPGeneric(flat, rays, np.eye(3), None, flags=cv2.SOLVEPNP_IPPE)
    for r, t in zip(rotations, translations, strict=True):  # a plane seen from afar has two poses; the better one wins
        pose = _polish(board, camera, detection, transform(cv2.Rodrigues(r)[0], t.ravel()))
        rms = _rms([_residual(board, camera, detection, pose)])
        if rms < lowest:
            best = pose
            lowest = rms
    if not np.isfinite(lowest) or best[2, 3] <= 0:
        raise RatchetError("calibration.no_pose", "no pose of the board explains the corners", where=detection.name)
    return best


def _polish(board: Board, camera: CameraModel, detection: Detection, pose: Float) -> Float:
    """Gauss-Newton over the six numbers of the pose."""
    for _ in range(20):
        own = board.corners[detection.ids]
        points = own @ pose[:3, :3].T + pose[:3, 3]
        if (points[:, 2] <= 1e-6).any():
            return pose
        residual = (detection.points - camera.project(points)).ravel()
        by_point = camera.derivative(points) @ pose[:3, :3]
        jacobian = np.concatenate([-by_point @ skew(own), by_point], -1).reshape(-1, 6)
        step = np.linalg.lstsq(jacobian, residual, rcond=None)[0]
        pose = pose @ small(step)
        if np.abs(step).max() < 1e-12:
            break
    return pose


def _residual(board: Board, camera: CameraModel, detection: Detection, pose: Float) -> Float:
    points = board.corners[detection.ids] @ pose[:3, :3].T + pose[:3, 3]
    return detection.points - camera.project(points)


def _error(board: Board, camera: CameraModel, d: Detection, pose: Float | None) -> tuple[Float, float, Float]:
    pose = board_pose(board, camera, d) if pose is None else _polish(board, camera, d, pose)
    residual = _residual(board, camera, d, pose)
    return pose, _rms([residual]), residual


def _rms(residuals: Sequence[Float]) -> float:
    """px per point: root of the mean squared distance."""
    if not residuals:
        return float("nan")
    return float(np.sqrt(np.mean(np.concatenate([(r**2).sum(1) for r in residuals]))))


def _with_deviations(
    board: Board, camera: CameraModel, detections: Sequence[Detection], poses: Sequence[Float]
) -> tuple[CameraModel, float]:
    """The camera with standard deviations from the Jacobian of all corners, and the pixel noise that residuals show.

    The poses of the views are eliminated, so that their uncertainty is in the camera's.
    """
    count = 4 + len(camera.distortion)
    information = np.zeros((count, count))
    squares = 0.0
    rows = 0
    for d, pose in zip(detections, poses, strict=True):
        own = board.corners[d.ids]
        points = own @ pose[:3, :3].T + pose[:3, 3]
        by_point = camera.derivative(points) @ pose[:3, :3]
        of_pose = np.concatenate([-by_point @ skew(own), by_point], -1).reshape(-1, 6)
        of_camera = _by_camera(camera, points)
        q, _ = np.linalg.qr(of_pose)
        own_part = of_camera - q @ (q.T @ of_camera)
        information += own_part.T @ own_part
        squares += float(((d.points - camera.project(points)) ** 2).sum())
        rows += 2 * len(d) - 6
    noise = float(np.sqrt(squares / max(rows - count, 1)))
    covariance = noise**2 * np.linalg.pinv(information)
    deviations = tuple(float(x) for x in np.sqrt(np.maximum(np.diag(covariance), 0.0)))
    return replace(camera, deviations=deviations), noise


def _by_camera(camera: CameraModel, points: Float) -> Float:
    """(2 n, 4 + d) px per unit of fx, fy, cx, cy and each distortion coefficient."""
    still = np.zeros(3)
    shaped = points.reshape(-1, 1, 3).astype(float)
    if camera.model == "fisheye":
        _, jacobian = cv2.fisheye.projectPoints(shaped, still, still, camera.matrix, camera.coefficients)
        columns = [*range(4), *range(4, 8)]
    else:
        _, jacobian = cv2.projectPoints(shaped, still, still, camera.matrix, camera.coefficients)
        columns = [*range(6, 10), *range(10, 10 + len(camera.distortion))]
    return np.asarray(jacobian[:, columns], float)
