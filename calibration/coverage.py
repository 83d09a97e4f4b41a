"""Which views of a board say something new: where corners fell in the picture, and how the board was held.

Knows detections. Chooses a set, and tells a person what is missing. Estimates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from calibration.boards import Board
from calibration.detection import Detection
from calibration.geometry import Float

GRID = (8, 6)  # cells across and down
FULL = 0.75  # share of cells with corners that is enough
TILTS = ("left", "right", "up", "down")


@dataclass(frozen=True)
class View:
    """What one view adds. cells: flat indices of GRID. tilt: (2,) foreshortening across and down, 0 when seen straight.
    scale: the board's extent over the picture's."""

    cells: frozenset[int]
    tilt: tuple[float, float]
    scale: float


@dataclass(frozen=True)
class Coverage:
    """counts: (rows, columns) corners per cell. missing: what a person should show next, in words, empty when done."""

    counts: Float
    missing: tuple[str, ...]

    @property
    def share(self) -> float:
        return float((self.counts > 0).mean())


def describe(board: Board, detection: Detection) -> View:
    width, height = detection.size
    column = np.clip((detection.points[:, 0] * GRID[0] / width).astype(int), 0, GRID[0] - 1)
    row = np.clip((detection.points[:, 1] * GRID[1] / height).astype(int), 0, GRID[1] - 1)
    flat = board.corners[detection.ids, :2]
    homography, _ = cv2.findHomography(flat, detection.points)
    middle = np.append(flat.mean(0), 1.0)
    # The homography's last row over its value at the board's middle: how fast depth grows along the board's axes.
    slope = homography[2, :2] / (homography[2] @ middle) * min(board.size)
    extent = np.ptp(detection.points, axis=0).max() / max(width, height)
    return View(frozenset((row * GRID[0] + column).tolist()), (float(slope[0]), float(slope[1])), float(extent))


def measure(board: Board, detections: Sequence[Detection]) -> Coverage:
    """What these views cover, and what is missing."""
    counts = np.zeros(GRID[0] * GRID[1])
    views = [describe(board, d) for d in detections]
    for view in views:
        counts[list(view.cells)] += 1
    table = counts.reshape(GRID[1], GRID[0])
    missing = []
    if len(detections) < 10:
        missing.append(f"{10 - len(detections)} more views")
    if (table > 0).mean() < FULL:
        missing.append("the board " + _emptiest(table))
    tilts = np.array([v.tilt for v in views]) if views else np.zeros((0, 2))
    for axis, (negative, positive) in enumerate((("left", "right"), ("up", "down"))):
        for sign, name in ((-1, negative), (1, positive)):
            if not (sign * tilts[:, axis] > 0.1).any():
                missing.append(f"the board tilted {name} by about 30 degrees")
    scales = [v.scale for v in views]
    if scales and max(scales) / min(scales) < 1.3:
        missing.append("the board closer, and further away")
    return Coverage(table, tuple(missing))


def choose(board: Board, detections: Sequence[Detection], most: int) -> list[int]:
    """Indices of at most `most` views, in the order in which each adds most: new cells, then other tilts and scales."""
    views = [describe(board, d) for d in detections]
    left = list(range(len(views)))
    chosen: list[int] = []
    counts = np.zeros(GRID[0] * GRID[1])
    while left and len(chosen) < most:

        def gain(index: int) -> float:
            view = views[index]
            fresh = sum(1.0 / (1.0 + counts[c]) ** 2 for c in view.cells) / counts.size
            pose = np.array([*view.tilt, np.log(view.scale)])
            others = [np.array([*views[k].tilt, np.log(views[k].scale)]) for k in chosen]
            apart = min((float(np.linalg.norm(pose - o)) for o in others), default=1.0)
            return float(fresh + min(apart, 1.0))

        best = max(left, key=gain)
        left.remove(best)
        chosen.append(best)
        counts[list(views[best].cells)] += 1
    return chosen


def _emptiest(table: Float) -> str:
    half = {
        "at the left": table[:, : GRID[0] // 3],
        "at the right": table[:, -(GRID[0] // 3) :],
        "at the top": table[: GRID[1] // 3],
        "at the bottom": table[-(GRID[1] // 3) :],
        "in the middle": table[GRID[1] // 3 : -(GRID[1] // 3), GRID[0] // 3 : -(GRID[0] // 3)],
    }
    return min(half, key=lambda k: float((half[k] > 0).mean()))
