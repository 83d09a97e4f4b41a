"""Corners of a board in one picture, or the reason why the picture is of no use.

Knows OpenCV's detectors and what a bad picture looks like. Knows no camera model.
Pixels: (x, y) with the centre of the first pixel at (0, 0), as in OpenCV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.errors import RatchetError
from calibration.boards import DICTIONARIES, Board
from calibration.geometry import Float

LEAST = 8  # corners that a view must have: fewer say little and mislead a homography
BLUR = 3.0  # px that an edge may take from dark to bright


@dataclass(frozen=True)
class Detection:
    """ids: (n,) int, corners of the board. points: (n, 2) px. size: (width, height) of the picture in px."""

    ids: NDArray[np.int64]
    points: Float
    size: tuple[int, int]
    name: str = ""

    def __len__(self) -> int:
        return len(self.ids)


def detect(board: Board, image: NDArray[np.uint8], name: str = "") -> Detection:
    """Find the board.

    Args:
        image: (H, W) or (H, W, 3) uint8, any colour order. name: of the picture, for messages.

    Raises:
        RatchetError: calibration.bad_image, calibration.mirrored, calibration.wrong_board, calibration.no_board,
            calibration.few_corners, calibration.blurred, calibration.dark, calibration.bright.
    """
    grey = to_grey(image, name)
    corners, ids = _find(board, grey)
    if ids is None or len(ids) < LEAST:
        _refuse(board, grey, 0 if ids is None else len(ids), name)
    assert corners is not None
    assert ids is not None
    points = corners.reshape(-1, 2).astype(float)
    width = edge_width(grey, board, ids, points)
    if width > BLUR:
        raise RatchetError(
            "calibration.blurred",
            f"edges are {width:.1f} px wide, at most {BLUR} are of use",
            where=name,
            fix="hold the board still, add light, check the focus",
        )
    return Detection(ids.ravel().astype(np.int64), points, (grey.shape[1], grey.shape[0]), name)


def to_grey(image: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """Raises RatchetError calibration.bad_image."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
        raise RatchetError("calibration.bad_image", "not a picture of 8 bits per channel", where=name)
    if image.ndim == 3:
        if image.shape[2] not in (1, 3, 4):
            raise RatchetError("calibration.bad_image", f"{image.shape[2]} channels", where=name)
        image = image[..., :3].mean(-1).round().astype(np.uint8)
    if min(image.shape) < 64:
        raise RatchetError("calibration.bad_image", f"only {image.shape[1]} x {image.shape[0]} px", where=name)
    return np.ascontiguousarray(image)


def edge_width(grey: NDArray[np.uint8], board: Board, ids: NDArray[np.signedinteger[Any]], points: Float) -> float:
    """Width in px of the squares' edges, from 10 to 90 % of the way from dark to bright.

    It is the median over the edges along the board's rows, or over those along its columns, whichever is wider: a
    shaken camera blurs only one of them.

    Each edge between two neighbouring corners is crossed at its middle: contrast over the steepest slope.
    """
    at = dict(zip(ids.ravel().tolist(), points, strict=True))
    across = board.columns - 1
    widths: dict[int, list[float]] = {1: [], across: []}
    for corner, here in at.items():
        for step in (1, across):
            if (step == 1 and (corner + 1) % across == 0) or corner + step not in at:
                continue
            there = at[corner + step]
            along = there - here
            length = float(np.hypot(*along))
            if length < 8:
                continue
            normal = np.array([-along[1], along[0]]) / length
            reach = min(0.2 * length, 12.0)
            offsets = np.linspace(-reach, reach, 4 * int(reach) + 5)
            middle = (here + there) / 2 + offsets[:, None] * normal
            profile = cv2.remap(
                grey, middle[None, :, 0].astype(np.float32), middle[None, :, 1].astype(np.float32), cv2.INTER_LINEAR
            ).ravel().astype(float)  # fmt: skip
            low = profile.min()
            high = profile.max()
            if high - low < 20:
                continue
            slope = np.abs(np.gradient(profile, offsets)).max()
            widths[step].append(0.8 * (high - low) / slope)
    return max((float(np.median(w)) for w in widths.values() if w), default=float("inf"))


