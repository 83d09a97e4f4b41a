"""Bundle adjustment of hand-eye calibration: camera, board and the robot's own pose errors, over pixels.

Knows the chain camera <- flange <- base <- board (or its mirror image), its derivatives, and a damped Gauss-Newton
method that eliminates each view's pose error. Checks no input; estimate.py refuses bad ones before it calls this.

    eye in hand:  camera_T_board = X^-1 (G d)^-1 Y    X: flange_T_camera, Y: base_T_board
    eye to hand:  camera_T_board = X^-1 (G d)    Y    X: base_T_camera,   Y: flange_T_board

G: base_T_flange as the robot tells it; d: its error, a small motion in the flange's frame with mean zero. Corners are
seen with independent noise. The deviations of d (rotation, translation) and of the corners may be given, or are
estimated by expectation maximisation, so that the covariance of X holds without knowing the robot's accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.transform import Rotation

from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import Detection
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.geometry import Float, inverse, skew, small
from ratchet_vla.errors import RatchetError

Mounting = Literal["eye_in_hand", "eye_to_hand"]
Eliminated = tuple[Float, Float, Float]  # of one view: inverse block, cross block, pull
FLOOR = np.array([1e-3, 1e-7, 1e-7])  # px, rad, m: below this a deviation is called zero


@dataclass(frozen=True)
class Noise:
    """Standard deviations of the measurements.

    Attributes:
        pixel: of a corner, per coordinate, px.
        rotation: of a robot pose, per axis, rad.
        translation: of a robot pose, per axis, m.
    """

    pixel: float = 0.3
    rotation: float = 2e-3
    translation: float = 1e-3

    @property
    def prior(self) -> Float:
        """(6,) inverse variances of a pose error."""
        return np.repeat([self.rotation**-2, self.translation**-2], 3)


@dataclass(frozen=True)
class State:
    """Unknowns of the estimate.

    Attributes:
        x: (4, 4) X.
        y: (4, 4) Y.
        errors: (N, 6) the robot's pose errors d.
    """

    x: Float
    y: Float
    errors: Float


class Problem:
    """All views of one calibration."""

    def __init__(
        self,
        board: Board,
        camera: CameraModel,
        mounting: Mounting,
        poses: Sequence[Float],
        detections: Sequence[Detection],
    ) -> None:
        """poses: base_T_flange of every view."""
        self.board = board
        self.camera = camera
        self.mounting = mounting
        self.poses = np.stack(list(poses))
        self.detections = list(detections)

    def board_in_camera(self, state: State, view: int, with_error: bool = True) -> Float:
        """(4, 4) camera_T_board. known: with the estimated pose error; else as the robot says."""
        flange = self.poses[view] @ small(state.errors[view]) if with_error else self.poses[view]
        base_to_camera_side = inverse(flange) if self.mounting == "eye_in_hand" else flange
        return inverse(state.x) @ base_to_camera_side @ state.y

    def residual(self, state: State, view: int, with_error: bool = True) -> Float:
        """(n, 2) px, seen minus predicted."""
        pose = self.board_in_camera(state, view, with_error)
        detection = self.detections[view]
        points = self.board.corners[detection.ids] @ pose[:3, :3].T + pose[:3, 3]
        return detection.points - self.camera.project(points)

    def derivatives(self, state: State, view: int, ids: np.ndarray | None = None) -> tuple[Float, Float]:
        """(2 n, 12) px by small motions of X and Y, and (2 n, 6) by the pose error, at the state."""
        ids = self.detections[view].ids if ids is None else ids
        board_points = self.board.corners[ids]
        flange = self.poses[view] @ small(state.errors[view])
        pose = inverse(state.x) @ (inverse(flange) if self.mounting == "eye_in_hand" else flange) @ state.y
        camera_points = board_points @ pose[:3, :3].T + pose[:3, 3]
        by_point = self.camera.derivative(camera_points)
        identity = np.broadcast_to(np.eye(3), (len(ids), 3, 3))
        # (n, 2, 6) each: px per rad and per m of small motions on the right of X, of Y and of the flange's pose.
        by_x = by_point @ np.concatenate([skew(camera_points), -identity], -1)
        by_y = by_point @ pose[:3, :3] @ np.concatenate([-skew(board_points), identity], -1)
        if self.mounting == "eye_in_hand":
            flange_points = camera_points @ state.x[:3, :3].T + state.x[:3, 3]
            by_error = by_point @ state.x[:3, :3].T @ np.concatenate([skew(flange_points), -identity], -1)
        else:
            flange_points = board_points @ state.y[:3, :3].T + state.y[:3, 3]
            flange_in_camera = state.x[:3, :3].T @ flange[:3, :3]
            by_error = by_point @ flange_in_camera @ np.concatenate([-skew(flange_points), identity], -1)
        return np.concatenate([by_x, by_y], -1).reshape(-1, 12), by_error.reshape(-1, 6)

    def cost(self, state: State, noise: Noise) -> float:
        """Twice the negative log-likelihood, without what does not depend on the state."""
        total_cost = float((state.errors**2 @ noise.prior).sum())
        for view in range(len(self.poses)):
            pose = self.board_in_camera(state, view)
            detection = self.detections[view]
            points = self.board.corners[detection.ids] @ pose[:3, :3].T + pose[:3, 3]
            if (points[:, 2] <= 1e-6).any():
                return float("inf")
            total_cost += float(((detection.points - self.camera.project(points)) ** 2).sum()) / noise.pixel**2
        return total_cost

    def solve(self, state: State, noise: Noise, steps: int = 60) -> State:
        """Gauss-Newton with Levenberg's damping until the cost stands still.

        Raises:
            RatchetError: calibration.did_not_converge.
        """
        cost = self.cost(state, noise)
        # Nearly Gauss-Newton: the first guess is close, and damping grows by itself where it is not.
        damping = 1e-6
        if not np.isfinite(cost):
            raise RatchetError("calibration.did_not_converge", "the first guess sees the board behind the camera")
        for _ in range(steps):
            normal_matrix, right_side, eliminated = self._normal(state, noise)
            while True:
                damped_matrix = normal_matrix + damping * np.diag(np.diag(normal_matrix))
                step = cho_solve(cho_factor(damped_matrix), right_side)
                moved_state = self._moved(state, step, eliminated)
                lower_cost = self.cost(moved_state, noise)
                if lower_cost <= cost:
                    break
                # The step made it worse: more damping, a shorter step along the gradient.
                damping *= 10
                if damping > 1e8:
                    return state
            cost_gain = cost - lower_cost
            cost = lower_cost
            state = moved_state
            damping = max(damping / 10, 1e-12)
            if np.abs(step).max() < 1e-11 or cost_gain <= 1e-10 * max(cost, 1e-12):
                break
        return state

    def fit(self, state: State, known_noise: Noise | None) -> tuple[State, Noise, Float]:
        """Estimate everything. given: the deviations where they are known.

        Returns:
            the state, the deviations, and the (12, 12) covariance of small motions of X and Y.
        """
        noise = known_noise or Noise()
        state = self.solve(state, noise)
        if known_noise is None:
            for _ in range(60):
                next_noise = self._maximised(state, noise)
                log_change = np.abs(np.log(np.divide(_numbers(next_noise), _numbers(noise)))).max()
                noise = next_noise
                state = self.solve(state, noise, steps=3)
                if log_change < 5e-3:
                    break
            state = self.solve(state, noise)
        normal_matrix, _, _ = self._normal(state, noise)
        return state, noise, np.asarray(np.linalg.inv(normal_matrix), float)

    def information(self, state: State, noise: Noise, view: int, ids: np.ndarray) -> Float:
        """(12, 12): what a view of these corners from this pose says of X and Y."""
        of_state, of_error = self.derivatives(state, view, ids)
        a = of_state / noise.pixel
        b = of_error / noise.pixel
        # The Schur complement of the pose error, (6, 6) per view.
        error_information = b.T @ b + np.diag(noise.prior)
        return a.T @ a - a.T @ b @ np.linalg.solve(error_information, b.T @ a)

    def _normal(self, state: State, noise: Noise) -> tuple[Float, Float, list[Eliminated]]:
        """Normal equations of X and Y after the pose errors are eliminated, and the blocks that restore those.

        a: (2 n, 12), b: (2 n, 6): derivatives by X and Y and by the pose error; r: (2 n,) residual; all in deviations
        of the pixel noise.
        """
        normal_matrix = np.zeros((12, 12))
        right_side = np.zeros(12)
        eliminated: list[Eliminated] = []
        prior_information = np.diag(noise.prior)
        for view in range(len(self.poses)):
            of_state, of_error = self.derivatives(state, view)
            a = of_state / noise.pixel
            b = of_error / noise.pixel
            r = self.residual(state, view).ravel() / noise.pixel
            inner_inverse = np.asarray(np.linalg.inv(b.T @ b + prior_information), float)
            pull = b.T @ r - prior_information @ state.errors[view]
            cross_block = b.T @ a
            # Schur complement: the (12, 12) system of X and Y without any of the 6 N pose errors.
            normal_matrix += a.T @ a - cross_block.T @ inner_inverse @ cross_block
            right_side += a.T @ r - cross_block.T @ inner_inverse @ pull
            eliminated.append((inner_inverse, cross_block, pull))
        return normal_matrix, right_side, eliminated

    def _moved(self, state: State, step: Float, eliminated: list[Eliminated]) -> State:
        errors = state.errors.copy()
        for view, (inner_inverse, cross_block, pull) in enumerate(eliminated):
            errors[view] = _composed(errors[view], inner_inverse @ (pull - cross_block @ step))
        return State(state.x @ small(step[:6]), state.y @ small(step[6:]), errors)

    def _maximised(self, state: State, noise: Noise) -> Noise:
        """The deviations that explain the errors as they are now known, their uncertainty included."""
        normal_matrix, _, eliminated = self._normal(state, noise)
        covariance = np.linalg.inv(normal_matrix)
        squared_errors = np.zeros(6)
        error_variance = np.zeros(6)
        squared_pixels = 0.0
        residual_count = 0
        for view, (inner_inverse, cross_block, _) in enumerate(eliminated):
            error_covariance = inner_inverse + inner_inverse @ cross_block @ covariance @ cross_block.T @ inner_inverse
            squared_errors += state.errors[view] ** 2
            error_variance += np.diag(error_covariance)
            of_state, of_error = self.derivatives(state, view)
            cross_covariance = -inner_inverse @ cross_block @ covariance
            squared_pixels += float((self.residual(state, view) ** 2).sum())
            squared_pixels += float(((of_state @ covariance) * of_state).sum())
            squared_pixels += float(((of_error @ error_covariance) * of_error).sum())
            squared_pixels += 2 * float(((of_error @ cross_covariance) * of_state).sum())
            residual_count += len(of_state)
        # M step: the expected squares, the estimates' own plus their uncertainty.
        variance = (squared_errors + error_variance) / len(eliminated)
        deviations = np.sqrt([squared_pixels / residual_count, variance[:3].mean(), variance[3:].mean()])
        return replace(
            noise, **dict(zip(("pixel", "rotation", "translation"), np.maximum(deviations, FLOOR), strict=True))
        )


def _numbers(noise: Noise) -> Float:
    return np.array([noise.pixel, noise.rotation, noise.translation])


def _composed(motion: Float, step: Float) -> Float:
    """The small motion that is `motion`, then `step`."""
    composed_pose = small(motion) @ small(step)
    return np.concatenate([Rotation.from_matrix(composed_pose[:3, :3]).as_rotvec(), composed_pose[:3, 3]])
