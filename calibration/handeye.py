"""Hand-eye calibration: where the camera is on the arm, or beside it, with its uncertainty, or why that cannot be told.

Knows outliers, cross-validation and which pose to take next. The estimate itself is handeye_problem.py's, the first
guess handeye_solvers.py's, refused pose sets handeye_views.py's. Knows no robot: poses and corners are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2
from scipy.stats import f as f_distribution

from agent.errors import RatchetError
from calibration.boards import Board
from calibration.camera_model import CameraModel
from calibration.detection import Detection
from calibration.geometry import Float, difference, small
from calibration.handeye_problem import Mounting, Noise, Problem, State
from calibration.handeye_solvers import first_guess, solvers
from calibration.handeye_views import LEAST_POSES, require_views
from calibration.intrinsics import board_pose

GROSS = 20.0  # px of reprojection error with the poses as told, beyond which something is not what it is said to be


@dataclass(frozen=True)
class HandEyeResult:
    """camera: (4, 4) flange_T_camera (eye in hand) or base_T_camera (eye to hand). board: (4, 4) base_T_board or
    flange_T_board.

    covariance: (6, 6) of the camera's small motion (rotation in rad, translation in m, in the camera's frame).
    freedom: degrees of freedom behind the estimated noise, for confidence regions; 0 where the noise was given.
    rms: px per point with the estimated pose errors. noise: deviations of corners and of the robot's poses.
    held_out_pixels: px per point on views that the estimate had not seen, with the poses as the robot tells them.
    held_out_position: m, rms distance between where such views put the board and where the estimate does.
    held_out_rotation: rad, likewise. errors: (N, 6) estimated errors of the robot's poses. rejected: why, by view.
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
        d = difference(self.camera, truth)
        distance = float(d @ np.linalg.solve(self.covariance, d))
        if not self.freedom:
            return distance <= float(chi2.ppf(share, 6))
        return distance <= 6 * float(f_distribution.ppf(share, 6, self.freedom))


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
    """Estimate where the camera is.

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
    checked = require_views(camera, mounting, poses, detections)
    seen = [board_pose(board, camera, d) for d in detections]
    used = list(range(len(checked)))
    rejected: dict[str, str] = {}
    while True:
        solved = solvers(mounting, [checked[i] for i in used], [seen[i] for i in used])
        problem = Problem(board, camera, mounting, [checked[i] for i in used], [detections[i] for i in used])
        start = first_guess(problem, solved, [seen[i] for i in used])
        state, found, full = problem.fit(start, noise)
        worst = _outlier(problem, state, found)
        if worst is None or len(used) <= max(LEAST_POSES, int(0.7 * len(checked))):
            break
        view = used.pop(worst)
        turned = np.degrees(np.linalg.norm(state.errors[worst][:3]))
        moved = 1e3 * np.linalg.norm(state.errors[worst][3:])
        rejected[detections[view].name or str(view)] = (
            f"its robot pose is off by {turned:.2f} degrees and {moved:.1f} mm, unlike the others'"
        )
    _require_sense(problem, state, mounting, checked, seen)
    held = _cross_validated(problem, state, found, min(folds, len(used))) if folds else (np.nan, np.nan, np.nan)
    residuals = np.concatenate([problem.residual(state, v) for v in range(len(used))])
    return HandEyeResult(
        mounting=mounting,
        camera=state.x,
        board=state.y,
        covariance=full[:6, :6],
        freedom=6 * len(used) - 12 if noise is None else 0,
        noise=found,
        rms=float(np.sqrt((residuals**2).sum(1).mean())),
        held_out_pixels=held[0],
        held_out_position=held[1],
        held_out_rotation=held[2],
        errors=state.errors,
        used=tuple(used),
        rejected=rejected,
        solvers={name: x for name, (x, _) in solved.items()},
        full_covariance=full,
    )


def suggest(
    board: Board,
    camera: CameraModel,
    result: HandEyeResult,
    candidates: Sequence[Float],
    views: Sequence[Detection],
    poses: Sequence[Float],
) -> tuple[int, Float]:
    """Which pose to take next.

    Args:
        candidates: (4, 4) base_T_flange that the arm may go to. views, poses: those of the result.

    Returns:
        index of the candidate that shrinks the camera's position uncertainty most, and the (6,) deviations expected.

    Raises:
        RatchetError: calibration.nothing_visible where none of them shows the board.
    """
    known = np.linalg.inv(result.full_covariance)
    best = -1
    least = np.inf
    expected = np.zeros(6)
    for index, candidate in enumerate(candidates):
        problem = Problem(board, camera, result.mounting, [candidate], [views[0]])
        state = State(result.camera, result.board, np.zeros((1, 6)))
        ids = visible(problem, state, 0)
        if len(ids) < 8:
            continue
        covariance = np.linalg.inv(known + problem.information(state, result.noise, 0, ids))[:6, :6]
        # Rotation counts by what it moves at the board's distance, so that both are metres.
        reach = float(np.linalg.norm(problem.board_in_camera(state, 0)[:3, 3]))
        spread = float(np.trace(covariance[3:, 3:]) + reach**2 * np.trace(covariance[:3, :3]))
        if spread < least:
            best = index
            least = spread
            expected = np.sqrt(np.diag(covariance))
    if best < 0:
        raise RatchetError(
            "calibration.nothing_visible", f"none of {len(candidates)} poses shows the board to the camera",
            fix="propose poses nearer to those that were taken",
        )  # fmt: skip
    return best, expected


def candidates(
    poses: Sequence[Float],
    count: int,
    generator: np.random.Generator,
    allowed: Callable[[Float], bool] = lambda p: True,
) -> list[Float]:
    """Poses between and a little beyond those that were taken: blends of two, turned by up to 35 degrees, moved by up
    to 6 cm. allowed: the arm's own opinion."""
    out: list[Float] = []
    for _ in range(20 * count):
        a, b = (poses[i] for i in generator.choice(len(poses), 2, replace=False))
        middle = a @ small(generator.uniform(0, 1) * difference(a, b))
        turn = generator.normal(size=3)
        turn *= generator.uniform(0, np.radians(35)) / np.linalg.norm(turn)
        pose = middle @ small(np.concatenate([turn, generator.uniform(-0.06, 0.06, 3)]))
        if allowed(pose):
            out.append(pose)
        if len(out) == count:
            break
    return out


