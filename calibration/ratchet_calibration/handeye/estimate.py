"""Hand-eye calibration: pose of the camera on the arm, or beside it, with its uncertainty.

Knows outliers, cross-validation and which pose to take next. The estimate itself is problem.py's, the first
guess solvers.py's, refused pose sets views.py's. Knows no robot: poses and corners are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2
from scipy.stats import f as f_distribution

from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import Detection
from ratchet_calibration.cameras.intrinsics import board_pose
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.geometry import Float, difference, small
from ratchet_calibration.handeye.problem import Mounting, Noise, Problem, State
from ratchet_calibration.handeye.solvers import first_guess, solvers
from ratchet_calibration.handeye.views import LEAST_POSES, require_views
from ratchet_vla.errors import RatchetError

__all__ = ["HandEyeResult", "calibrate", "suggest"]

GROSS = 20.0  # px of reprojection error with the reported poses, beyond which the inputs contradict each other


@dataclass(frozen=True)
class HandEyeResult:
    """The camera's pose, its uncertainty, and how well it explains the views.

    Attributes:
        camera: (4, 4) flange_T_camera (eye in hand) or base_T_camera (eye to hand).
        board: (4, 4) base_T_board or flange_T_board.
        covariance: (6, 6) of the camera's small motion (rotation in rad, translation in m, in the camera's frame).
        freedom: degrees of freedom behind the estimated noise, for confidence regions; 0 where the noise was given.
        rms: px per point with the estimated pose errors.
        noise: deviations of corners and of the robot's poses.
        held_out_pixels: px per point on views that the estimate had not seen, with the poses as the robot reports them.
        held_out_position: m, rms distance between where such views put the board and where the estimate does.
        held_out_rotation: rad, likewise.
        errors: (N, 6) estimated errors of the robot's poses.
        rejected: why, by view.
        solvers: the camera's pose by each of OpenCV's solvers from the same views, for comparison.
    """

    mounting: Mounting
    camera: Float
    board: Float
    covariance: Float
    freedom: int
    noise: Noise
    rms: float
    held_out_pixels: float
    held_out_position: float
    held_out_rotation: float
    errors: Float
    used: tuple[int, ...]
    rejected: dict[str, str]
    solvers: dict[str, Float]
    full_covariance: Float

    @property
    def deviations(self) -> Float:
        """(6,) rad and m, one standard deviation per axis of the camera's frame."""
        return np.sqrt(np.diag(self.covariance))

    def contains(self, truth: Float, share: float = 0.95) -> bool:
        """Whether a pose lies in the ellipsoid that should hold the true one with this probability."""
        # Hotelling: with an estimated noise the squared distance follows 6 F(6, freedom), with a given one chi2(6).
        motion = difference(self.camera, truth)
        mahalanobis_squared = float(motion @ np.linalg.solve(self.covariance, motion))
        if not self.freedom:
            return mahalanobis_squared <= float(chi2.ppf(share, 6))
        return mahalanobis_squared <= 6 * float(f_distribution.ppf(share, 6, self.freedom))


def calibrate(
    board: Board,
    camera: CameraModel,
    mounting: Mounting,
    poses: Sequence[Float],
    detections: Sequence[Detection],
    *,
    noise: Noise | None = None,
    folds: int = 5,
) -> HandEyeResult:
    """Estimate the camera's pose on the flange (eye in hand) or in the base frame (eye to hand).

    Args:
        poses: (4, 4) base_T_flange for every view, in m. detections: of the same views, in the same order.
        noise: deviations of corners and of the robot's poses; estimated where not given.
        folds: parts for cross-validation; 0 leaves it out.

    Raises:
        RatchetError: calibration.mismatch, calibration.not_a_pose, calibration.mirrored_pose, calibration.units,
            calibration.wrong_size, calibration.too_few_poses, calibration.duplicate_poses,
            calibration.pure_translation, calibration.one_axis, calibration.swapped, calibration.inconsistent,
            calibration.no_pose, calibration.did_not_converge.
    """
    checked_poses = require_views(camera, mounting, poses, detections)
    board_in_camera = [board_pose(board, camera, detection) for detection in detections]
    used = list(range(len(checked_poses)))
    rejected: dict[str, str] = {}
    # Fit, drop the worst outlier, fit again: one outlier spoils the noise estimate that would reveal the next.
    while True:
        solver_answers = solvers(
            mounting, [checked_poses[view] for view in used], [board_in_camera[view] for view in used]
        )
        problem = Problem(
            board, camera, mounting, [checked_poses[view] for view in used], [detections[view] for view in used]
        )
        initial_state = first_guess(problem, solver_answers, [board_in_camera[view] for view in used])
        state, noise_estimate, full_covariance = problem.fit(initial_state, noise)
        worst_view = _outlier(problem, state, noise_estimate)
        # At least 70 % of the views stay: a robot with errors everywhere must not be trimmed to fit.
        if worst_view is None or len(used) <= max(LEAST_POSES, int(0.7 * len(checked_poses))):
            break
        rejected_view = used.pop(worst_view)
        turned_deg = np.degrees(np.linalg.norm(state.errors[worst_view][:3]))
        moved_mm = 1e3 * np.linalg.norm(state.errors[worst_view][3:])
        rejected[detections[rejected_view].name or str(rejected_view)] = (
            f"its robot pose is off by {turned_deg:.2f} degrees and {moved_mm:.1f} mm, unlike the others'"
        )
    _require_sense(problem, state, mounting, checked_poses, board_in_camera)
    held_out = (np.nan, np.nan, np.nan)
    if folds:
        held_out = _cross_validated(problem, state, noise_estimate, min(folds, len(used)))
    residuals = np.concatenate([problem.residual(state, view) for view in range(len(used))])
    return HandEyeResult(
        mounting=mounting,
        camera=state.x,
        board=state.y,
        covariance=full_covariance[:6, :6],
        freedom=6 * len(used) - 12 if noise is None else 0,
        noise=noise_estimate,
        rms=float(np.sqrt((residuals**2).sum(1).mean())),
        held_out_pixels=held_out[0],
        held_out_position=held_out[1],
        held_out_rotation=held_out[2],
        errors=state.errors,
        used=tuple(used),
        rejected=rejected,
        solvers={name: camera_pose for name, (camera_pose, _) in solver_answers.items()},
        full_covariance=full_covariance,
    )


