"""A camera that moved makes a policy fail silently; a false alarm makes people switch the check off.

Pinned: a moved camera is caught by the board and without it, moved objects and other light are not; the image of the
difference has a size and is not empty; a session starts only on a recent check that found the camera in place, or on an
override with a reason and a name. The rates are measured by benchmarks/calibration/drift.py. Determinism: seeded
textures.
"""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from ratchet_calibration.cameras import drift
from ratchet_calibration.store import last_check
from ratchet_calibration.store.folder import CalibrationStore
from ratchet_calibration.store.last_check import FILE, Check
from ratchet_calibration.store.record import Calibration
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.testing.fake_contract import arm
from tests.calibration.scenes import BOARD, CAMERA, drawn, pose

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
CALIBRATION = Calibration("front", dataclasses.replace(CAMERA, width=8, height=8), BOARD, "2026-01-02", 0.1, 0.1, 20)


def scene(shift: float = 0.0, turn: float = 0.0, objects: int = 0, light: float = 1.0) -> NDArray[np.uint8]:
    """640 x 480 of random texture with four objects. shift: px. turn: degrees about the middle. objects: where."""
    generator = np.random.default_rng(0)
    texture = cv2.GaussianBlur(generator.uniform(60, 200, (600, 800)), (0, 0), 2.0)
    texture = 128 + 4 * (texture - texture.mean())
    placed = np.random.default_rng(objects)
    for k in range(4):
        x = placed.integers(100, 620)
        y = placed.integers(90, 430)
        patch = np.random.default_rng(100 + k).uniform(40, 220, (70, 70))
        texture[y : y + 70, x : x + 70] = cv2.GaussianBlur(patch, (0, 0), 1.5)
    matrix = cv2.getRotationMatrix2D((400, 300), turn, 1.0)
    matrix[:, 2] += [shift - 80, -60]
    image = cv2.warpAffine(texture, matrix, (640, 480), flags=cv2.INTER_CUBIC)
    shade = light * np.linspace(1.0, 0.8 if light != 1.0 else 1.0, 640)
    noise = np.random.default_rng(objects + 7).normal(0, 1.0, image.shape)
    return np.repeat((image * shade + noise).round().clip(0, 255).astype(np.uint8)[..., None], 3, 2)


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ({}, False),
        ({"objects": 3}, False),
        ({"light": 0.7}, False),
        ({"objects": 5, "light": 1.15}, False),
        ({"shift": 2.0}, True),
        ({"turn": 0.5}, True),
        ({"shift": 2.0, "objects": 3, "light": 0.8}, True),
        ({"shift": 12.0}, True),
    ],
    ids=str,
)
def test_a_moved_camera_is_noticed_and_nothing_else(change: dict[str, float], moved: bool) -> None:
    result = drift.compare(scene(), scene(**change))  # type: ignore[arg-type]
    assert result.way == "features"
    assert result.moved is moved, result
    if change.keys() == {"shift"}:
        assert result.pixels == pytest.approx(change["shift"], abs=0.2)


def test_the_board_decides_where_it_is_seen() -> None:
    start = pose((0.3, -0.2, 0.1))
    nudged = start.copy()
    turned = pose((0.3, -0.2, 0.12))
    nudged[0, 3] += 0.005
    still = drift.compare(drawn(BOARD, start), drawn(BOARD, start, noise=2.0), CAMERA, BOARD)
    assert (still.way, still.moved) == ("board", False)
    assert still.position < 1e-3
    result = drift.compare(drawn(BOARD, start), drawn(BOARD, nudged), CAMERA, BOARD)
    assert result.moved
    assert result.position == pytest.approx(0.005, abs=5e-4)
    assert drift.compare(drawn(BOARD, start), drawn(BOARD, turned), CAMERA, BOARD).moved


def test_the_image_shows_what_moved() -> None:
    then = scene()
    now = scene(shift=3.0)
    image = drift.comparison_image(then, now, drift.compare(then, now))
    assert image.shape == (480, 1280, 3)
    arrows = image[:, :640].astype(int)
    overlay = image[:, 640:].astype(int)
    assert (arrows[..., 0] - arrows[..., 1] > 100).sum() > 500  # arrows of what moved are red
    assert np.abs(overlay[..., 0] - overlay[..., 1]).max() > 30  # and the two views do not lie on each other