def _find(board: Board, grey: NDArray[np.uint8]) -> tuple[NDArray[np.float32] | None, NDArray[np.int32] | None]:
    if board.kind == "chessboard":
        flags = cv2.CALIB_CB_EXHAUSTIVE | cv2.CALIB_CB_ACCURACY
        found, corners = cv2.findChessboardCornersSB(grey, (board.columns - 1, board.rows - 1), flags)
        if not found:
            return None, None
        if _turned(grey, board, corners.reshape(board.rows - 1, board.columns - 1, 2)):
            corners = corners[::-1]
        return np.ascontiguousarray(corners), np.arange(len(corners), dtype=np.int32)
    parameters = cv2.aruco.DetectorParameters()
    parameters.cornerRefinementMethod = cv2.aruco.CORNER_REFINE_NONE
    charuco = cv2.aruco.CharucoParameters()
    charuco.tryRefineMarkers = True
    corners, ids, _, _ = cv2.aruco.CharucoDetector(board.charuco(), charuco, parameters).detectBoard(grey)
    if ids is None or not len(ids):
        return None, None
    return _refine(grey, board, corners, ids), ids


def _turned(grey: NDArray[np.uint8], board: Board, corners: NDArray[np.float32]) -> bool:
    """Whether a chessboard's corners were listed from its other end: then the second square of its second row is white.

    corners: (rows - 1, columns - 1, 2) px.
    """
    middles = (corners[:-1, :-1] + corners[1:, :-1] + corners[:-1, 1:] + corners[1:, 1:]) / 4
    x, y = np.clip(middles.round().astype(int), 0, [grey.shape[1] - 1, grey.shape[0] - 1]).transpose(2, 0, 1)
    row, column = np.indices(x.shape)
    even = (row + column) % 2 == 0
    values = grey[y, x].astype(float)
    return bool(values[even].mean() > values[~even].mean())


def _refine(
    grey: NDArray[np.uint8], board: Board, corners: NDArray[np.float32], ids: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Sub-pixel corners in a window as large as the squares allow, so that markers do not enter it."""
    points = corners.reshape(-1, 2)
    at = dict(zip(ids.ravel().tolist(), points, strict=True))
    across = board.columns - 1
    sides = [np.hypot(*(at[c + 1] - p)) for c, p in at.items() if (c + 1) % across and c + 1 in at]
    sides += [np.hypot(*(at[c + across] - p)) for c, p in at.items() if c + across in at]
    if not sides:
        return corners
    gap = (1 - board.marker / board.square) / 2  # between a square's edge and its marker, in squares
    half = int(np.clip(0.9 * gap * float(np.min(sides)), 2, 12))
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 100, 1e-4)
    refined = cv2.cornerSubPix(grey, np.ascontiguousarray(corners), (half, half), (-1, -1), criteria)
    return np.asarray(refined, np.float32)


def _refuse(board: Board, grey: NDArray[np.uint8], count: int, name: str) -> None:
    """Say why there are too few corners."""
    if grey.max() < 40:
        raise RatchetError("calibration.dark", "the picture is nearly black", where=name, fix="add light, or expose it")
    if grey.min() > 215:
        raise RatchetError("calibration.bright", "the picture is nearly white", where=name, fix="expose it less")
    if board.kind == "charuco":
        _, flipped = _find(board, np.ascontiguousarray(grey[:, ::-1]))
        if flipped is not None and len(flipped) >= LEAST:
            raise RatchetError(
                "calibration.mirrored",
                "the board is seen mirrored",
                where=name,
                fix="switch off mirroring in the camera's driver, or state it in the contract",
            )
        seen = _markers(grey, board.dictionary)
        if seen:
            most = (board.columns * board.rows) // 2
            if max(seen) >= most:
                raise RatchetError(
                    "calibration.wrong_board",
                    f"a marker {max(seen)} is seen, this board ends at {most - 1}",
                    where=name,
                    fix="describe the board that you printed",
                )
            if len(seen) >= 6 and count < 4:
                raise RatchetError(
                    "calibration.wrong_board",
                    f"{len(seen)} of its markers are seen, in other places than this board has them",
                    where=name,
                    fix="check the counts of columns and rows",
                )
        else:
            for other in DICTIONARIES:
                if other != board.dictionary and len(_markers(grey, other)) >= 6:
                    raise RatchetError(
                        "calibration.wrong_board", f"its markers are of {other}, not {board.dictionary}", where=name,
                        fix="describe the board that you printed",
                    )  # fmt: skip
    if count:
        raise RatchetError(
            "calibration.few_corners", f"{count} corners, at least {LEAST} are needed", where=name,
            fix="show more of the board, closer or with more light",
        )  # fmt: skip
    raise RatchetError(
        "calibration.no_board", "no board is seen", where=name, fix="show the whole board, sharp and evenly lit"
    )


def _markers(grey: NDArray[np.uint8], dictionary: str) -> list[int]:
    detector = cv2.aruco.ArucoDetector(cv2.aruco.getPredefinedDictionary(DICTIONARIES[dictionary]))
    _, ids, _ = detector.detectMarkers(grey)
    return [] if ids is None else ids.ravel().tolist()
