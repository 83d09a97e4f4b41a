"""Has the camera moved since it was calibrated? The current view against the reference picture, before any motion.

Knows two ways: the board's pose where the board is in both views, else features of the static scene. Knows no session;
whoever starts one asks here and refuses, or lets a person override with a reason.

Features: SIFT, matched both ways, then placed to a fraction of a pixel. The displacement that most of them agree on is
fitted as a homography (what a turn of the camera does, and nearly what a small move does to a table): things that were
moved are outliers of that fit, and changed light changes no geometry. A relative pose by the five-point method would
be too free for moves of millimetres.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.errors import RatchetError
from calibration.boards import Board
from calibration.camera_model import CameraModel
from calibration.detection import detect
from calibration.geometry import Float, difference
from calibration.intrinsics import board_pose

LEAST = 25  # matches that agree, below which a view says nothing
SMALL = 0.6  # px: matches that moved less have not moved


@dataclass(frozen=True)
class Drift:
    """moved: whether the camera has moved beyond the threshold. way: how it was measured.

    pixels: displacement of the static scene, 75th percentile, px. share: of the matches that did not stay.
    position, rotation: m and rad where the board was seen, else NaN. matches: features compared, or corners of the
    board.
    """

    moved: bool
    way: Literal["board", "features"]
    pixels: float
    share: float
    position: float
    rotation: float
    matches: int


@dataclass(frozen=True)
class Threshold:
    """Beyond any of these the camera has moved. position: m, rotation: rad, both with the board; pixels: without."""

    position: float = 0.003
    rotation: float = float(np.radians(0.3))
    pixels: float = 0.9


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
    fitted, agreeing = _common_motion(before, after)
    if agreeing < LEAST:
        raise RatchetError(
            "drift.blind",
            f"only {agreeing} of {len(before)} matching features moved alike, {LEAST} are needed",
            fix="check which camera this is; or show the board",
        )
    # The quarter that moves most: a turn about the optical axis leaves the middle of the picture where it was.
    pixels = float(np.percentile(np.linalg.norm(fitted, axis=1), 75))
    share = float((np.linalg.norm(after - before, axis=1) > SMALL).mean())
    return Drift(pixels > threshold.pixels, "features", pixels, share, float("nan"), float("nan"), len(before))


def matched(reference: NDArray[np.uint8], current: NDArray[np.uint8]) -> tuple[Float, Float]:
    """(n, 2) px in both pictures of features that match, each the other's best by a clear margin, then placed to a
    fraction of a pixel by their own neighbourhoods (Lucas-Kanade)."""
    a, b = _flat(reference), _flat(current)
    sift = cv2.SIFT_create(nfeatures=3000, contrastThreshold=0.015)
    ka, da = sift.detectAndCompute(a, None)
    kb, db = sift.detectAndCompute(b, None)
    if da is None or db is None or len(ka) < 2 or len(kb) < 2:
        return np.zeros((0, 2)), np.zeros((0, 2))
    matcher = cv2.BFMatcher(cv2.NORM_L2)
    forth = [m[0] for m in matcher.knnMatch(da, db, k=2) if len(m) == 2 and m[0].distance < 0.8 * m[1].distance]
    back = {m[0].queryIdx: m[0].trainIdx for m in matcher.knnMatch(db, da, k=1) if m}
    pairs = [(m.queryIdx, m.trainIdx) for m in forth if back.get(m.trainIdx) == m.queryIdx]
    if not pairs:
        return np.zeros((0, 2)), np.zeros((0, 2))
    before = np.array([ka[i].pt for i, _ in pairs], np.float32)
    guess = np.array([kb[j].pt for _, j in pairs], np.float32)
    size = max(a.shape)
    near = np.linalg.norm(guess - before, axis=1) < 0.2 * size
    before, guess = before[near], guess[near]
    if not len(before):
        return np.zeros((0, 2)), np.zeros((0, 2))
    _, unique = np.unique(np.round(before, 1), axis=0, return_index=True)  # one point may have several orientations
    before, guess = before[unique], guess[unique]
    window = {"winSize": (15, 15), "maxLevel": 0, "flags": cv2.OPTFLOW_USE_INITIAL_FLOW,
              "criteria": (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 40, 1e-3)}  # fmt: skip
    shaped = before.reshape(-1, 1, 2)
    after, good, _ = cv2.calcOpticalFlowPyrLK(a, b, shaped, guess.reshape(-1, 1, 2).copy(), **window)
    again, returned, _ = cv2.calcOpticalFlowPyrLK(b, a, after, shaped.copy(), **window)
    there = np.linalg.norm((again - shaped).reshape(-1, 2), axis=1) < 0.3
    keep = good.ravel().astype(bool) & returned.ravel().astype(bool) & there
    keep &= np.linalg.norm(after.reshape(-1, 2) - guess, axis=1) < 3.0
    return before[keep].astype(float), after.reshape(-1, 2)[keep].astype(float)


def picture(reference: NDArray[np.uint8], current: NDArray[np.uint8], drift: Drift) -> NDArray[np.uint8]:
    """(H, 2 W, 3) uint8 RGB for a person: now with arrows from then to now, and both laid over each other (then in
    red, now in cyan: what has not moved is grey)."""
    a, b = _grey(reference), _grey(current)
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
        then, now = detect(board, reference), detect(board, current)
    except RatchetError:
        return None
    shared = np.intersect1d(then.ids, now.ids)
    apart = difference(board_pose(board, camera, then), board_pose(board, camera, now))
    position, rotation = float(np.linalg.norm(apart[3:])), float(np.linalg.norm(apart[:3]))
    a = then.points[np.isin(then.ids, shared)]
    b = now.points[np.isin(now.ids, shared)]
    pixels = float(np.median(np.linalg.norm(a - b, axis=1))) if len(shared) else float("nan")
    moved = position > threshold.position or rotation > threshold.rotation
    return Drift(moved, "board", pixels, float(moved), position, rotation, len(shared))


def _common_motion(before: Float, after: Float) -> tuple[Float, int]:
    """(n, 2) px: the displacement at every match by the homography that most matches agree on, and how many do."""
    homography, inside = cv2.findHomography(before, after, cv2.USAC_MAGSAC, 0.5, maxIters=5000, confidence=0.9999)
    if homography is None:
        return after - before, 0
    moved = cv2.perspectiveTransform(before.reshape(-1, 1, 2), homography).reshape(-1, 2)
    return np.asarray(moved - before, float), int(inside.sum())


def _grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image.ndim == 3:
        return np.asarray(cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_RGB2GRAY), np.uint8)
    return image


def _flat(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey with local contrast evened out, so that shadows and brightness do not count."""
    return np.asarray(cv2.createCLAHE(3.0, (8, 8)).apply(_grey(image)), np.uint8)
