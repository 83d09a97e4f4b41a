"""Has the camera moved since it was calibrated? The current view against the reference picture, before any motion.

Knows two ways: the board's pose where the board is in both views, else features of the static scene. Knows no session;
whoever starts one asks here and refuses, or lets a person override with a reason.

Features: corners of the reference picture followed into the present one to a fraction of a pixel (Lucas-Kanade), there
and back. The picture is divided into cells; each has the median displacement of its features. A camera that moved by
millimetres leaves hardly a cell where it was; moved objects and a moved arm leave the cells between them, however many
features they have; changed light moves nothing. So a camera has moved where too small a share of the cells stayed, or
where many cells agree on one motion of the whole picture: a move along the axis of view leaves its middle in place. A
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

from agent.errors import RatchetError
from calibration.boards import Board
from calibration.camera_model import CameraModel
from calibration.detection import detect
from calibration.geometry import Float, difference
from calibration.intrinsics import board_pose

LEAST = 30
LEAST_CELLS = 10  # matches, and cells with matches, below which a view says nothing
GRID = (12, 9)  # cells across and down
SMALL = 0.6  # px: matches that moved less have not moved
NEAR = 0.35
NEARER = 0.2  # px, and share of the motion: cells this near to a motion of the picture agree with it
AGREE = 10
AGREE_SHARE = 0.4  # cells, and share of them: fewer agree by chance


@dataclass(frozen=True)
class Drift:
    """moved: whether the camera has moved beyond the threshold. way: how it was measured.

    pixels: displacement of the scene, median over its cells, px. stayed: share of the cells that did not move.
    agreed: px, rms over the picture of the one motion that many cells agree on; 0 where they do not.
    position, rotation: m and rad where the board was seen, else NaN. matches: features compared, or corners of the
    board.
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
    """position: m, rotation: rad: more than either of the board is a move. stayed: without the board, a smaller share
    of cells that stayed is one; moved objects and a moved arm leave a quarter, a moved camera a seventh. agreed: px, so
    is a larger motion that many cells agree on; a camera that stayed shows up to 0.7, one that moved 0.9 and more."""

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
    """Both pictures (H, W, 3) or (H, W) uint8, as raw as each other.

    Args:
        camera, board: where both are given and the board is in both pictures, its pose decides.

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
        seen = _with_board(reference, current, camera, board, threshold)
        if seen is not None:
            return seen
    before, after = matched(reference, current)
    if len(before) < LEAST:
        raise RatchetError(
            "drift.blind",
            f"{len(before)} features match, {LEAST} are needed",
            fix="check lens, light and which camera this is; or show the board",
        )
    size = (reference.shape[1], reference.shape[0])
    places, shifts = _cells(before, after - before, size)
    cells = np.linalg.norm(shifts, axis=1)
    if len(cells) < LEAST_CELLS:
        raise RatchetError(
            "drift.blind",
            f"features match in {len(cells)} of {GRID[0] * GRID[1]} parts of the picture only",
            fix="check lens, light and which camera this is; or show the board",
        )
    stayed = float((cells < SMALL).mean())
    pixels = float(np.median(cells))
    agreed = _agreed(places / max(size), shifts)
    moved = stayed < threshold.stayed or agreed > threshold.agreed
    return Drift(moved, "features", pixels, stayed, float("nan"), float("nan"), len(before), agreed)


def matched(reference: NDArray[np.uint8], current: NDArray[np.uint8]) -> tuple[Float, Float]:
    """(n, 2) px in both pictures of features that are found again, there and back."""
    a = _flat(reference)
    b = _flat(current)
    corners = cv2.goodFeaturesToTrack(a, 4000, 0.002, 5, blockSize=7)
    if corners is None:
        return np.zeros((0, 2)), np.zeros((0, 2))
    settings: dict[str, Any] = {"winSize": (25, 25), "maxLevel": 3,
                "criteria": (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 40, 1e-3)}  # fmt: skip
    after, good, _ = cv2.calcOpticalFlowPyrLK(a, b, corners, None, **settings)
    again, returned, _ = cv2.calcOpticalFlowPyrLK(b, a, after, None, **settings)
    keep = good.ravel().astype(bool) & returned.ravel().astype(bool)
    keep &= np.linalg.norm((again - corners).reshape(-1, 2), axis=1) < 0.3
    return corners.reshape(-1, 2)[keep].astype(float), after.reshape(-1, 2)[keep].astype(float)


def averaged(frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The mean of a few frames of a scene that stands still: less noise, same place."""
    return np.asarray(np.mean(np.stack(frames).astype(np.float32), axis=0).round(), np.uint8)