def test_averaging_lowers_noise() -> None:
    generator = np.random.default_rng(0)
    frames = [generator.normal(100, 8, (48, 64, 3)).clip(0, 255).astype(np.uint8) for _ in range(16)]
    assert drift.averaged(frames).std() < 0.4 * frames[0].std()


# -- before a session --------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with the calibration of the arm's camera."""
    CalibrationStore(tmp_path).put(CALIBRATION, {})
    return tmp_path


def tied() -> RobotContract:
    contract = arm()
    camera = dataclasses.replace(contract.cameras[0], calibration_id=CALIBRATION.id)
    return dataclasses.replace(contract, cameras=(camera,))


def check(**change: object) -> Check:
    return dataclasses.replace(Check("2026-03-01T11:00:00Z", False, "", "", {"pixels": 0.1}), **change)  # type: ignore[arg-type]


def test_a_session_starts_on_a_fresh_check(store: Path) -> None:
    last_check.write(store, CALIBRATION.id, check())
    assert last_check.require(store, tied(), NOW)["front"]["measured"] == {"pixels": 0.1}
    assert last_check.require(store, arm(), NOW) == {}  # nothing tied, nothing to check


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "session.not_checked"),
        ("{", "session.not_checked"),
        ("[]", "session.not_checked"),
        (json.dumps({"date": "yesterday"}), "session.not_checked"),
        (json.dumps(dataclasses.asdict(check(date="2026-02-27T11:00:00Z"))), "session.check_too_old"),
        (json.dumps(dataclasses.asdict(check(moved=True))), "session.camera_moved"),
    ],
)
def test_no_session_without_a_good_check(store: Path, content: str | None, code: str) -> None:
    if content is not None:
        (store / CALIBRATION.id / FILE).write_text(content)
    with pytest.raises(RatchetError) as refusal:
        last_check.require(store, tied(), NOW)
    assert refusal.value.code == code
    assert "calibrate drift" in str(refusal.value)


def test_a_missing_calibration_starts_no_session(tmp_path: Path) -> None:
    with pytest.raises(RatchetError, match=r"calibration\.unknown"):
        last_check.require(tmp_path, tied(), NOW)


def test_an_override_is_told_to_the_session(store: Path) -> None:
    last_check.write(store, CALIBRATION.id, check(moved=True, override="demo for visitors", person="Ada"))
    recorded = last_check.require(store, tied(), NOW)["front"]
    assert (recorded["moved"], recorded["override"], recorded["person"]) == (True, "demo for visitors", "Ada")
    with pytest.raises(RatchetError, match=r"session\.check_too_old"):  # a reason does not last for ever
        last_check.require(store, tied(), NOW + timedelta(days=1))


def test_another_cameras_calibration_starts_no_session(tmp_path: Path) -> None:
    """The id in a contract is 64 digits that somebody may have copied from the line below."""
    wrist = CalibrationStore(tmp_path).put(dataclasses.replace(CALIBRATION, camera="wrist"), {})
    last_check.write(tmp_path, wrist.id, check())
    contract = tied()
    camera = dataclasses.replace(contract.cameras[0], calibration_id=wrist.id)
    with pytest.raises(RatchetError, match=r"calibration\.other_camera.*'wrist'"):
        last_check.require(tmp_path, dataclasses.replace(contract, cameras=(camera,)), NOW)


def test_a_move_along_the_axis_of_view_is_noticed() -> None:
    """The middle of the image stays where it is, and many cells with it; all agree on one motion all the same."""
    matrix = np.array([[1.006, 0, -0.006 * 320], [0, 1.006, -0.006 * 240]])
    nearer = cv2.warpAffine(
        scene(objects=3), matrix, (640, 480), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    result = drift.compare(scene(), np.asarray(nearer, np.uint8))
    assert result.moved
    assert result.agreed == pytest.approx(0.006 * np.hypot(640, 480) / np.sqrt(12), rel=0.15)
    assert drift.compare(scene(), scene(objects=3)).agreed < 0.2
