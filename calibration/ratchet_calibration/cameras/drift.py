"""Drift check: has the camera moved since it was calibrated? The current view against the reference image.

Run before any motion. Knows two ways: the board's pose where the board is in both views, else features of the static
scene. Knows no session: `store.last_check` refuses one on a drift, unless a person overrides it with a reason there.

Features: corners of the reference image followed into the present one to a fraction of a pixel (Lucas-Kanade), there
and back. The image is divided into cells; each has the median displacement of its features. A camera that moved by
millimetres leaves hardly a cell where it was; moved objects and a moved arm leave the cells between them, however many
features they have; changed light moves nothing. So a camera has moved where too small a share of the cells stayed, or
where many cells agree on one motion of the whole image: a move along the axis of view leaves its middle in place. A
relative pose by the five-point method would be too free for moves as small as these. Average a few frames on both
sides: the texture of a table drowns in noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import detect
from ratchet_calibration.cameras.intrinsics import board_pose
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.geometry import Float, difference
from ratchet_vla.errors import RatchetError

LEAST = 30  # matches, below which a view says nothing
LEAST_CELLS = 10  # cells with matches, likewise
GRID = (12, 9)  # cells across and down
SMALL = 0.6  # px: matches that moved less have not moved
# A cell agrees with a motion of the whole image where it is this near to it: px, plus a share of the motion.
NEAR = 0.35
NEARER = 0.2
# So many cells, and this share of all, must agree; fewer do so by chance.
AGREE = 10
AGREE_SHARE = 0.4


@dataclass(frozen=True)
class Drift:
    """Result of a drift check.

    Attributes:
        moved: whether the camera has moved beyond the threshold.
        way: how it was measured.
        pixels: displacement of the scene, median over its cells, px.
        stayed: share of the cells that did not move.
        agreed: px, rms over the image of the one motion that many cells agree on; 0 where they do not.
        position, rotation: m and rad where the board was seen, else NaN.
        matches: features compared, or corners of the board.
    """

    moved: bool
    way: Literal["board", "features"]
    pixels: float
    stayed: float
    position: float
    rotation: float
    matches: int
    agreed: float = 0.0


@dataclass(frozen=True)
class Threshold:
    """Limits beyond which a camera counts as moved.

    Attributes:
        position: m by which the board may have moved, where it is in both views.
        rotation: rad, likewise.
        stayed: share of cells, without the board: a camera counts as moved where fewer stayed. Moved objects and a
            moved arm leave a quarter, a moved camera a seventh.
        agreed: px: it also counts as moved where many cells agree on a larger motion. A camera that stayed shows up to
            0.7, one that moved 0.9 and more.
    """

    position: float = 0.003
    rotation: float = float(np.radians(0.3))
    stayed: float = 0.19
    agreed: float = 0.8


def compare(
    reference: NDArray[np.uint8],
    current: NDArray[np.uint8],
    camera: CameraModel | None = None,
    board: Board | None = None,
    threshold: Threshold = Threshold(),
) -> Drift:
    """Compare two raw images of the same camera, (H, W, 3) or (H, W) uint8.

    Args:
        camera, board: where both are given and the board is in both images, its pose decides.

    Raises:
        RatchetError: drift.wrong_size; drift.blind where too little of the scene is seen in both to tell.
    """
    if reference.shape[:2] != current.shape[:2]:
        raise RatchetError(
            "drift.wrong_size",
            f"{current.shape[1]} x {current.shape[0]} now, {reference.shape[1]} x {reference.shape[0]} when calibrated",
            fix="set the camera to the resolution that it was calibrated at",
        )
    if camera is not None and board is not None:
        board_drift = _with_board(reference, current, camera, board, threshold)
        if board_drift is not None:
            return board_drift
    reference_points, current_points = matched(reference, current)
    if len(reference_points) < LEAST:
        raise RatchetError(
            "drift.blind",
            f"{len(reference_points)} features match, {LEAST} are needed",
            fix="check lens, light and which camera this is; or show the board",
        )
    image_size = (reference.shape[1], reference.shape[0])
    cell_positions, cell_shifts = _cells(reference_points, current_points - reference_points, image_size)
    shift_lengths = np.linalg.norm(cell_shifts, axis=1)
    if len(shift_lengths) < LEAST_CELLS:
        raise RatchetError(
            "drift.blind",
            f"features match in {len(shift_lengths)} of {GRID[0] * GRID[1]} parts of the image only",
            fix="check lens, light and which camera this is; or show the board",
        )
    stayed_share = float((shift_lengths < SMALL).mean())
    median_shift = float(np.median(shift_lengths))
    agreed_rms = _agreed(cell_positions / max(image_size), cell_shifts)
    # Two rules: the share of cells catches most moves; a move along the axis of view leaves the middle in place, and
    # only the agreement of many cells shows it (99.5 % of 200 moves caught, 1.5 % false alarms).
    has_moved = stayed_share < threshold.stayed or agreed_rms > threshold.agreed
    return Drift(
        has_moved, "features", median_shift, stayed_share, float("nan"), float("nan"), len(reference_points), agreed_rms
    )


def matched(reference: NDArray[np.uint8], current: NDArray[np.uint8]) -> tuple[Float, Float]:
    """(n, 2) px in both images of features that are found again, there and back."""
    reference_grey = _flat(reference)
    current_grey = _flat(current)
    # Many weak corners rather than few strong ones: what counts is how many cells of the image have any.
    corners = cv2.goodFeaturesToTrack(reference_grey, 4000, 0.002, 5, blockSize=7)
    if corners is None:
        return np.zeros((0, 2)), np.zeros((0, 2))
    settings: dict[str, Any] = {
        "winSize": (25, 25),
        "maxLevel": 3,
        "criteria": (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 40, 1e-3),
    }
    current_corners, found_forward, _ = cv2.calcOpticalFlowPyrLK(
        reference_grey, current_grey, corners, None, **settings
    )
    returned_corners, found_backward, _ = cv2.calcOpticalFlowPyrLK(
        current_grey, reference_grey, current_corners, None, **settings
    )
    is_consistent = found_forward.ravel().astype(bool) & found_backward.ravel().astype(bool)
    # Tracked forth and back, a good feature returns to within 0.3 px of where it started.
    is_consistent &= np.linalg.norm((returned_corners - corners).reshape(-1, 2), axis=1) < 0.3
    return corners.reshape(-1, 2)[is_consistent].astype(float), current_corners.reshape(-1, 2)[is_consistent].astype(
        float
    )


def averaged(frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The mean of a few frames of a static scene, (H, W) or (H, W, 3) uint8: less noise, same place."""
    # Averaging eight frames matters: the texture of a floor drowns in two grey levels of noise.
    return np.asarray(np.mean(np.stack(frames).astype(np.float32), axis=0).round(), np.uint8)


