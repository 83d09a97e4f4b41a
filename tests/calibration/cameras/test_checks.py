"""Swapped, turned or stale cameras look fine to a person and ruin a policy.

Pinned: the waved-at camera is named, and nobody is where two or none see it; every rotation and mirroring is read from
one image of the board; white and black images, repeated and late frames are told; a lag is measured to a fraction
of a sample; a wrong depth scale is measured. Determinism: seeded images and signals.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ratchet_calibration import signals
from ratchet_calibration.boards.board import Board
from ratchet_calibration.cameras import checks as camera_checks
from ratchet_vla.contract import CameraSpec
from ratchet_vla.errors import RatchetError
from tests.calibration.scenes import BOARD, CAMERA, drawn, pose


def frames(motion: float, count: int = 12, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Noise, and a hand that covers this share of the image every other frame."""
    generator = np.random.default_rng(seed)
    frame_list = []
    for k in range(count):
        image = np.full((120, 160, 3), 100.0) + generator.normal(0, 2, (120, 160, 3))
        if k % 2 and motion:
            image[:, : int(160 * motion)] = 210
        frame_list.append(image.clip(0, 255).astype(np.uint8))
    return frame_list


def test_the_camera_that_sees_the_hand_is_named() -> None:
    assert camera_checks.waved_at({"front": frames(0.0), "wrist": frames(0.5, seed=1)}) == "wrist"
    with pytest.raises(RatchetError, match=r"check\.no_motion"):
        camera_checks.waved_at({"front": frames(0.0), "wrist": frames(0.0, seed=1)})
    with pytest.raises(RatchetError, match=r"check\.ambiguous"):
        camera_checks.waved_at({"front": frames(0.5), "wrist": frames(0.4, seed=1)})


def test_exchanged_cameras_are_refused() -> None:
    camera_checks.require_identity(CameraSpec("front", 64, 48), "front")
    with pytest.raises(RatchetError, match=r"check\.swapped_camera.*wrist saw it"):
        camera_checks.require_identity(CameraSpec("front", 64, 48), "wrist")


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_orientation_is_read_from_one_image(rotate: int, mirror: bool) -> None:
    """The raw image is what, turned by `rotate` and then flipped where `mirror`, comes out upright."""
    upright = drawn(BOARD, pose((0.1, 0.1, 0.05), (0, 0, 0.45)))
    raw = np.ascontiguousarray(np.rot90(upright[:, ::-1] if mirror else upright, -rotate // 90))
    spec = CameraSpec("front", 640, 480, rotate=rotate, mirror=mirror)  # type: ignore[arg-type]
    measured = camera_checks.orientation(BOARD, raw)
    back = np.rot90(raw, measured.rotate // 90)
    np.testing.assert_array_equal(back[:, ::-1] if measured.mirror else back, upright)
    camera_checks.require_orientation(spec, measured)
    with pytest.raises(RatchetError, match=r"check\.orientation"):
        camera_checks.require_orientation(CameraSpec("front", 640, 480, rotate=rotate, mirror=not mirror), measured)  # type: ignore[arg-type]


def test_a_chessboard_has_no_upside() -> None:
    with pytest.raises(RatchetError, match=r"check\.needs_charuco"):
        camera_checks.orientation(Board("chessboard", marker=0.0), drawn(BOARD, pose()))


@pytest.mark.parametrize(
    ("level", "word"), [(128, ""), (252, "white"), (2, "black"), (25, "grey level"), (235, "grey level")]
)
def test_exposure_is_put_in_words(level: int, word: str) -> None:
    problem = camera_checks.exposure([np.full((48, 64, 3), level, np.uint8)] * 3).problem
    assert word in problem if word else problem == ""


def test_rate_counts_gaps_and_repeats() -> None:
    stamps = [k / 30 for k in range(20)]
    stamps[15:] = [s + 0.2 for s in stamps[15:]]
    images = frames(0.3, 20)
    images[8] = images[7]
    rate = camera_checks.rate(stamps, images)
    assert rate.fps == pytest.approx(30)
    assert rate.longest == pytest.approx(0.2 + 1 / 30)
    assert rate.repeated == 1
    with pytest.raises(RatchetError, match=r"check\.few_frames"):
        camera_checks.rate(stamps[:5], images[:5])
    with pytest.raises(RatchetError, match=r"check\.time_backwards"):
        camera_checks.rate([*stamps[:-1], 0.0], images)


@settings(max_examples=20, deadline=None)
@given(delay=st.floats(0.0, 0.3), sign=st.sampled_from([1.0, -1.0]), seed=st.integers(0, 100))
def test_a_lag_is_measured(delay: float, sign: float, seed: int) -> None:
    times = np.arange(0, 4, 1 / 30)
    knots = np.random.default_rng(seed).normal(size=40)
    signal = np.interp(times, np.linspace(-1, 5, 40), knots)
    later_times = np.arange(0.01, 4, 1 / 25)
    later = sign * np.interp(later_times - delay, np.linspace(-1, 5, 40), knots)
    measured = signals.lag(times, signal, later_times, later, 0.5)  # type: ignore[arg-type]
    assert measured.seconds == pytest.approx(delay, abs=0.012)
    assert np.sign(measured.correlation) == sign


def test_signals_that_say_nothing_are_refused() -> None:
    times = list(np.arange(0, 2, 0.05))
    generator = np.random.default_rng(0)
    with pytest.raises(RatchetError, match=r"check\.no_signal"):
        signals.lag(times, [1.0] * 40, times, list(generator.normal(size=40)))
    long = list(np.arange(0, 20, 0.05))
    with pytest.raises(RatchetError, match=r"check\.no_lag"):
        signals.lag(long, list(generator.normal(size=400)), long, list(generator.normal(size=400)))


def test_latency_of_a_blinking_screen() -> None:
    generator = np.random.default_rng(1)
    switches = np.repeat(generator.integers(0, 2, 20), 6)
    times = np.arange(len(switches)) / 60
    stamps = np.arange(0, times[-1], 1 / 30)
    images = []
    for stamp in stamps:
        lit = switches[max(int((stamp - 0.08) * 60), 0)]
        image = np.full((120, 160, 3), 90.0) + generator.normal(0, 2, (120, 160, 3))
        image[40:80, 60:110] = 230 if lit else 20
        images.append(image.clip(0, 255).astype(np.uint8))
    measured = camera_checks.latency(list(times), list(switches.astype(float)), list(stamps), images)
    assert measured.seconds == pytest.approx(0.08, abs=0.017)


def test_depth_scale_is_measured() -> None:
    board_in_camera = pose((0.3, 0.2, 0.0))
    y, x = np.mgrid[:480, :640]
    rays = np.stack([(x - CAMERA.cx) / CAMERA.fx, (y - CAMERA.cy) / CAMERA.fy, np.ones_like(x, float)], -1)
    normal = board_in_camera[:3, 2]
    point = board_in_camera[:3, 3]
    depth = (normal @ point) / (rays @ normal)
    image = drawn(BOARD, board_in_camera)
    assert camera_checks.depth_scale(BOARD, CAMERA, image, depth) == pytest.approx(1.0, abs=2e-3)
    assert camera_checks.depth_scale(BOARD, CAMERA, image, 1.03 * depth) == pytest.approx(1.03, abs=2e-3)
    with pytest.raises(RatchetError, match=r"check\.no_depth"):
        camera_checks.depth_scale(BOARD, CAMERA, image, 0 * depth)
