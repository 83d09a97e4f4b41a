"""OpenCV's hand-eye solvers over the same views; the best of their answers is the first guess.

Knows OpenCV's conventions. Chooses by the reprojection error; refines nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from ratchet_calibration.geometry import Float, difference, inverse
from ratchet_calibration.handeye.problem import Mounting, Noise, Problem, State
from ratchet_vla.errors import RatchetError

SOLVERS = {
    "tsai": cv2.CALIB_HAND_EYE_TSAI,
    "park": cv2.CALIB_HAND_EYE_PARK,
    "horaud": cv2.CALIB_HAND_EYE_HORAUD,
    "andreff": cv2.CALIB_HAND_EYE_ANDREFF,
    "daniilidis": cv2.CALIB_HAND_EYE_DANIILIDIS,
}
WORLD_SOLVERS = {"shah": cv2.CALIB_ROBOT_WORLD_HAND_EYE_SHAH, "li": cv2.CALIB_ROBOT_WORLD_HAND_EYE_LI}


def solvers(
    mounting: Mounting, poses: Sequence[Float], board_poses: Sequence[Float]
) -> dict[str, tuple[Float, Float | None]]:
    """(X, Y) by every solver of OpenCV that gives a finite answer; Y is None where it gives the camera alone."""
    # Eye to hand is eye in hand with the arm read backwards: flange_T_base takes the place of base_T_flange.
    carrier_poses = [inverse(pose) for pose in poses] if mounting == "eye_to_hand" else list(poses)
    answers: dict[str, tuple[Float, Float | None]] = {}
    for name, method in SOLVERS.items():
        try:
            rotation, translation = cv2.calibrateHandEye(
                [pose[:3, :3] for pose in carrier_poses],
                [pose[:3, 3] for pose in carrier_poses],
                [board_pose[:3, :3] for board_pose in board_poses],
                [board_pose[:3, 3] for board_pose in board_poses],
                method=method,
            )
        except cv2.error:
            continue
        _add(answers, name, rotation, translation, None)
    for name, method in WORLD_SOLVERS.items():
        inverse_poses = [inverse(pose) for pose in carrier_poses]  # flange_T_base of the arm that carries the camera
        try:
            rotation_world, translation_world, rotation_hand, translation_hand = cv2.calibrateRobotWorldHandEye(
                [board_pose[:3, :3] for board_pose in board_poses],
                [board_pose[:3, 3] for board_pose in board_poses],
                [inverse_pose[:3, :3] for inverse_pose in inverse_poses],
                [inverse_pose[:3, 3] for inverse_pose in inverse_poses],
                method=method,
            )
        except cv2.error:
            continue
        world = np.eye(4)
        hand = np.eye(4)
        world[:3, :3] = rotation_world
        world[:3, 3] = np.ravel(translation_world)
        hand[:3, :3] = rotation_hand
        hand[:3, 3] = np.ravel(translation_hand)
        # OpenCV returns the inverse of both.
        _add(answers, name, inverse(hand)[:3, :3], inverse(hand)[:3, 3], inverse(world))
    return answers


def first_guess(
    problem: Problem, solver_answers: dict[str, tuple[Float, Float | None]], board_poses: Sequence[Float]
) -> State:
    """The best of the solvers' answers."""
    if not solver_answers:
        raise RatchetError(
            "calibration.did_not_converge", "no solver finds an answer", fix="take poses that turn about two axes"
        )
    no_errors = np.zeros((len(board_poses), 6))
    best_state = None
    lowest_error = np.inf
    # A solver may return a pose from which the board is behind the camera; its cost is infinite.
    for camera_pose, solved_board_pose in solver_answers.values():
        board_pose = solved_board_pose
        if board_pose is None:
            board_pose = _board_of(problem, camera_pose, board_poses)
        state = State(camera_pose, board_pose, no_errors)
        residual_norms = [
            np.linalg.norm(problem.residual(state, view, with_error=False), axis=1) for view in range(len(board_poses))
        ]
        median_error = float(np.median(np.concatenate(residual_norms)))
        if median_error < lowest_error and np.isfinite(problem.cost(state, Noise())):
            best_state = state
            lowest_error = median_error
    if best_state is None:
        raise RatchetError(
            "calibration.inconsistent",
            "no camera pose sees the board where the images show it",
            fix="check that poses and images belong together and that the board did not move",
        )
    return best_state


def _board_of(problem: Problem, camera_pose: Float, board_poses: Sequence[Float]) -> Float:
    """The board where the median view puts it."""
    carrier_poses = problem.poses if problem.mounting == "eye_in_hand" else inverse(problem.poses)
    board_estimates = np.stack(
        [
            carrier_pose @ camera_pose @ seen_pose
            for carrier_pose, seen_pose in zip(carrier_poses, board_poses, strict=True)
        ]
    )
    median_position = np.median(board_estimates[:, :3, 3], axis=0)
    # (N, N) rad: the view whose rotation is nearest to all others', a median for rotations.
    angles_between = np.array(
        [
            [np.linalg.norm(difference(first_pose, second_pose)[:3]) for second_pose in board_estimates]
            for first_pose in board_estimates
        ]
    )
    board_pose: Float = board_estimates[int(angles_between.sum(1).argmin())].copy()  # the medoid
    board_pose[:3, 3] = median_position
    return board_pose


def _add(
    answers: dict[str, tuple[Float, Float | None]],
    name: str,
    rotation: Float,
    translation: Float,
    board_pose: Float | None,
) -> None:
    pose = np.eye(4)
    pose[:3, :3] = rotation
    pose[:3, 3] = np.ravel(translation)
    if np.isfinite(pose).all() and abs(np.linalg.det(pose[:3, :3]) - 1) < 1e-2:
        answers[name] = (pose, board_pose)