def comparison_image(reference: NDArray[np.uint8], current: NDArray[np.uint8], drift: Drift) -> NDArray[np.uint8]:
    """Draw both images for a person: (H, 2 W, 3) uint8 RGB.

    Left, the present one with arrows from then to now; right, both laid over each other, then in red and now in cyan:
    what has not moved is grey.
    """
    reference_grey = _grey(reference)
    current_grey = _grey(current)
    arrow_image = cv2.cvtColor(current_grey, cv2.COLOR_GRAY2RGB)
    reference_points, current_points = matched(reference, current)
    for start_point, end_point in zip(reference_points, current_points, strict=True):
        has_moved = np.linalg.norm(end_point - start_point) > SMALL
        arrow_tip = start_point + 8 * (
            end_point - start_point
        )  # eight times as long as it is, or nobody would see half a pixel
        colour = (230, 60, 40) if has_moved else (60, 170, 90)
        cv2.line(
            arrow_image,
            tuple(int(coordinate) for coordinate in start_point),
            tuple(int(coordinate) for coordinate in arrow_tip),
            colour,
            1,
            cv2.LINE_AA,
        )
    overlay = np.dstack([reference_grey, current_grey, current_grey])
    return np.ascontiguousarray(np.concatenate([arrow_image, overlay], 1))


def _with_board(
    reference: NDArray[np.uint8], current: NDArray[np.uint8], camera: CameraModel, board: Board, threshold: Threshold
) -> Drift | None:
    try:
        reference_board = detect(board, reference)
        current_board = detect(board, current)
    except RatchetError:
        return None
    shared_ids = np.intersect1d(reference_board.ids, current_board.ids)
    board_motion = difference(board_pose(board, camera, reference_board), board_pose(board, camera, current_board))
    position_m = float(np.linalg.norm(board_motion[3:]))
    rotation_rad = float(np.linalg.norm(board_motion[:3]))
    reference_points = reference_board.points[np.isin(reference_board.ids, shared_ids)]
    current_points = current_board.points[np.isin(current_board.ids, shared_ids)]
    median_shift = float("nan")
    if len(shared_ids):
        median_shift = float(np.median(np.linalg.norm(reference_points - current_points, axis=1)))
    has_moved = position_m > threshold.position or rotation_rad > threshold.rotation
    return Drift(has_moved, "board", median_shift, float(not has_moved), position_m, rotation_rad, len(shared_ids))


