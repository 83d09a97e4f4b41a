"""Board detection: corners of a board in one image, or the reason why the image cannot be used.

Knows OpenCV's detectors and what a bad image looks like. Knows no camera model.
Pixels: (x, y) with the centre of the first pixel at (0, 0), as in OpenCV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ratchet_calibration.boards.board import DICTIONARIES, Board
from ratchet_calibration.geometry import Float
from ratchet_vla.errors import RatchetError

__all__ = ["Detection", "detect"]

LEAST = 8  # corners that a view must have: fewer say little and mislead a homography
BLUR = 3.0  # px that an edge may take from dark to bright


@dataclass(frozen=True)
class Detection:
    """Corners of a board found in one image.

    Attributes:
        ids: (n,) int, corners of the board.
        points: (n, 2) px.
        size: (width, height) of the image in px.
    """

    ids: NDArray[np.int64]
    points: Float
    size: tuple[int, int]
    name: str = ""

    def __len__(self) -> int:
        return len(self.ids)


def detect(board: Board, image: NDArray[np.uint8], name: str = "") -> Detection:
    """Find the board's corners in an image.

    Args:
        image: (H, W) or (H, W, 3) uint8, any colour order. name: of the image, for messages.

    Raises:
        RatchetError: calibration.bad_image, calibration.mirrored, calibration.wrong_board, calibration.no_board,
            calibration.few_corners, calibration.blurred, calibration.dark, calibration.bright.
    """
    grey_image = to_grey(image, name)
    corners, ids = _find(board, grey_image)
    if ids is None or len(ids) < LEAST:
        _refuse(board, grey_image, 0 if ids is None else len(ids), name)
    assert corners is not None
    assert ids is not None
    points = corners.reshape(-1, 2).astype(float)
    edge_width_px = edge_width(grey_image, board, ids, points)
    if edge_width_px > BLUR:
        raise RatchetError(
            "calibration.blurred",
            f"edges are {edge_width_px:.1f} px wide, at most {BLUR} are of use",
            where=name,
            fix="hold the board still, add light, check the focus",
        )
    return Detection(ids.ravel().astype(np.int64), points, (grey_image.shape[1], grey_image.shape[0]), name)


def to_grey(image: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """Raises RatchetError calibration.bad_image."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
        raise RatchetError("calibration.bad_image", "not an image of 8 bits per channel", where=name)
    if image.ndim == 3:
        if image.shape[2] not in (1, 3, 4):
            raise RatchetError("calibration.bad_image", f"{image.shape[2]} channels", where=name)
        image = image[..., :3].mean(-1).round().astype(np.uint8)
    if min(image.shape) < 64:
        raise RatchetError("calibration.bad_image", f"only {image.shape[1]} x {image.shape[0]} px", where=name)
    return np.ascontiguousarray(image)


def edge_width(
    grey_image: NDArray[np.uint8], board: Board, ids: NDArray[np.signedinteger[Any]], points: Float
) -> float:
    """Width in px of the squares' edges, from 10 to 90 % of the way from dark to bright.

    It is the median over the edges along the board's rows, or over those along its columns, whichever is wider: a
    shaken camera blurs only one of them.

    Each edge between two neighbouring corners is crossed at its middle: contrast over the steepest slope.
    """
    point_by_id = dict(zip(ids.ravel().tolist(), points, strict=True))
    corners_per_row = board.columns - 1
    widths: dict[int, list[float]] = {1: [], corners_per_row: []}
    for corner_id, start_point in point_by_id.items():
        for id_step in (1, corners_per_row):
            if (id_step == 1 and (corner_id + 1) % corners_per_row == 0) or corner_id + id_step not in point_by_id:
                continue
            end_point = point_by_id[corner_id + id_step]
            edge_vector = end_point - start_point
            edge_px = float(np.hypot(*edge_vector))
            if edge_px < 8:
                continue
            # Across the edge; both of its ends are corners, so its middle is free of other edges.
            normal = np.array([-edge_vector[1], edge_vector[0]]) / edge_px
            reach_px = min(0.2 * edge_px, 12.0)
            offsets = np.linspace(-reach_px, reach_px, 4 * int(reach_px) + 5)
            sample_points = (start_point + end_point) / 2 + offsets[:, None] * normal
            profile = (
                cv2.remap(
                    grey_image,
                    sample_points[None, :, 0].astype(np.float32),
                    sample_points[None, :, 1].astype(np.float32),
                    cv2.INTER_LINEAR,
                )
                .ravel()
                .astype(float)
            )
            darkest = profile.min()
            brightest = profile.max()
            # Grey levels: an edge with less contrast than this is glare or shadow.
            if brightest - darkest < 20:
                continue
            slope = np.abs(np.gradient(profile, offsets)).max()
            widths[id_step].append(0.8 * (brightest - darkest) / slope)
    return max((float(np.median(edge_widths)) for edge_widths in widths.values() if edge_widths), default=float("inf"))