def picture(reference: NDArray[np.uint8], current: NDArray[np.uint8], drift: Drift) -> NDArray[np.uint8]:
    """(H, 2 W, 3) uint8 RGB for a person: now with arrows from then to now, and both laid over each other (then in
    red, now in cyan: what has not moved is grey)."""
    a = _grey(reference)
    b = _grey(current)
    left = cv2.cvtColor(b, cv2.COLOR_GRAY2RGB)
    before, after = matched(reference, current)
    for p, q in zip(before, after, strict=True):
        far = np.linalg.norm(q - p) > SMALL
        tip = p + 8 * (q - p)  # eight times as long as it is, or nobody would see half a pixel
        colour = (230, 60, 40) if far else (60, 170, 90)
        cv2.line(left, tuple(int(x) for x in p), tuple(int(x) for x in tip), colour, 1, cv2.LINE_AA)
    right = np.dstack([a, b, b])
    return np.ascontiguousarray(np.concatenate([left, right], 1))


def _with_board(
    reference: NDArray[np.uint8], current: NDArray[np.uint8], camera: CameraModel, board: Board, threshold: Threshold
) -> Drift | None:
    try:
        then = detect(board, reference)
        now = detect(board, current)
    except RatchetError:
        return None
    shared = np.intersect1d(then.ids, now.ids)
    apart = difference(board_pose(board, camera, then), board_pose(board, camera, now))
    position = float(np.linalg.norm(apart[3:]))
    rotation = float(np.linalg.norm(apart[:3]))
    a = then.points[np.isin(then.ids, shared)]
    b = now.points[np.isin(now.ids, shared)]
    pixels = float(np.median(np.linalg.norm(a - b, axis=1))) if len(shared) else float("nan")
    moved = position > threshold.position or rotation > threshold.rotation
    return Drift(moved, "board", pixels, float(not moved), position, rotation, len(shared))


def _agreed(places: Float, shifts: Float) -> float:
    """px, rms over the picture of the affine motion that most cells agree on: sampled over pairs of cells, then fitted
    to all that agree. places: (c, 2) in widths of the picture. shifts: (c, 2) px."""
    generator = np.random.default_rng(0)
    design = _affine(places)

    def agreeing(motion: Float) -> NDArray[np.bool_]:
        wanted = (design @ motion).reshape(-1, 2)
        room = NEAR + NEARER * np.linalg.norm(wanted, axis=1)
        return np.asarray(np.linalg.norm(shifts - wanted, axis=1) < room, bool)

    best: Float = np.zeros(6)
    inside = agreeing(best)
    for _ in range(500):
        i, j = generator.choice(len(places), 2, replace=False)
        if np.linalg.norm(places[i] - places[j]) < 0.15:
            continue
        # The similarity that takes both cells where they went, in complex numbers: shift + factor * place.
        a, b, u, v = (complex(*p) for p in (places[i], places[j], shifts[i], shifts[j]))
        factor = (v - u) / (b - a)
        shift = u - factor * a
        motion = np.array([shift.real, factor.real, -factor.imag, shift.imag, factor.imag, factor.real])
        found = agreeing(motion)
        if found.sum() > inside.sum():
            best = motion
            inside = found
    for _ in range(6):
        if inside.sum() < AGREE:
            return 0.0
        best = np.asarray(np.linalg.lstsq(design[np.repeat(inside, 2)], shifts[inside].ravel(), rcond=None)[0], float)
        inside = agreeing(best)
    if inside.sum() < max(AGREE, AGREE_SHARE * len(places)):
        return 0.0
    x, y = np.meshgrid(np.linspace(0, 1, 16), np.linspace(0, places[:, 1].max(), 12))
    flow = (_affine(np.stack([x.ravel(), y.ravel()], 1)) @ best).reshape(-1, 2)
    return float(np.sqrt((flow**2).sum(1).mean()))


def _affine(places: Float) -> Float:
    """(2 c, 6): shifts by the parameters [a b c d e f] of u = a + b x + c y, v = d + e x + f y."""
    row = np.column_stack([np.ones(len(places)), places])
    out = np.zeros((len(places), 2, 6))
    out[:, 0, :3] = row
    out[:, 1, 3:] = row
    return out.reshape(-1, 6)


def _cells(points: Float, shifts: Float, size: tuple[int, int]) -> tuple[Float, Float]:
    """(c, 2) px each: where the features of each cell are, and how far they moved, for cells with at least three.
    points, shifts: (n, 2) px."""
    at = np.clip((points * GRID / np.array(size)).astype(int), 0, np.array(GRID) - 1)
    index = at[:, 1] * GRID[0] + at[:, 0]
    full = [cell for cell in np.unique(index) if (index == cell).sum() >= 3]
    places = np.array([points[index == cell].mean(0) for cell in full]).reshape(-1, 2)
    return places, np.array([np.median(shifts[index == cell], axis=0) for cell in full]).reshape(-1, 2)


def _grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image.ndim == 3:
        return np.asarray(cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_RGB2GRAY), np.uint8)
    return image


def _flat(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey with local contrast evened out, so that shadows and brightness do not count."""
    return np.asarray(cv2.createCLAHE(3.0, (8, 8)).apply(_grey(image)), np.uint8)