def _agreed(cell_positions: Float, cell_shifts: Float) -> float:
    """Rms over the image, in px, of the affine motion that most cells agree on.

    Sampled over pairs of cells, then fitted to all that agree.

    Args:
        cell_positions: (c, 2) in widths of the image.
        cell_shifts: (c, 2) px.
    """
    # A fixed seed: the same two images always give the same answer.
    generator = np.random.default_rng(0)
    design = _affine(cell_positions)

    def agreeing(motion: Float) -> NDArray[np.bool_]:
        predicted = (design @ motion).reshape(-1, 2)
        tolerance = NEAR + NEARER * np.linalg.norm(predicted, axis=1)
        return np.asarray(np.linalg.norm(cell_shifts - predicted, axis=1) < tolerance, bool)

    best_motion: Float = np.zeros(6)
    agreeing_cells = agreeing(best_motion)
    # RANSAC over pairs of cells: two points determine a similarity.
    for _ in range(500):
        first_cell, second_cell = generator.choice(len(cell_positions), 2, replace=False)
        if np.linalg.norm(cell_positions[first_cell] - cell_positions[second_cell]) < 0.15:
            continue
        # The similarity that takes both cells where they went, in complex numbers: shift + factor * place.
        first_place, second_place, first_shift, second_shift = (
            complex(*point)
            for point in (
                cell_positions[first_cell],
                cell_positions[second_cell],
                cell_shifts[first_cell],
                cell_shifts[second_cell],
            )
        )
        factor = (second_shift - first_shift) / (second_place - first_place)
        translation = first_shift - factor * first_place
        motion = np.array([translation.real, factor.real, -factor.imag, translation.imag, factor.imag, factor.real])
        agreeing_now = agreeing(motion)
        if agreeing_now.sum() > agreeing_cells.sum():
            best_motion = motion
            agreeing_cells = agreeing_now
    # Then least squares on the cells that agree, until the set settles: an affine motion has six parameters.
    for _ in range(6):
        if agreeing_cells.sum() < AGREE:
            return 0.0
        best_motion = np.asarray(
            np.linalg.lstsq(design[np.repeat(agreeing_cells, 2)], cell_shifts[agreeing_cells].ravel(), rcond=None)[0],
            float,
        )
        agreeing_cells = agreeing(best_motion)
    if agreeing_cells.sum() < max(AGREE, AGREE_SHARE * len(cell_positions)):
        return 0.0
    grid_x, grid_y = np.meshgrid(np.linspace(0, 1, 16), np.linspace(0, cell_positions[:, 1].max(), 12))
    flow = (_affine(np.stack([grid_x.ravel(), grid_y.ravel()], 1)) @ best_motion).reshape(-1, 2)
    return float(np.sqrt((flow**2).sum(1).mean()))


def _affine(cell_positions: Float) -> Float:
    """(2 c, 6): shifts by the parameters [a b c d e f] of u = a + b x + c y, v = d + e x + f y."""
    terms = np.column_stack([np.ones(len(cell_positions)), cell_positions])
    design = np.zeros((len(cell_positions), 2, 6))
    design[:, 0, :3] = terms
    design[:, 1, 3:] = terms
    return design.reshape(-1, 6)


def _cells(points: Float, shifts: Float, size: tuple[int, int]) -> tuple[Float, Float]:
    """(c, 2) px each: where the features of each cell are, and how far they moved, for cells with at least three.

    Args:
        points, shifts: (n, 2) px.
    """
    cell_of_point = np.clip((points * GRID / np.array(size)).astype(int), 0, np.array(GRID) - 1)
    cell_index = cell_of_point[:, 1] * GRID[0] + cell_of_point[:, 0]
    # The median of fewer than three features is one feature's opinion.
    cell_ids = [cell for cell in np.unique(cell_index) if (cell_index == cell).sum() >= 3]
    cell_positions = np.array([points[cell_index == cell].mean(0) for cell in cell_ids]).reshape(-1, 2)
    return cell_positions, np.array([np.median(shifts[cell_index == cell], axis=0) for cell in cell_ids]).reshape(-1, 2)


def _grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image.ndim == 3:
        return np.asarray(cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_RGB2GRAY), np.uint8)
    return image


def _flat(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey with local contrast evened out, so that shadows and brightness do not count."""
    return np.asarray(cv2.createCLAHE(3.0, (8, 8)).apply(_grey(image)), np.uint8)
