"""Camera checks: identity, orientation, exposure, frame rate, latency and depth scale against the contract.

Knows images, their times and a board. Knows no device: the caller hands over frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import detect
from ratchet_calibration.cameras.intrinsics import board_pose
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.signals import Lag, lag
from ratchet_vla.contract import CameraSpec
from ratchet_vla.errors import RatchetError

Frames = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class Orientation:
    """How a raw image must be turned to be upright.

    Attributes:
        rotate: degrees counter-clockwise that turn the raw image upright.
        mirror: whether it must then be flipped.
    """

    rotate: int
    mirror: bool


@dataclass(frozen=True)
class Exposure:
    """Brightness of a few frames.

    Attributes:
        mean: grey level.
        dark, bright: share of pixels at either end.
    """

    mean: float
    dark: float
    bright: float

    @property
    def problem(self) -> str:
        """In words; empty where the image is well exposed."""
        # The worst problem first: a saturated image also has a high mean.
        if self.bright > 0.2:
            return f"{self.bright:.0%} of the image is white"
        if self.dark > 0.5:
            return f"{self.dark:.0%} of the image is black"
        return "" if 40 <= self.mean <= 220 else f"the mean grey level is {self.mean:.0f} of 255"


@dataclass(frozen=True)
class Rate:
    """Timing of a series of frames.

    Attributes:
        fps: median.
        longest: s, between two frames.
        repeated: frames that are the same as the one before.
    """

    fps: float
    longest: float
    repeated: int


def waved_at(frames: Mapping[str, Frames]) -> str:
    """Which camera a person waved in front of: the one whose image changes most.

    Raises:
        RatchetError: check.no_motion; check.ambiguous where two see it.
    """
    moving_share = {}
    for camera, camera_frames in frames.items():
        small_frames = [np.asarray(frame[::4, ::4], float).mean(-1) for frame in camera_frames]
        differences = [np.abs(later - earlier) for earlier, later in pairwise(small_frames)]
        # The share of the image that changes by more than noise does, so that a flickering lamp does not win.
        moving_share[camera] = 0.0
        if differences:
            moving_share[camera] = float(np.mean([(difference > 15).mean() for difference in differences]))
    ranked = sorted(moving_share, key=lambda camera: moving_share[camera], reverse=True)
    if not ranked or moving_share[ranked[0]] < 0.02:
        raise RatchetError("check.no_motion", "no camera sees anything move", fix="wave closer to the lens")
    # Two cameras may see the same hand; only a clear winner identifies one.
    if len(ranked) > 1 and moving_share[ranked[0]] < 2.5 * moving_share[ranked[1]]:
        raise RatchetError(
            "check.ambiguous", f"{ranked[0]} and {ranked[1]} both see it", fix="cover the lens with the waving hand"
        )
    return ranked[0]


def require_identity(expected: CameraSpec, observed_camera: str) -> None:
    """Raises RatchetError check.swapped_camera where another camera saw the waving hand."""
    if observed_camera != expected.name:
        raise RatchetError(
            "check.swapped_camera",
            f"the hand was waved in front of {expected.name}, {observed_camera} saw it",
            where=expected.name,
            fix=f"exchange the sources of {expected.name} and {observed_camera} in the contract, by serial",
        )


def orientation(board: Board, raw: NDArray[np.uint8]) -> Orientation:
    """How a raw image of a board that is held upright, its printed text to be read, must be turned.

    Raises:
        RatchetError: what `detect` refuses, but not calibration.mirrored.
    """
    if board.kind != "charuco":
        raise RatchetError("check.needs_charuco", "a chessboard looks the same upside down", fix="use a ChArUco board")
    mirrored = False
    try:
        detection = detect(board, raw)
        points = detection.points
    except RatchetError as error:
        if error.code != "calibration.mirrored":
            raise
        mirrored = True
        detection = detect(board, np.ascontiguousarray(raw[:, ::-1]))
        points = np.stack([raw.shape[1] - 1 - detection.points[:, 0], detection.points[:, 1]], 1)
    # Both point sets about their mean: the affine map between them is then a 2 x 2 matrix.
    board_xy = board.corners[detection.ids, :2] - board.corners[detection.ids, :2].mean(0)
    image_xy = points - points.mean(0)
    board_axes = np.linalg.lstsq(board_xy, image_xy, rcond=None)[
        0
    ]  # rows: where the board's x and y point in the image
    # Upright after the turn, before the flip, a mirrored board's x points left.
    board_x = -board_axes[0] if mirrored else board_axes[0]
    angle_deg = np.degrees(np.arctan2(board_x[1], board_x[0]))  # clockwise in the image, y is down
    return Orientation(round(angle_deg / 90.0) % 4 * 90, mirrored)


def require_orientation(spec: CameraSpec, measured: Orientation) -> None:
    """Raises RatchetError check.orientation where the contract says otherwise."""
    if (spec.rotate, spec.mirror) != (measured.rotate, measured.mirror):
        correction = f"rotate {measured.rotate}" + (", mirror true" if measured.mirror else ", mirror false")
        raise RatchetError(
            "check.orientation",
            f"the image needs {correction}; the contract says rotate {spec.rotate}, mirror {str(spec.mirror).lower()}",
            where=spec.name,
            fix="correct the contract, or turn the camera",
        )


def exposure(frames: Frames) -> Exposure:
    """Exposure over a few frames, (H, W, 3) uint8 each."""
    grey = np.stack([np.asarray(frame, float).mean(-1) for frame in frames])
    return Exposure(float(grey.mean()), float((grey < 8).mean()), float((grey > 247).mean()))


def rate(stamps: Sequence[float], frames: Frames) -> Rate:
    """Frame rate, longest gap and repeated frames. stamps: s, when each frame was taken.

    Raises:
        RatchetError: check.few_frames; check.time_backwards.
    """
    # The median of fewer gaps says little of the rate.
    if len(stamps) < 10:
        raise RatchetError("check.few_frames", f"{len(stamps)} frames only", fix="check the cable and the driver")
    gaps_s = np.diff(np.asarray(stamps, float))
    if (gaps_s <= 0).any():
        raise RatchetError("check.time_backwards", "a frame is older than the one before it", fix="check the driver")
    repeated = sum(bool(np.array_equal(earlier, later)) for earlier, later in pairwise(frames))
    return Rate(float(1 / np.median(gaps_s)), float(gaps_s.max()), repeated)


def latency(times: Sequence[float], shown: Sequence[float], stamps: Sequence[float], frames: Frames) -> Lag:
    """Latency of a camera, from a screen that shows a random pattern of black and white.

    Args:
        times, shown: s and brightness of the screen. stamps: s, when each frame was handed over.

    Raises:
        RatchetError: what `signals.lag` refuses.
    """
    # Every fourth pixel each way: a sixteenth of the memory, and the blinking part is far larger.
    grey_frames = np.stack([np.asarray(frame[::4, ::4], float).mean(-1) for frame in frames])
    blinking_pixels = np.argsort(grey_frames.std(0).ravel())[
        -max(20, grey_frames[0].size // 50) :
    ]  # the part of the image that blinks
    return lag(times, shown, stamps, grey_frames.reshape(len(grey_frames), -1)[:, blinking_pixels].mean(1))


def depth_scale(board: Board, camera: CameraModel, image: NDArray[np.uint8], depth: NDArray[np.float64]) -> float:
    """Measured over true distance of a board, from its corners' own depth; 1.0 where depth is true.

    Args:
        depth: (H, W) m, aligned to the image, 0 where there is none.

    Raises:
        RatchetError: what `detect` refuses; check.no_depth.
    """
    detection = detect(board, image)
    board_in_camera = board_pose(board, camera, detection)
    # (n,) m: depth of each corner by the pose that the image alone gives.
    expected_depth = (board.corners[detection.ids] @ board_in_camera[:3, :3].T + board_in_camera[:3, 3])[:, 2]
    pixels = detection.points.round().astype(int)
    in_image = (pixels >= 0).all(1) & (pixels[:, 0] < depth.shape[1]) & (pixels[:, 1] < depth.shape[0])
    measured_depth = depth[pixels[in_image, 1], pixels[in_image, 0]]
    # 0 is how depth cameras mark pixels without a measurement.
    has_depth = measured_depth > 0
    if has_depth.sum() < 6:
        raise RatchetError(
            "check.no_depth",
            f"depth at {has_depth.sum()} of {len(pixels)} corners",
            fix="hold the board 0.3 to 1 m away",
        )
    # The median: a corner at the board's edge may read the depth of the background.
    return float(np.median(measured_depth[has_depth] / expected_depth[in_image][has_depth]))