def visible(problem: Problem, state: State, view: int) -> np.ndarray:
    """Ids of the corners that fall into the picture with the board's front towards the camera."""
    pose = problem.board_in_camera(state, view)
    points = problem.board.corners @ pose[:3, :3].T + pose[:3, 3]
    if (points[:, 2] <= 0.02).any() or pose[:3, 2] @ points.mean(0) <= 0.2 * np.linalg.norm(points.mean(0)):
        return np.zeros(0, np.int64)
    pixels = problem.camera.project(points)
    limit = (problem.camera.width - 1, problem.camera.height - 1)
    return np.flatnonzero((pixels > 0).all(1) & (pixels < limit).all(1))


def _outlier(problem: Problem, state: State, noise: Noise) -> int | None:
    """The view whose pose error stands out from the others' by far, if any."""
    sizes = np.sqrt((state.errors**2 * noise.prior).sum(1))
    worst = int(sizes.argmax())
    others = np.delete(sizes, worst)
    spread = 1.4826 * float(np.median(np.abs(others - np.median(others))))
    # A robot that tells its pose to the last digit has errors of rounding only, and no outliers among them.
    matters = np.linalg.norm(state.errors[worst][3:]) > 5e-4 or np.linalg.norm(state.errors[worst][:3]) > 1e-3
    return worst if matters and sizes[worst] > np.median(others) + 8 * max(spread, 0.1) else None


def _require_sense(
    problem: Problem, state: State, mounting: Mounting, poses: Sequence[Float], seen: Sequence[Float]
) -> None:
    """Refuse an estimate that does not explain the views; say whether the other reading of the poses would."""

    def misfit(p: Problem, s: State) -> float:
        return float(
            np.median([np.linalg.norm(p.residual(s, v, known=False), axis=1).mean() for v in range(len(p.poses))])
        )

    own = misfit(problem, state)
    if own < GROSS:
        return
    turned: Mounting = "eye_to_hand" if mounting == "eye_in_hand" else "eye_in_hand"
    other = Problem(problem.board, problem.camera, turned, list(problem.poses), problem.detections)
    used = [board_pose(problem.board, problem.camera, d) for d in problem.detections]
    try:
        start = first_guess(other, solvers(turned, list(problem.poses), used), used)
        reading = misfit(other, start)
    except RatchetError:
        reading = np.inf
    if reading < 0.25 * own:
        raise RatchetError(
            "calibration.swapped",
            f"these poses fit {turned} ({reading:.1f} px against {own:.0f} px)",
            where=mounting,
            fix="give base_T_flange, not its inverse; or name the other mounting",
        )
    raise RatchetError(
        "calibration.inconsistent",
        f"robot poses and pictures disagree by {own:.0f} px",
        where=mounting,
        fix="check that each pose belongs to its picture, that the board and camera did not move, and the board's size",
    )


def _cross_validated(problem: Problem, state: State, noise: Noise, folds: int) -> tuple[float, float, float]:
    """(px, m, rad) on views that the estimate had not seen."""
    count = len(problem.poses)
    pixels = []
    moved = []
    turned = []
    for fold in range(folds):
        out = list(range(fold, count, folds))
        kept = [v for v in range(count) if v not in out]
        part = Problem(
            problem.board,
            problem.camera,
            problem.mounting,
            list(problem.poses[kept]),
            [problem.detections[v] for v in kept],
        )
        fitted = part.solve(State(state.x, state.y, state.errors[kept]), noise)
        for view in out:
            whole = State(fitted.x, fitted.y, np.zeros((count, 6)))
            pixels.append(problem.residual(whole, view, known=False))
            seen = board_pose(problem.board, problem.camera, problem.detections[view])
            apart = difference(problem.board_in_camera(whole, view, known=False), seen)
            # at the board's middle, where a turn about its corner is not mistaken for a move
            middle = problem.board.corners.mean(0)
            expected = problem.board_in_camera(whole, view, known=False)
            gap = (seen[:3, :3] - expected[:3, :3]) @ middle + seen[:3, 3] - expected[:3, 3]
            moved.append(float(gap @ gap))
            turned.append(float(apart[:3] @ apart[:3]))
    squares = np.concatenate([(p**2).sum(1) for p in pixels])
    return float(np.sqrt(squares.mean())), float(np.sqrt(np.mean(moved))), float(np.sqrt(np.mean(turned)))