def _find(board: Board, grey_image: NDArray[np.uint8]) -> tuple[NDArray[np.float32] | None, NDArray[np.int32] | None]:
    if board.kind == "chessboard":
        flags = cv2.CALIB_CB_EXHAUSTIVE | cv2.CALIB_CB_ACCURACY
        is_found, corners = cv2.findChessboardCornersSB(grey_image, (board.columns - 1, board.rows - 1), flags)
        if not is_found:
            return None, None
        # OpenCV may begin at either end of a chessboard; ids must not depend on that.
        if _turned(grey_image, board, corners.reshape(board.rows - 1, board.columns - 1, 2)):
            corners = corners[::-1]
        return np.ascontiguousarray(corners), np.arange(len(corners), dtype=np.int32)
    detector_parameters = cv2.aruco.DetectorParameters()
    detector_parameters.cornerRefinementMethod = cv2.aruco.CORNER_REFINE_NONE
    charuco_parameters = cv2.aruco.CharucoParameters()
    charuco_parameters.tryRefineMarkers = True
    corners, ids, _, _ = cv2.aruco.CharucoDetector(
        board.charuco(), charuco_parameters, detector_parameters
    ).detectBoard(grey_image)
    if ids is None or not len(ids):
        return None, None
    return _refine(grey_image, board, corners, ids), ids


def _turned(grey_image: NDArray[np.uint8], board: Board, corners: NDArray[np.float32]) -> bool:
    """Whether a chessboard's corners were listed from its other end: then the second square of its second row is white.

    Args:
        corners: (rows - 1, columns - 1, 2) px.
    """
    # The middle of each square, from its four corners.
    square_centres = (corners[:-1, :-1] + corners[1:, :-1] + corners[:-1, 1:] + corners[1:, 1:]) / 4
    column_px, row_px = np.clip(
        square_centres.round().astype(int), 0, [grey_image.shape[1] - 1, grey_image.shape[0] - 1]
    ).transpose(2, 0, 1)
    square_row, square_column = np.indices(column_px.shape)
    is_even = (square_row + square_column) % 2 == 0
    grey_values = grey_image[row_px, column_px].astype(float)
    return bool(grey_values[is_even].mean() > grey_values[~is_even].mean())


def _refine(
    grey_image: NDArray[np.uint8], board: Board, corners: NDArray[np.float32], ids: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Sub-pixel corners in a window as large as the squares allow, so that markers do not enter it."""
    points = corners.reshape(-1, 2)
    point_by_id = dict(zip(ids.ravel().tolist(), points, strict=True))
    corners_per_row = board.columns - 1
    side_lengths = [
        np.hypot(*(point_by_id[corner_id + 1] - point))
        for corner_id, point in point_by_id.items()
        if (corner_id + 1) % corners_per_row and corner_id + 1 in point_by_id
    ]
    side_lengths += [
        np.hypot(*(point_by_id[corner_id + corners_per_row] - point))
        for corner_id, point in point_by_id.items()
        if corner_id + corners_per_row in point_by_id
    ]
    if not side_lengths:
        return corners
    marker_gap = (1 - board.marker / board.square) / 2  # between a square's edge and its marker, in squares
    # The window must not reach the markers, whose corners would pull the estimate.
    half_window_px = int(np.clip(0.9 * marker_gap * float(np.min(side_lengths)), 2, 12))
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 100, 1e-4)
    refined = cv2.cornerSubPix(
        grey_image, np.ascontiguousarray(corners), (half_window_px, half_window_px), (-1, -1), criteria
    )
    return np.asarray(refined, np.float32)


def _refuse(board: Board, grey_image: NDArray[np.uint8], corner_count: int, name: str) -> None:
    """Say why there are too few corners."""
    # The reasons go from the image as a whole to the board: the first that applies is the one to mend.
    if grey_image.max() < 40:
        raise RatchetError("calibration.dark", "the image is nearly black", where=name, fix="add light, or expose it")
    if grey_image.min() > 215:
        raise RatchetError("calibration.bright", "the image is nearly white", where=name, fix="expose it less")
    if board.kind == "charuco":
        _, flipped = _find(board, np.ascontiguousarray(grey_image[:, ::-1]))
        if flipped is not None and len(flipped) >= LEAST:
            raise RatchetError(
                "calibration.mirrored",
                "the board is seen mirrored",
                where=name,
                fix="switch off mirroring in the camera's driver, or state it in the contract",
            )
        marker_ids = _markers(grey_image, board.dictionary)
        if marker_ids:
            marker_count = (board.columns * board.rows) // 2
            if max(marker_ids) >= marker_count:
                raise RatchetError(
                    "calibration.wrong_board",
                    f"a marker {max(marker_ids)} is seen, this board ends at {marker_count - 1}",
                    where=name,
                    fix="describe the board that you printed",
                )
            if len(marker_ids) >= 6 and corner_count < 4:
                raise RatchetError(
                    "calibration.wrong_board",
                    f"{len(marker_ids)} of its markers are seen, in other places than this board has them",
                    where=name,
                    fix="check the counts of columns and rows",
                )
        else:
            for dictionary in DICTIONARIES:
                if dictionary != board.dictionary and len(_markers(grey_image, dictionary)) >= 6:
                    raise RatchetError(
                        "calibration.wrong_board",
                        f"its markers are of {dictionary}, not {board.dictionary}",
                        where=name,
                        fix="describe the board that you printed",
                    )
    if corner_count:
        raise RatchetError(
            "calibration.few_corners",
            f"{corner_count} corners, at least {LEAST} are needed",
            where=name,
            fix="show more of the board, closer or with more light",
        )
    raise RatchetError(
        "calibration.no_board", "no board is seen", where=name, fix="show the whole board, sharp and evenly lit"
    )


def _markers(grey_image: NDArray[np.uint8], dictionary: str) -> list[int]:
    detector = cv2.aruco.ArucoDetector(cv2.aruco.getPredefinedDictionary(DICTIONARIES[dictionary]))
    _, ids, _ = detector.detectMarkers(grey_image)
    return [] if ids is None else ids.ravel().tolist()
