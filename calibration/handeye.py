"""Hand-eye calibration: where the camera is on the arm, or beside it, with its uncertainty, or why that cannot be told.

Knows pose sets that say too little, first guesses by OpenCV's solvers, outliers, cross-validation and which pose to
take next. The estimate itself is handeye_problem.py's. Knows no robot: poses and corners are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import cv2
import numpy as np
from scipy.stats import chi2
from scipy.stats import f as f_distribution

from agent.errors import RatchetError
from calibration.boards import Board
from calibration.camera_model import CameraModel
from calibration.detection import Detection
from calibration.geometry import Float, difference, inverse, require_rigid, small
from calibration.handeye_problem import Mounting, Noise, Problem, State
from calibration.intrinsics import board_pose

LEAST_POSES = 8
LEAST_TURN = np.radians(10.0)  # between two views, for the turn to say something
SOLVERS = {
    "tsai": cv2.CALIB_HAND_EYE_TSAI,
    "park": cv2.CALIB_HAND_EYE_PARK,
    "horaud": cv2.CALIB_HAND_EYE_HORAUD,
    "andreff": cv2.CALIB_HAND_EYE_ANDREFF,
    "daniilidis": cv2.CALIB_HAND_EYE_DANIILIDIS,
}
WORLD_SOLVERS = {"shah": cv2.CALIB_ROBOT_WORLD_HAND_EYE_SHAH, "li": cv2.CALIB_ROBOT_WORLD_HAND_EYE_LI}
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
    checked = _require(camera, mounting, poses, detections)
    seen = [board_pose(board, camera, d) for d in detections]
    used = list(range(len(checked)))
    rejected: dict[str, str] = {}
    while True:
        solved = solvers(mounting, [checked[i] for i in used], [seen[i] for i in used])
        problem = Problem(board, camera, mounting, [checked[i] for i in used], [detections[i] for i in used])
        start = _start(problem, solved, [seen[i] for i in used])
        state, found, full = problem.fit(start, noise)
        worst = _outlier(problem, state, found)
        if worst is None or len(used) <= max(LEAST_POSES, int(0.7 * len(checked))):
            break
        view = used.pop(worst)
        turned, moved = (
            np.degrees(np.linalg.norm(state.errors[worst][:3])),
            1e3 * np.linalg.norm(state.errors[worst][3:]),
        )
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


def solvers(mounting: Mounting, poses: Sequence[Float], seen: Sequence[Float]) -> dict[str, tuple[Float, Float | None]]:
    """(X, Y) by every solver of OpenCV that gives a finite answer; Y is None where it gives the camera alone."""
    arm = [inverse(p) for p in poses] if mounting == "eye_to_hand" else list(poses)
    out: dict[str, tuple[Float, Float | None]] = {}
    for name, method in SOLVERS.items():
        try:
            r, t = cv2.calibrateHandEye(
                [p[:3, :3] for p in arm], [p[:3, 3] for p in arm], [s[:3, :3] for s in seen], [s[:3, 3] for s in seen],
                method=method,
            )  # fmt: skip
        except cv2.error:
            continue
        _add(out, name, r, t, None)
    for name, method in WORLD_SOLVERS.items():
        back = [inverse(p) for p in arm]  # flange_T_base of the arm that carries the camera
        try:
            rw, tw, rg, tg = cv2.calibrateRobotWorldHandEye(
                [s[:3, :3] for s in seen], [s[:3, 3] for s in seen],
                [b[:3, :3] for b in back], [b[:3, 3] for b in back], method=method,
            )  # fmt: skip
        except cv2.error:
            continue
        world, hand = np.eye(4), np.eye(4)
        world[:3, :3], world[:3, 3] = rw, np.ravel(tw)
        hand[:3, :3], hand[:3, 3] = rg, np.ravel(tg)
        _add(out, name, inverse(hand)[:3, :3], inverse(hand)[:3, 3], inverse(world))
    return out


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
    best, least, expected = -1, np.inf, np.zeros(6)
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
            best, least, expected = index, spread, np.sqrt(np.diag(covariance))
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


def _add(out: dict[str, tuple[Float, Float | None]], name: str, r: Float, t: Float, y: Float | None) -> None:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = r, np.ravel(t)
    if np.isfinite(pose).all() and abs(np.linalg.det(pose[:3, :3]) - 1) < 1e-2:
        out[name] = (pose, y)


def _require(
    camera: CameraModel, mounting: str, poses: Sequence[Float], detections: Sequence[Detection]
) -> list[Float]:
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


def _start(problem: Problem, solved: dict[str, tuple[Float, Float | None]], seen: Sequence[Float]) -> State:
    """The best of the solvers' answers."""
    if not solved:
        raise RatchetError(
            "calibration.did_not_converge", "no solver finds an answer", fix="take poses that turn about two axes"
        )
    zero = np.zeros((len(seen), 6))
    best, lowest = None, np.inf
    for x, y in solved.values():
        if y is None:
            y = _board_of(problem, x, seen)
        state = State(x, y, zero)
        residual = [np.linalg.norm(problem.residual(state, v, known=False), axis=1) for v in range(len(seen))]
        middle = float(np.median(np.concatenate(residual)))
        if middle < lowest and np.isfinite(problem.cost(state, Noise())):
            best, lowest = state, middle
    if best is None:
        raise RatchetError(
            "calibration.inconsistent",
            "no camera pose sees the board where the pictures show it",
            fix="check that poses and pictures belong together and that the board did not move",
        )
    return best


def _board_of(problem: Problem, x: Float, seen: Sequence[Float]) -> Float:
    """The board where the median view puts it."""
    own = problem.poses if problem.mounting == "eye_in_hand" else inverse(problem.poses)
    found = np.stack([p @ x @ s for p, s in zip(own, seen, strict=True)])
    middle = np.median(found[:, :3, 3], axis=0)
    turned = np.array([[np.linalg.norm(difference(a, b)[:3]) for b in found] for a in found])
    out: Float = found[int(turned.sum(1).argmin())].copy()
    out[:3, 3] = middle
    return out


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
        start = _start(other, solvers(turned, list(problem.poses), used), used)
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
    pixels, moved, turned = [], [], []
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
