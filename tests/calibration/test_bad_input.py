"""Bad input must never become a calibration: it would be trusted for months.

Pinned: more than fifty kinds of bad image, view, pose, board and file are each refused with the code that says what
is wrong, in one line, and a store beside them is left as it was to the last byte. Determinism: drawn images, seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import Detection, detect
from ratchet_calibration.cameras import drift, intrinsics
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.geometry import inverse, small
from ratchet_calibration.handeye import estimate as handeye
from ratchet_calibration.store import export
from ratchet_calibration.store.folder import FILE, CalibrationStore
from ratchet_calibration.store.record import Calibration
from ratchet_vla.errors import RatchetError
from tests.calibration import scenes
from tests.calibration.scenes import BOARD, CAMERA, drawn, pose, seen

GOOD = drawn(BOARD, pose())
CLOSE = drawn(BOARD, pose((0.2, -0.1, 0.0), (0.0, 0.0, 0.3)))


# -- images ----------------------------------------------------------------------------------------------------------


def blurred() -> None:
    detect(BOARD, cv2.GaussianBlur(CLOSE, (0, 0), 2.0))


def shaken() -> None:
    detect(BOARD, cv2.blur(CLOSE, (7, 1)))


def mirrored() -> None:
    detect(BOARD, np.ascontiguousarray(GOOD[:, ::-1]))


def black() -> None:
    detect(BOARD, np.full((480, 640, 3), 7, np.uint8))


def white() -> None:
    detect(BOARD, np.full((480, 640, 3), 250, np.uint8))


def nothing() -> None:
    detect(BOARD, np.full((480, 640, 3), 128, np.uint8))


def larger_board() -> None:
    detect(BOARD, drawn(Board(columns=13, rows=8), pose(at=(0, 0, 0.7), board=Board(columns=13, rows=8))))


def turned_board() -> None:
    turned = Board(columns=6, rows=9)
    detect(BOARD, drawn(turned, pose((0.1, 0.1, 0), (0, 0, 0.55), turned)))


def other_dictionary() -> None:
    detect(BOARD, drawn(Board(dictionary="6x6_250"), pose()))


def chessboard_for_charuco() -> None:
    detect(BOARD, drawn(Board("chessboard", marker=0.0), pose()))


def covered() -> None:
    image = GOOD.copy()
    image[:, 225:] = 120
    detect(BOARD, image)


def floats() -> None:
    detect(BOARD, (GOOD / 255.0).astype(np.float32))


def deep() -> None:
    detect(BOARD, GOOD.astype(np.uint16))


def stamp() -> None:
    detect(BOARD, GOOD[:40, :50].copy())


def two_channels() -> None:
    detect(BOARD, GOOD[..., :2].copy())


def empty() -> None:
    detect(BOARD, np.zeros((0, 0, 3), np.uint8))


# -- views for intrinsics ----------------------------------------------------------------------------------------------


def estimate(views: list[Detection], model: Any = "none") -> None:
    intrinsics.calibrate(BOARD, views, model)


def few_views() -> None:
    estimate(scenes.views(5))


def no_views() -> None:
    estimate([])


def mixed_sizes() -> None:
    estimate([*scenes.views(12), replace(scenes.views(1)[0], size=(1280, 720))])


def same_view() -> None:
    estimate([seen(pose(), f"{k}", noise=0.05, seed=k) for k in range(15)])


def from_straight_ahead() -> None:
    estimate(
        [seen(pose((0, 0, 0.2 * k), (0.02 * k - 0.1, 0.01 * k - 0.05, 0.4 + 0.02 * k)), f"{k}") for k in range(12)]
    )


def in_one_corner() -> None:
    generator = np.random.default_rng(0)
    estimate([seen(pose(generator.uniform(-0.5, 0.5, 3), (0.1, 0.1, 1.2)), f"{k}", seed=k) for k in range(12)])


def unknown_model() -> None:
    estimate(scenes.views(12), "quintic")


def corners_of_another_board() -> None:
    estimate([replace(v, ids=v.ids + 20) for v in scenes.views(12)])


def scrambled_corners() -> None:
    generator = np.random.default_rng(0)
    estimate([replace(v, points=generator.permutation(v.points)) for v in scenes.views(12)])


# -- boards ------------------------------------------------------------------------------------------------------------


def narrow() -> None:
    Board(columns=2)


def millimetres() -> None:
    Board(square=30.0, marker=22.5)


def fat_markers() -> None:
    Board(marker=0.031)


def unknown_dictionary() -> None:
    Board(dictionary="7x7_1")


def too_many_markers() -> None:
    Board(columns=20, rows=20, dictionary="4x4_50")


def symmetric_chessboard() -> None:
    Board("chessboard", columns=8, rows=6, marker=0.0)


def unknown_kind() -> None:
    Board("circles")  # type: ignore[arg-type]


def too_large_for_paper() -> None:
    Board(square=0.05, marker=0.04).pdf("a4")


def unknown_paper() -> None:
    BOARD.pdf("a7")


def unknown_field() -> None:
    Board.from_dict({"columns": 9, "colour": "red"})


def text_for_number() -> None:
    Board.from_dict({"columns": "nine"})


# -- hand-eye ----------------------------------------------------------------------------------------------------------

ARM = scenes.arm()


def locate(poses: list[Any] | None = None, views: list[Detection] | None = None, mounting: Any = "eye_in_hand",
           camera: CameraModel = CAMERA, board: Board = BOARD) -> None:  # fmt: skip
    reported_poses = ARM[2] if poses is None else poses
    detections = ARM[3] if views is None else views
    handeye.calibrate(board, camera, mounting, reported_poses, detections, folds=0)


def changed(matrix: Any) -> list[Any]:
    return [*ARM[2][:-1], matrix]


def few_poses() -> None:
    locate(ARM[2][:5], ARM[3][:5])


def a_pose_missing() -> None:
    locate(ARM[2][:-1])


def translations_only() -> None:
    x, y, _, _ = ARM
    reported_poses = []
    detections = []
    for k in range(12):
        board_in_camera = pose((0.2, 0.1, 0.0), (0.01 * k - 0.06, 0.03 * (k % 3) - 0.03, 0.4 + 0.01 * k))
        reported_poses.append(inverse(x @ board_in_camera @ inverse(y)))
        detections.append(seen(board_in_camera, f"{k}", seed=k))
    locate(reported_poses, detections)


def one_axis() -> None:
    x, y, _, _ = ARM
    start = pose((0.2, 0.1, 0.0))
    reported_poses = []
    detections = []
    for k in range(12):
        board_in_camera = start @ small(np.array([0, 0, 0.15 * k - 0.8, 0.005 * k - 0.03, 0, 0]))
        reported_poses.append(inverse(x @ board_in_camera @ inverse(y)))
        detections.append(seen(board_in_camera, f"{k}", seed=k))
    locate(reported_poses, detections)


def same_pose() -> None:
    locate([ARM[2][0]] * 12, [ARM[3][0]] * 12)


def not_a_number() -> None:
    matrix = ARM[2][-1].copy()
    matrix[0, 3] = np.nan
    locate(changed(matrix))


def three_rows() -> None:
    locate(changed(ARM[2][-1][:3]))


def transposed() -> None:
    locate(changed(ARM[2][-1].T))


def quaternion_not_normalised() -> None:
    matrix = ARM[2][-1].copy()
    matrix[:3, :3] *= 1.1
    locate(changed(matrix))


def reflected() -> None:
    matrix = ARM[2][-1].copy()
    matrix[:3, 0] *= -1
    locate(changed(matrix))


def poses_in_millimetres() -> None:
    matrix = ARM[2][-1].copy()
    matrix[:3, 3] *= 1000
    locate(changed(matrix))


def other_resolution() -> None:
    locate(camera=replace(CAMERA, width=1280, height=960))


def swapped_transforms() -> None:
    locate([inverse(p) for p in ARM[2]])


def wrong_mounting() -> None:
    locate(mounting="eye_to_hand")


def unknown_mounting() -> None:
    locate(mounting="eye_on_foot")


def poses_in_another_order() -> None:
    locate([ARM[2][i] for i in np.random.default_rng(1).permutation(len(ARM[2]))])


def board_of_twice_the_size() -> None:
    locate(board=Board(square=0.06, marker=0.045))


def a_mirrored_robot() -> None:
    flip = np.diag([1.0, -1.0, 1.0, 1.0])
    locate([flip @ p @ flip for p in ARM[2]])


def nothing_to_see() -> None:
    estimate = handeye.calibrate(BOARD, CAMERA, "eye_in_hand", ARM[2], ARM[3], folds=0)
    away = [p @ small(np.array([np.pi, 0, 0, 0, 0, 0])) for p in ARM[2]]
    handeye.suggest(BOARD, CAMERA, estimate, away, ARM[3], ARM[2])


# -- camera models, exports, drift -------------------------------------------------------------------------------------


def wrong_number_of_coefficients() -> None:
    CameraModel(640, 480, 600, 600, 320, 240, "brown5", (0.1,))


def negative_focal_length() -> None:
    CameraModel(640, 480, -600, 600, 320, 240)


def model_with_a_missing_field() -> None:
    CameraModel.from_dict({"width": 640}, "file")


def no_mount_to_export() -> None:
    export.urdf(CALIBRATION)


def drift_of_another_resolution() -> None:
    drift.compare(GOOD, GOOD[:240, :320].copy())


def drift_with_a_covered_lens() -> None:
    drift.compare(GOOD, np.full_like(GOOD, 20))


# -- files -------------------------------------------------------------------------------------------------------------

CALIBRATION = Calibration("wrist", CAMERA, BOARD, "2026-01-01T00:00:00Z", 0.1, 0.12, 20)


def rewritten(path: Path, **fields: Any) -> None:
    """Change fields of a stored calibration and give the folder the id that would fit, as a forger would."""
    raw = yaml.safe_load((path / FILE).read_text()) | fields
    Calibration.from_dict(raw, str(path / FILE))


CASES: list[tuple[Callable[[], None], str]] = [
    (blurred, "calibration.blurred"),
    (shaken, "calibration.blurred"),
    (mirrored, "calibration.mirrored"),
    (black, "calibration.dark"),
    (white, "calibration.bright"),
    (nothing, "calibration.no_board"),
    (larger_board, "calibration.wrong_board"),
    (turned_board, "calibration.wrong_board"),
    (other_dictionary, "calibration.wrong_board"),
    (chessboard_for_charuco, "calibration.no_board"),
    (covered, "calibration.few_corners"),
    (floats, "calibration.bad_image"),
    (deep, "calibration.bad_image"),
    (stamp, "calibration.bad_image"),
    (two_channels, "calibration.bad_image"),
    (empty, "calibration.bad_image"),
    (few_views, "calibration.too_few_views"),
    (no_views, "calibration.too_few_views"),
    (mixed_sizes, "calibration.mixed_sizes"),
    (same_view, "calibration.duplicate_views"),
    (from_straight_ahead, "calibration.no_tilt"),
    (in_one_corner, "calibration.no_coverage"),
    (unknown_model, "calibration.bad_model"),
    (corners_of_another_board, "calibration.wrong_board"),
    (scrambled_corners, "calibration.did_not_converge"),
    (narrow, "calibration.bad_board"),
    (millimetres, "calibration.bad_board"),
    (fat_markers, "calibration.bad_board"),
    (unknown_dictionary, "calibration.bad_board"),
    (too_many_markers, "calibration.bad_board"),
    (symmetric_chessboard, "calibration.bad_board"),
    (unknown_kind, "calibration.bad_board"),
    (too_large_for_paper, "calibration.too_large"),
    (unknown_paper, "calibration.bad_board"),
    (unknown_field, "calibration.bad_board"),
    (text_for_number, "calibration.bad_board"),
    (few_poses, "calibration.too_few_poses"),
    (a_pose_missing, "calibration.mismatch"),
    (translations_only, "calibration.pure_translation"),
    (one_axis, "calibration.one_axis"),
    (same_pose, "calibration.duplicate_poses"),
    (not_a_number, "calibration.not_a_pose"),
    (three_rows, "calibration.not_a_pose"),
    (transposed, "calibration.not_a_pose"),
    (quaternion_not_normalised, "calibration.not_a_pose"),
    (reflected, "calibration.mirrored_pose"),
    (poses_in_millimetres, "calibration.units"),
    (other_resolution, "calibration.wrong_size"),
    (swapped_transforms, "calibration.swapped"),
    (wrong_mounting, "calibration.swapped"),
    (unknown_mounting, "calibration.bad_mounting"),
    (poses_in_another_order, "calibration.inconsistent"),
    (board_of_twice_the_size, "calibration.inconsistent"),
    (a_mirrored_robot, "calibration.inconsistent"),
    (nothing_to_see, "calibration.nothing_visible"),
    (wrong_number_of_coefficients, "calibration.bad_model"),
    (negative_focal_length, "calibration.bad_model"),
    (model_with_a_missing_field, "calibration.bad_model"),
    (no_mount_to_export, "calibration.no_mount"),
    (drift_of_another_resolution, "drift.wrong_size"),
    (drift_with_a_covered_lens, "drift.blind"),
]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in folder.rglob("*")
    }


@pytest.fixture
def store(tmp_path: Path) -> CalibrationStore:
    store = CalibrationStore(tmp_path / "calibrations")
    store.put(CALIBRATION, {"0.png": b"image"}, lambda c: "<html>")
    return store


@pytest.mark.parametrize(("bad", "code"), CASES, ids=[c[0].__name__ for c in CASES])
def test_bad_input_is_refused_and_nothing_is_written(
    bad: Callable[[], None], code: str, store: CalibrationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.root)
    before = contents(store.root)
    with pytest.raises(RatchetError) as refusal:
        bad()
    assert refusal.value.code == code, str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert contents(store.root) == before


def edited(store: CalibrationStore, calibration_id: str) -> object:
    _edit(store, calibration_id, "cx: 325.0", "cx: 327.0")
    return store.load(calibration_id)


def without_image(store: CalibrationStore, calibration_id: str) -> object:
    (store.root / calibration_id / "images/0.png").unlink()
    return store.load(calibration_id)


FILES: list[tuple[str, Callable[[CalibrationStore, str], object], str]] = [
    ("edited", edited, "calibration.changed"),
    ("not_yaml", lambda s, i: ((s.root / i / FILE).write_text("{a: ["), s.load(i)), "calibration.bad_file"),
    ("binary", lambda s, i: ((s.root / i / FILE).write_bytes(b"\xff\xfe\x00\x80"), s.load(i)), "calibration.bad_file"),
    ("a_list", lambda s, i: ((s.root / i / FILE).write_text("[1, 2]"), s.load(i)), "calibration.bad_file"),
    ("schema", lambda s, i: rewritten(s.root / i, schema=9), "calibration.bad_file"),
    ("surplus", lambda s, i: rewritten(s.root / i, colour="red"), "calibration.bad_file"),
    ("name", lambda s, i: rewritten(s.root / i, camera="../wrist"), "calibration.bad_file"),
    ("text", lambda s, i: rewritten(s.root / i, rms="small"), "calibration.bad_file"),
    ("mount", lambda s, i: rewritten(s.root / i, mount={"mounting": "eye_in_hand"}), "calibration.bad_file"),
    ("image_gone", without_image, "calibration.changed"),
    ("other_image", lambda s, i: ((s.root / i / "images/0.png").write_bytes(b"x"), s.load(i)), "calibration.changed"),
    ("unknown_id", lambda s, i: s.load("0" * 64), "calibration.unknown"),
    ("unknown_name", lambda s, i: s.resolve("front"), "calibration.unknown"),
    ("outside", lambda s, i: s.put(CALIBRATION, {"../x.png": b""}), "calibration.bad_name"),
    ("no_folder", lambda s, i: CalibrationStore(s.root / i / FILE).put(CALIBRATION, {}), "calibration.not_written"),
]


def _edit(store: CalibrationStore, identity: str, old: str, new: str) -> None:
    path = store.root / identity / FILE
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(("bad", "code"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_a_damaged_file_is_refused(
    bad: Callable[[CalibrationStore, str], object], code: str, store: CalibrationStore
) -> None:
    with pytest.raises(RatchetError) as refusal:
        bad(store, store.ids()[0])
    assert refusal.value.code == code, str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not [p for p in store.root.iterdir() if p.name.startswith(".")]


def test_there_are_fifty_kinds() -> None:
    assert len(CASES) + len(FILES) >= 50
