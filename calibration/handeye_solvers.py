"""OpenCV's hand-eye solvers over the same views, and the best of their answers as a first guess.

Knows OpenCV's conventions. Judges by the reprojection error; refines nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from agent.errors import RatchetError
from calibration.geometry import Float, difference, inverse
from calibration.handeye_problem import Mounting, Noise, Problem, State

SOLVERS = {
    "tsai": cv2.CALIB_HAND_EYE_TSAI,
    "park": cv2.CALIB_HAND_EYE_PARK,
    "horaud": cv2.CALIB_HAND_EYE_HORAUD,
    "andreff": cv2.CALIB_HAND_EYE_ANDREFF,
    "daniilidis": cv2.CALIB_HAND_EYE_DANIILIDIS,
}
WORLD_SOLVERS = {"shah": cv2.CALIB_ROBOT_WORLD_HAND_EYE_SHAH, "li": cv2.CALIB_ROBOT_WORLD_HAND_EYE_LI}


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
        world = np.eye(4)
        hand = np.eye(4)
        world[:3, :3] = rw
        world[:3, 3] = np.ravel(tw)
        hand[:3, :3] = rg
        hand[:3, 3] = np.ravel(tg)
        _add(out, name, inverse(hand)[:3, :3], inverse(hand)[:3, 3], inverse(world))
    return out


def first_guess(problem: Problem, solved: dict[str, tuple[Float, Float | None]], seen: Sequence[Float]) -> State:
    """The best of the solvers' answers."""
    if not solved:
        raise RatchetError(
            "calibration.did_not_converge", "no solver finds an answer", fix="take poses that turn about two axes"
        )
    zero = np.zeros((len(seen), 6))
    best = None
    lowest = np.inf
    for x, y in solved.values():
        if y is None:
            y = _board_of(problem, x, seen)
        state = State(x, y, zero)
        residual = [np.linalg.norm(problem.residual(state, v, known=False), axis=1) for v in range(len(seen))]
        middle = float(np.median(np.concatenate(residual)))
        if middle < lowest and np.isfinite(problem.cost(state, Noise())):
            best = state
            lowest = middle
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


def _add(out: dict[str, tuple[Float, Float | None]], name: str, r: Float, t: Float, y: Float | None) -> None:
    pose = np.eye(4)
    pose[:3, :3] = r
    pose[:3, 3] = np.ravel(t)
    if np.isfinite(pose).all() and abs(np.linalg.det(pose[:3, :3]) - 1) < 1e-2:
        out[name] = (pose, y)
