"""The joint estimate behind hand-eye calibration: camera, board and the robot's own pose errors, over pixels.

Knows the chain camera <- flange <- base <- board (or its mirror image), its derivatives, and a damped Gauss-Newton
method that eliminates each view's pose error. Knows no limits of good sense; handeye.py refuses before it asks this.

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

from agent.errors import RatchetError
from calibration.boards import Board
from calibration.camera_model import CameraModel
from calibration.detection import Detection
from calibration.geometry import Float, inverse, skew, small

Mounting = Literal["eye_in_hand", "eye_to_hand"]
Eliminated = tuple[Float, Float, Float]  # of one view: inverse block, cross block, pull
FLOOR = np.array([1e-3, 1e-7, 1e-7])  # px, rad, m: below this a deviation is called zero


@dataclass(frozen=True)
class Noise:
    """One standard deviation each. pixel: per coordinate, px. rotation: per axis, rad. translation: per axis, m."""

    pixel: float = 0.3
    rotation: float = 2e-3
    translation: float = 1e-3

    @property
    def prior(self) -> Float:
        """(6,) inverse variances of a pose error."""
        return np.repeat([self.rotation**-2, self.translation**-2], 3)


@dataclass(frozen=True)
class State:
    """x: (4, 4) X. y: (4, 4) Y. errors: (N, 6) the robot's pose errors d."""

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

    def board_in_camera(self, state: State, view: int, known: bool = True) -> Float:
        """(4, 4) camera_T_board. known: with the estimated pose error; else as the robot says."""
        flange = self.poses[view] @ small(state.errors[view]) if known else self.poses[view]
        chain = inverse(flange) if self.mounting == "eye_in_hand" else flange
        return inverse(state.x) @ chain @ state.y

    def residual(self, state: State, view: int, known: bool = True) -> Float:
        """(n, 2) px, seen minus predicted."""
        pose = self.board_in_camera(state, view, known)
        seen = self.detections[view]
        points = self.board.corners[seen.ids] @ pose[:3, :3].T + pose[:3, 3]
        return seen.points - self.camera.project(points)

    def derivatives(self, state: State, view: int, ids: np.ndarray | None = None) -> tuple[Float, Float]:
        """(2 n, 12) px by small motions of X and Y, and (2 n, 6) by the pose error, at the state."""
        ids = self.detections[view].ids if ids is None else ids
        own = self.board.corners[ids]
        flange = self.poses[view] @ small(state.errors[view])
        pose = inverse(state.x) @ (inverse(flange) if self.mounting == "eye_in_hand" else flange) @ state.y
        seen = own @ pose[:3, :3].T + pose[:3, 3]
        by_point = self.camera.derivative(seen)
        eye = np.broadcast_to(np.eye(3), (len(ids), 3, 3))
        by_x = by_point @ np.concatenate([skew(seen), -eye], -1)
        by_y = by_point @ pose[:3, :3] @ np.concatenate([-skew(own), eye], -1)
        if self.mounting == "eye_in_hand":
            in_flange = seen @ state.x[:3, :3].T + state.x[:3, 3]
            by_error = by_point @ state.x[:3, :3].T @ np.concatenate([skew(in_flange), -eye], -1)
        else:
            in_flange = own @ state.y[:3, :3].T + state.y[:3, 3]
            turned = state.x[:3, :3].T @ flange[:3, :3]
            by_error = by_point @ turned @ np.concatenate([-skew(in_flange), eye], -1)
        return np.concatenate([by_x, by_y], -1).reshape(-1, 12), by_error.reshape(-1, 6)

    def cost(self, state: State, noise: Noise) -> float:
        """Twice the negative log-likelihood, without what does not depend on the state."""
        total = float((state.errors**2 @ noise.prior).sum())
        for view in range(len(self.poses)):
            pose = self.board_in_camera(state, view)
            seen = self.detections[view]
            points = self.board.corners[seen.ids] @ pose[:3, :3].T + pose[:3, 3]
            if (points[:, 2] <= 1e-6).any():
                return float("inf")
            total += float(((seen.points - self.camera.project(points)) ** 2).sum()) / noise.pixel**2
        return total

    def solve(self, state: State, noise: Noise, steps: int = 60) -> State:
        """Gauss-Newton with Levenberg's damping until the cost stands still.

        Raises:
            RatchetError: calibration.did_not_converge.
        """
        cost = self.cost(state, noise)
        damping = 1e-6
        if not np.isfinite(cost):
            raise RatchetError("calibration.did_not_converge", "the first guess sees the board behind the camera")
        for _ in range(steps):
            normal, right, views = self._normal(state, noise)
            while True:
                damped = normal + damping * np.diag(np.diag(normal))
                step = cho_solve(cho_factor(damped), right)
                moved = self._moved(state, step, views)
                lower = self.cost(moved, noise)
                if lower <= cost:
                    break
                damping *= 10
                if damping > 1e8:
                    return state
            gained = cost - lower
            cost = lower
            state = moved
            damping = max(damping / 10, 1e-12)
            if np.abs(step).max() < 1e-11 or gained <= 1e-10 * max(cost, 1e-12):
                break
        return state

    def fit(self, state: State, given: Noise | None) -> tuple[State, Noise, Float]:
        """Estimate everything. given: the deviations where they are known.

        Returns:
            the state, the deviations, and the (12, 12) covariance of small motions of X and Y.
        """
        noise = given or Noise()
        state = self.solve(state, noise)
        if given is None:
            for _ in range(60):
                fresh = self._maximised(state, noise)
                change = np.abs(np.log(np.divide(_numbers(fresh), _numbers(noise)))).max()
                noise = fresh
                state = self.solve(state, noise, steps=3)
                if change < 5e-3:
                    break
            state = self.solve(state, noise)
        normal, _, _ = self._normal(state, noise)
        return state, noise, np.asarray(np.linalg.inv(normal), float)

    def information(self, state: State, noise: Noise, view: int, ids: np.ndarray) -> Float:
        """(12, 12): what a view of these corners from this pose says of X and Y."""
        of_state, of_error = self.derivatives(state, view, ids)
        a = of_state / noise.pixel
        b = of_error / noise.pixel
        inner = b.T @ b + np.diag(noise.prior)
        return a.T @ a - a.T @ b @ np.linalg.solve(inner, b.T @ a)

    def _normal(self, state: State, noise: Noise) -> tuple[Float, Float, list[Eliminated]]:
        """Normal equations of X and Y after the pose errors are eliminated, and what brings those back."""
        normal = np.zeros((12, 12))
        right = np.zeros(12)
        views: list[Eliminated] = []
        prior = np.diag(noise.prior)
        for view in range(len(self.poses)):
            of_state, of_error = self.derivatives(state, view)
            a = of_state / noise.pixel
            b = of_error / noise.pixel
            r = self.residual(state, view).ravel() / noise.pixel
            inner = np.asarray(np.linalg.inv(b.T @ b + prior), float)
            pull = b.T @ r - prior @ state.errors[view]
            cross = b.T @ a
            normal += a.T @ a - cross.T @ inner @ cross
            right += a.T @ r - cross.T @ inner @ pull
            views.append((inner, cross, pull))
        return normal, right, views

    def _moved(self, state: State, step: Float, views: list[Eliminated]) -> State:
        errors = state.errors.copy()
        for view, (inner, cross, pull) in enumerate(views):
            errors[view] = _composed(errors[view], inner @ (pull - cross @ step))
        return State(state.x @ small(step[:6]), state.y @ small(step[6:]), errors)

    def _maximised(self, state: State, noise: Noise) -> Noise:
        """The deviations that explain the errors as they are now known, their uncertainty included."""
        normal, _, views = self._normal(state, noise)
        covariance = np.linalg.inv(normal)
        squares = np.zeros(6)
        spread = np.zeros(6)
        pixels = 0.0
        count = 0
        for view, (inner, cross, _) in enumerate(views):
            whole = inner + inner @ cross @ covariance @ cross.T @ inner
            squares += state.errors[view] ** 2
            spread += np.diag(whole)
            of_state, of_error = self.derivatives(state, view)
            mixed = -inner @ cross @ covariance
            pixels += float((self.residual(state, view) ** 2).sum())
            pixels += float(((of_state @ covariance) * of_state).sum())
            pixels += float(((of_error @ whole) * of_error).sum())
            pixels += 2 * float(((of_error @ mixed) * of_state).sum())
            count += len(of_state)
        variance = (squares + spread) / len(views)
        found = np.sqrt([pixels / count, variance[:3].mean(), variance[3:].mean()])
        return replace(noise, **dict(zip(("pixel", "rotation", "translation"), np.maximum(found, FLOOR), strict=True)))


def _numbers(noise: Noise) -> Float:
    return np.array([noise.pixel, noise.rotation, noise.translation])


def _composed(motion: Float, step: Float) -> Float:
    """The small motion that is `motion`, then `step`."""
    whole = small(motion) @ small(step)
    return np.concatenate([Rotation.from_matrix(whole[:3, :3]).as_rotvec(), whole[:3, 3]])