def suggest(
    board: Board,
    camera: CameraModel,
    result: HandEyeResult,
    candidates: Sequence[Float],
    views: Sequence[Detection],
    poses: Sequence[Float],
) -> tuple[int, Float]:
    """Choose the pose to take next.

    Args:
        candidates: (4, 4) base_T_flange that the arm may go to. views, poses: those of the result.

    Returns:
        index of the candidate that shrinks the camera's position uncertainty most, and the (6,) deviations expected.

    Raises:
        RatchetError: calibration.nothing_visible where none of them shows the board.
    """
    # Information adds up: what the views so far give, plus what the candidate would give.
    known_information = np.linalg.inv(result.full_covariance)
    best_index = -1
    least_spread = np.inf
    expected_deviations = np.zeros(6)
    for index, candidate in enumerate(candidates):
        problem = Problem(board, camera, result.mounting, [candidate], [views[0]])
        state = State(result.camera, result.board, np.zeros((1, 6)))
        visible_ids = visible(problem, state, 0)
        if len(visible_ids) < 8:
            continue
        covariance = np.linalg.inv(known_information + problem.information(state, result.noise, 0, visible_ids))[:6, :6]
        # Rotation counts by what it moves at the board's distance, so that both are metres.
        board_distance_m = float(np.linalg.norm(problem.board_in_camera(state, 0)[:3, 3]))
        position_spread = float(np.trace(covariance[3:, 3:]) + board_distance_m**2 * np.trace(covariance[:3, :3]))
        if position_spread < least_spread:
            best_index = index
            least_spread = position_spread
            expected_deviations = np.sqrt(np.diag(covariance))
    if best_index < 0:
        raise RatchetError(
            "calibration.nothing_visible",
            f"none of {len(candidates)} poses shows the board to the camera",
            fix="propose poses nearer to those that were taken",
        )
    return best_index, expected_deviations


def candidates(
    poses: Sequence[Float],
    count: int,
    generator: np.random.Generator,
    allowed: Callable[[Float], bool] = lambda p: True,
) -> list[Float]:
    """Poses between and a little beyond those that were taken.

    Each is a blend of two, turned by up to 35 degrees and moved by up to 6 cm.

    Args:
        allowed: the arm's own opinion of a pose.
    """
    poses_found: list[Float] = []
    for _ in range(20 * count):
        first_pose, second_pose = (poses[pose_index] for pose_index in generator.choice(len(poses), 2, replace=False))
        blended_pose = first_pose @ small(generator.uniform(0, 1) * difference(first_pose, second_pose))
        rotation_vector = generator.normal(size=3)
        rotation_vector *= generator.uniform(0, np.radians(35)) / np.linalg.norm(rotation_vector)
        pose = blended_pose @ small(np.concatenate([rotation_vector, generator.uniform(-0.06, 0.06, 3)]))
        if allowed(pose):
            poses_found.append(pose)
        if len(poses_found) == count:
            break
    return poses_found


