"""Coverage of board views: where corners fell in the image, and how the board was held.

Knows detections. Chooses a subset, and tells a person what is missing. Estimates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import Detection
from ratchet_calibration.geometry import Float

GRID = (8, 6)  # cells across and down
FULL = 0.75  # share of cells with corners that is enough
TILTS = ("left", "right", "up", "down")


@dataclass(frozen=True)
class View:
    """What one view adds.

    Attributes:
        cells: flat indices of GRID with corners.
        tilt: (2,) foreshortening across and down, 0 when seen straight.
        scale: the board's extent over the image's.
    """

    cells: frozenset[int]
    tilt: tuple[float, float]
    scale: float


@dataclass(frozen=True)
class Coverage:
    """What a set of views covers.

    Attributes:
        counts: (rows, columns) corners per cell.
        missing: what a person should show next, in words, empty when done.
    """

    counts: Float
    missing: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the cells that hold at least one corner."""
        return float((self.counts > 0).mean())


def describe(board: Board, detection: Detection) -> View:
    """What one view shows: the cells of the image with corners, the tilt and the size of the board."""
    width_px, height_px = detection.size
    cell_columns = np.clip((detection.points[:, 0] * GRID[0] / width_px).astype(int), 0, GRID[0] - 1)
    cell_rows = np.clip((detection.points[:, 1] * GRID[1] / height_px).astype(int), 0, GRID[1] - 1)
    board_xy = board.corners[detection.ids, :2]
    homography, _ = cv2.findHomography(board_xy, detection.points)
    board_centre = np.append(board_xy.mean(0), 1.0)
    # The homography's last row over its value at the board's middle: how fast depth grows along the board's axes.
    slope = homography[2, :2] / (homography[2] @ board_centre) * min(board.size)
    extent = np.ptp(detection.points, axis=0).max() / max(width_px, height_px)
    return View(
        frozenset((cell_rows * GRID[0] + cell_columns).tolist()), (float(slope[0]), float(slope[1])), float(extent)
    )


def measure(board: Board, detections: Sequence[Detection]) -> Coverage:
    """What these views cover, and what is missing."""
    cell_counts = np.zeros(GRID[0] * GRID[1])
    views = [describe(board, detection) for detection in detections]
    for view in views:
        cell_counts[list(view.cells)] += 1
    counts_by_row = cell_counts.reshape(GRID[1], GRID[0])
    missing = []
    if len(detections) < 10:
        missing.append(f"{10 - len(detections)} more views")
    if (counts_by_row > 0).mean() < FULL:
        missing.append("the board " + _emptiest(counts_by_row))
    tilts = np.array([view.tilt for view in views]) if views else np.zeros((0, 2))
    for axis, sign, side in ((0, -1, "left"), (0, 1, "right"), (1, -1, "up"), (1, 1, "down")):
        if not (sign * tilts[:, axis] > 0.1).any():
            missing.append(f"the board tilted {side} by about 30 degrees")
    scales = [view.scale for view in views]
    # Views at one distance leave focal length and distance entangled.
    if scales and max(scales) / min(scales) < 1.3:
        missing.append("the board closer, and further away")
    return Coverage(counts_by_row, tuple(missing))


def choose(board: Board, detections: Sequence[Detection], most: int) -> list[int]:
    """Indices of at most `most` views, in the order in which each adds most: new cells, then other tilts and scales."""
    views = [describe(board, detection) for detection in detections]
    remaining = list(range(len(views)))
    chosen: list[int] = []
    cell_counts = np.zeros(GRID[0] * GRID[1])
    while remaining and len(chosen) < most:

        def gain(index: int) -> float:
            view = views[index]
            # Cells that few chosen views cover count most; a pose far from all chosen ones adds up to 1.
            new_cells = sum(1.0 / (1.0 + cell_counts[cell]) ** 2 for cell in view.cells) / cell_counts.size
            view_pose = np.array([*view.tilt, np.log(view.scale)])
            chosen_poses = [
                np.array([*views[chosen_index].tilt, np.log(views[chosen_index].scale)]) for chosen_index in chosen
            ]
            nearest_distance = min(
                (float(np.linalg.norm(view_pose - other_pose)) for other_pose in chosen_poses), default=1.0
            )
            return float(new_cells + min(nearest_distance, 1.0))

        best_index = max(remaining, key=gain)
        remaining.remove(best_index)
        chosen.append(best_index)
        cell_counts[list(views[best_index].cells)] += 1
    return chosen


def _emptiest(table: Float) -> str:
    regions = {
        "at the left": table[:, : GRID[0] // 3],
        "at the right": table[:, -(GRID[0] // 3) :],
        "at the top": table[: GRID[1] // 3],
        "at the bottom": table[-(GRID[1] // 3) :],
        "in the middle": table[GRID[1] // 3 : -(GRID[1] // 3), GRID[0] // 3 : -(GRID[0] // 3)],
    }
    return min(regions, key=lambda region_name: float((regions[region_name] > 0).mean()))
