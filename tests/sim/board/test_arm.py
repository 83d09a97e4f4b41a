"""The simulated arm with a board: hand-eye calibration must find its true camera by looking and moving alone.

Pinned: the arm is a Robot; rendered corners lie where the true camera puts them, so that images carry the truth;
views taken automatically lead to the true pose within the stated region, for both mountings. Determinism: seeds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import detect
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.geometry import difference
from ratchet_calibration.handeye import estimate as handeye
from ratchet_calibration.handeye.collect import Collector
from ratchet_calibration.handeye.problem import Mounting
from ratchet_sim.board.arm import CAMERA, BoardArm
from ratchet_sim.board.scene import BoardScene, Look, poses
from ratchet_vla.runtime.robots.protocol import Robot
from ratchet_vla.testing.conformance.robot import RobotConformance

LENS = CameraModel(640, 480, 610, 612, 325, 236, "brown5", (0.12, -0.25, 0.001, -0.0005, 0.01))
BOARD = Board()


class TestIsARobot(RobotConformance):
    @pytest.fixture
    def robot(self) -> Iterator[Robot]:
        arm = BoardArm(BOARD, LENS)
        arm.connect()
        yield arm
        arm.close()


@pytest.mark.parametrize("look", [Look(), Look(blur=0.8, noise=5.0, light=0.5, gain=0.6)], ids=["good", "poor"])
def test_rendered_corners_lie_where_the_camera_puts_them(look: Look) -> None:
    generator = np.random.default_rng(0)
    scene = BoardScene(BOARD, LENS)
    off = []
    for pose in poses(BOARD, LENS, 5, generator, (0.3, 0.5)):
        detection = detect(BOARD, scene.photograph(pose, look, generator))
        truth = LENS.project(BOARD.corners @ pose[:3, :3].T + pose[:3, 3])
        off.append(detection.points - truth[detection.ids])
    scene.close()
    all_offsets = np.concatenate(off)
    assert np.sqrt((all_offsets**2).sum(1).mean()) < 0.2
    assert np.abs(all_offsets.mean(0)).max() < 0.05


@pytest.mark.parametrize("mounting", ["eye_in_hand", "eye_to_hand"])
def test_the_true_camera_is_found_by_looking(mounting: Mounting) -> None:
    arm = BoardArm(BOARD, LENS, mounting, seed=3)
    try:
        views = Collector(arm, CAMERA, BOARD, LENS, mounting).automatic(12)
    finally:
        arm.close()
    result = handeye.calibrate(BOARD, LENS, mounting, views.poses, views.detections, folds=0)
    apart = difference(arm.truth, result.camera)
    assert len(views.poses) == 12
    assert np.linalg.norm(apart[3:]) < 3e-3
    assert np.linalg.norm(apart[:3]) < np.radians(0.3)
    assert result.contains(arm.truth, 0.999)