def visible(problem: Problem, state: State, view: int) -> np.ndarray:
    """Ids of the corners that fall into the image with the board's front towards the camera."""
    pose = problem.board_in_camera(state, view)
    points = problem.board.corners @ pose[:3, :3].T + pose[:3, 3]
    if (points[:, 2] <= 0.02).any() or pose[:3, 2] @ points.mean(0) <= 0.2 * np.linalg.norm(points.mean(0)):
        return np.zeros(0, np.int64)
    pixels = problem.camera.project(points)
    last_pixel = (problem.camera.width - 1, problem.camera.height - 1)
    return np.flatnonzero((pixels > 0).all(1) & (pixels < last_pixel).all(1))


def _outlier(problem: Problem, state: State, noise: Noise) -> int | None:
    """The view whose pose error stands out from the others' by far, if any."""
    error_sizes = np.sqrt((state.errors**2 * noise.prior).sum(1))
    worst_view = int(error_sizes.argmax())
    other_sizes = np.delete(error_sizes, worst_view)
    # 1.4826 turns a median absolute deviation into a standard deviation for normal errors.
    spread = 1.4826 * float(np.median(np.abs(other_sizes - np.median(other_sizes))))
    # A robot that reports its exact pose has rounding errors only, and no outliers among them.
    matters = np.linalg.norm(state.errors[worst_view][3:]) > 5e-4 or np.linalg.norm(state.errors[worst_view][:3]) > 1e-3
    stands_out = error_sizes[worst_view] > np.median(other_sizes) + 8 * max(spread, 0.1)
    return worst_view if matters and stands_out else None


def _require_sense(
    problem: Problem, state: State, mounting: Mounting, poses: Sequence[Float], seen: Sequence[Float]
) -> None:
    """Refuse an estimate that does not explain the views; say whether the other reading of the poses would."""

    def misfit(hypothesis: Problem, hypothesis_state: State) -> float:
        return float(
            np.median(
                [
                    np.linalg.norm(hypothesis.residual(hypothesis_state, view, with_error=False), axis=1).mean()
                    for view in range(len(hypothesis.poses))
                ]
            )
        )

    own_misfit = misfit(problem, state)
    if own_misfit < GROSS:
        return
    other_mounting: Mounting = "eye_to_hand" if mounting == "eye_in_hand" else "eye_in_hand"
    other_problem = Problem(problem.board, problem.camera, other_mounting, list(problem.poses), problem.detections)
    board_poses = [board_pose(problem.board, problem.camera, detection) for detection in problem.detections]
    try:
        other_state = first_guess(other_problem, solvers(other_mounting, list(problem.poses), board_poses), board_poses)
        other_misfit = misfit(other_problem, other_state)
    except RatchetError:
        other_misfit = np.inf
    if other_misfit < 0.25 * own_misfit:
        raise RatchetError(
            "calibration.swapped",
            f"these poses fit {other_mounting} ({other_misfit:.1f} px against {own_misfit:.0f} px)",
            where=mounting,
            fix="give base_T_flange, not its inverse; or name the other mounting",
        )
    raise RatchetError(
        "calibration.inconsistent",
        f"robot poses and images disagree by {own_misfit:.0f} px",
        where=mounting,
        fix="check that each pose belongs to its image, that the board and camera did not move, and the board's size",
    )


def _cross_validated(problem: Problem, state: State, noise: Noise, folds: int) -> tuple[float, float, float]:
    """(px, m, rad) on views that the estimate had not seen."""
    count = len(problem.poses)
    residuals = []
    squared_distances = []
    squared_angles = []
    for fold in range(folds):
        held_out_views = list(range(fold, count, folds))
        kept_views = [view for view in range(count) if view not in held_out_views]
        kept_problem = Problem(
            problem.board,
            problem.camera,
            problem.mounting,
            list(problem.poses[kept_views]),
            [problem.detections[view] for view in kept_views],
        )
        kept_state = kept_problem.solve(State(state.x, state.y, state.errors[kept_views]), noise)
        for view in held_out_views:
            predicted_state = State(kept_state.x, kept_state.y, np.zeros((count, 6)))
            residuals.append(problem.residual(predicted_state, view, with_error=False))
            measured_pose = board_pose(problem.board, problem.camera, problem.detections[view])
            board_motion = difference(problem.board_in_camera(predicted_state, view, with_error=False), measured_pose)
            # at the board's middle, where a turn about its corner is not mistaken for a move
            board_centre = problem.board.corners.mean(0)
            predicted_pose = problem.board_in_camera(predicted_state, view, with_error=False)
            gap = (
                (measured_pose[:3, :3] - predicted_pose[:3, :3]) @ board_centre
                + measured_pose[:3, 3]
                - predicted_pose[:3, 3]
            )
            squared_distances.append(float(gap @ gap))
            squared_angles.append(float(board_motion[:3] @ board_motion[:3]))
    squared_errors = np.concatenate([(view_residual**2).sum(1) for view_residual in residuals])
    return (
        float(np.sqrt(squared_errors.mean())),
        float(np.sqrt(np.mean(squared_distances))),
        float(np.sqrt(np.mean(squared_angles))),
    )
