"""Is this the camera that the contract means, the right way up, exposed, in time, and with true depth?

Knows pictures, their times and a board. Knows no device: whoever runs a check hands over frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from agent.contract import CameraSpec
from agent.errors import RatchetError
from calibration.boards import Board
from calibration.camera_model import CameraModel
from calibration.detection import detect
from calibration.intrinsics import board_pose
from calibration.signals import Lag, lag

Frames = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class Orientation:
    """rotate: degrees counter-clockwise that turn the raw picture upright. mirror: whether it must then be flipped."""

    rotate: int
    mirror: bool


@dataclass(frozen=True)
class Exposure:
    """mean: grey level. dark, bright: share of pixels at either end."""

    mean: float
    dark: float
    bright: float

    @property
    def problem(self) -> str:
        """In words; empty where the picture is well exposed."""
        if self.bright > 0.2:
            return f"{self.bright:.0%} of the picture is white"
        if self.dark > 0.5:
            return f"{self.dark:.0%} of the picture is black"
        return "" if 40 <= self.mean <= 220 else f"the mean grey level is {self.mean:.0f} of 255"


@dataclass(frozen=True)
class Rate:
    """fps: median. longest: s, between two frames. repeated: frames that are the same as the one before."""

    fps: float
    longest: float
    repeated: int


def waved_at(frames: Mapping[str, Frames]) -> str:
    """Which camera a person waved in front of: the one whose picture changes most.

    Raises:
        RatchetError: check.no_motion; check.ambiguous where two see it.
    """
    motion = {}
    for name, series in frames.items():
        small = [np.asarray(f[::4, ::4], float).mean(-1) for f in series]
        steps = [np.abs(b - a) for a, b in pairwise(small)]
        # The share of the picture that changes by more than noise does, so that a flickering lamp does not win.
        motion[name] = float(np.mean([(s > 15).mean() for s in steps])) if steps else 0.0
    ranked = sorted(motion, key=lambda n: motion[n], reverse=True)
    if not ranked or motion[ranked[0]] < 0.02:
        raise RatchetError("check.no_motion", "no camera sees anything move", fix="wave closer to the lens")
    if len(ranked) > 1 and motion[ranked[0]] < 2.5 * motion[ranked[1]]:
        raise RatchetError(
            "check.ambiguous", f"{ranked[0]} and {ranked[1]} both see it", fix="cover the lens with the waving hand"
        )
    return ranked[0]


def require_identity(wanted: CameraSpec, seen: str) -> None:
    """Raises RatchetError check.swapped_camera where another camera saw the waving hand."""
    if seen != wanted.name:
        raise RatchetError(
            "check.swapped_camera",
            f"the hand was waved in front of {wanted.name}, {seen} saw it",
            where=wanted.name,
            fix=f"exchange the sources of {wanted.name} and {seen} in the contract, by serial",
        )


def orientation(board: Board, raw: NDArray[np.uint8]) -> Orientation:
    """How a raw picture of a board that is held upright, its printed text to be read, must be turned.

    Raises:
        RatchetError: what `detect` refuses, but not calibration.mirrored.
    """
    if board.kind != "charuco":
        raise RatchetError("check.needs_charuco", "a chessboard looks the same upside down", fix="use a ChArUco board")
    mirror = False
    try:
        found = detect(board, raw)
        points = found.points
    except RatchetError as error:
        if error.code != "calibration.mirrored":
            raise
        mirror = True
        found = detect(board, np.ascontiguousarray(raw[:, ::-1]))
        points = np.stack([raw.shape[1] - 1 - found.points[:, 0], found.points[:, 1]], 1)
    flat = board.corners[found.ids, :2] - board.corners[found.ids, :2].mean(0)
    seen = points - points.mean(0)
    along = np.linalg.lstsq(flat, seen, rcond=None)[0]  # rows: where the board's x and y point in the picture
    # Upright after the turn, before the flip, a mirrored board's x points left.
    x = -along[0] if mirror else along[0]
    angle = np.degrees(np.arctan2(x[1], x[0]))  # clockwise in the picture, y is down
    return Orientation(round(angle / 90.0) % 4 * 90, mirror)


def require_orientation(spec: CameraSpec, found: Orientation) -> None:
    """Raises RatchetError check.orientation where the contract says otherwise."""
    if (spec.rotate, spec.mirror) != (found.rotate, found.mirror):
        words = f"rotate {found.rotate}" + (", mirror true" if found.mirror else ", mirror false")
        raise RatchetError(
            "check.orientation",
            f"the picture needs {words}; the contract says rotate {spec.rotate}, mirror {str(spec.mirror).lower()}",
            where=spec.name,
            fix="correct the contract, or turn the camera",
        )


def exposure(frames: Frames) -> Exposure:
    """Over a few frames."""
    grey = np.stack([np.asarray(f, float).mean(-1) for f in frames])
    return Exposure(float(grey.mean()), float((grey < 8).mean()), float((grey > 247).mean()))


def rate(stamps: Sequence[float], frames: Frames) -> Rate:
    """stamps: s, when each frame was taken.

    Raises:
        RatchetError: check.few_frames; check.time_backwards.
    """
    if len(stamps) < 10:
        raise RatchetError("check.few_frames", f"{len(stamps)} frames only", fix="check the cable and the driver")
    gaps = np.diff(np.asarray(stamps, float))
    if (gaps <= 0).any():
        raise RatchetError("check.time_backwards", "a frame is older than the one before it", fix="check the driver")
    repeated = sum(bool(np.array_equal(a, b)) for a, b in pairwise(frames))
    return Rate(float(1 / np.median(gaps)), float(gaps.max()), repeated)


def latency(times: Sequence[float], shown: Sequence[float], stamps: Sequence[float], frames: Frames) -> Lag:
    """How late a camera sees a light: a screen that shows a random pattern of black and white.

    Args:
        times, shown: s and brightness of the screen. stamps: s, when each frame was handed over.

    Raises:
        RatchetError: what `signals.lag` refuses.
    """
    grey = np.stack([np.asarray(f[::4, ::4], float).mean(-1) for f in frames])
    lit = np.argsort(grey.std(0).ravel())[-max(20, grey[0].size // 50) :]  # the part of the picture that blinks
    return lag(times, shown, stamps, grey.reshape(len(grey), -1)[:, lit].mean(1))


def depth_scale(board: Board, camera: CameraModel, image: NDArray[np.uint8], depth: NDArray[np.float64]) -> float:
    """Measured over true distance of a board, from its corners' own depth; 1.0 where depth is true.

    Args:
        depth: (H, W) m, aligned to the picture, 0 where there is none.

    Raises:
        RatchetError: what `detect` refuses; check.no_depth.
    """
    found = detect(board, image)
    pose = board_pose(board, camera, found)
    wanted = (board.corners[found.ids] @ pose[:3, :3].T + pose[:3, 3])[:, 2]
    at = found.points.round().astype(int)
    inside = (at >= 0).all(1) & (at[:, 0] < depth.shape[1]) & (at[:, 1] < depth.shape[0])
    got = depth[at[inside, 1], at[inside, 0]]
    there = got > 0
    if there.sum() < 6:
        raise RatchetError(
            "check.no_depth", f"depth at {there.sum()} of {len(at)} corners", fix="hold the board 0.3 to 1 m away"
        )
    return float(np.median(got[there] / wanted[inside][there]))
