"""Views are taken by an arm that must not wander, and a report is read by somebody who has never calibrated a camera.

Pinned: the arm is driven within its contract's deltas and workspace, and back; guided by hand nothing is commanded and
the same place gives one view; a start without a board is refused before any motion; the page is complete in one file,
escapes what people wrote, and says when a calibration is not good enough. Determinism: an arm that draws what it sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ratchet_calibration import report
from ratchet_calibration.cameras import intrinsics
from ratchet_calibration.geometry import Float, difference, inverse, transform
from ratchet_calibration.handeye import estimate as handeye
from ratchet_calibration.handeye.collect import Collector
from ratchet_calibration.store.record import Calibration, Mount
from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, Observation
from ratchet_vla.testing.fake_contract import arm
from tests.calibration import scenes
from tests.calibration.scenes import BOARD, CAMERA, drawn, pose

X = transform(Rotation.from_rotvec([0.05, -0.03, 0.1]).as_matrix(), np.array([0.03, -0.02, 0.05]))
HAND = transform(Rotation.from_euler("xyz", [np.pi, 0.0, 0.0]).as_matrix(), np.array([0.0, 0.0, 0.1]))


class LookingArm:
    """An exact Cartesian arm with a camera in its hand. seen: what it draws; moved_by: a person's hand."""

    def __init__(self, board_ahead: bool = True) -> None:
        base = arm("ee_delta")
        camera = CameraSpec("wrist", CAMERA.width, CAMERA.height)
        self._contract = dataclasses.replace(base, cameras=(camera,))
        self.hand = HAND.copy()
        self.board = HAND @ X @ pose((0.05, 0.0, 0.0), (0, 0, 0.4))
        if not board_ahead:
            self.board = self.board @ transform(np.eye(3), np.array([5.0, 0.0, 0.0]))
        self.sent: list[Float] = []
        self.places: list[Float] = []
        self.moved_by: Callable[[LookingArm], None] = lambda arm: None
        self.steps = 0

    @property
    def contract(self) -> RobotContract:
        return self._contract

    def observe(self, cameras: bool = True) -> Observation:
        self.steps += 1
        state = {
            "place": self.hand[:3, 3].astype(np.float32),
            "turned": Rotation.from_matrix(self.hand[:3, :3]).as_rotvec().astype(np.float32),
            "gripper": np.ones(1, np.float32),
        }
        board_in_camera = inverse(X) @ inverse(self.hand) @ self.board
        is_visible = board_in_camera[2, 3] > 0.05 and np.linalg.norm(board_in_camera[:3, 3]) < 2
        blank = np.full((CAMERA.height, CAMERA.width, 3), 120, np.uint8)
        images = {"wrist": drawn(BOARD, board_in_camera) if is_visible else blank} if cameras else {}
        return Observation(images, state, "", self.steps / 20, self.steps)

    def act(self, action: Float32) -> None:
        values = np.asarray(action, float)
        self.sent.append(values)
        turn = Rotation.from_rotvec(values[3:6]).as_matrix()
        self.hand = transform(turn @ self.hand[:3, :3], self.hand[:3, 3] + values[:3])
        self.places.append(self.hand.copy())

    def hold(self) -> None:
        self.sent.append(np.zeros(7))

    def pace(self) -> None:
        self.moved_by(self)


def test_the_arm_is_driven_within_its_limits_and_back() -> None:
    robot = LookingArm()
    views = Collector(robot, "wrist", BOARD, CAMERA, "eye_in_hand").automatic(11)
    assert len(views.poses) == len(views.images) == len(views.detections) == 11
    dims = robot.contract.action.dims
    actions = np.array(robot.sent)
    assert (actions >= np.array([d.low for d in dims]) - 1e-9).all()
    assert (actions <= np.array([d.high for d in dims]) + 1e-9).all()
    limits = robot.contract.limits
    places = np.array([p[:3, 3] for p in robot.places])
    assert (places >= limits.workspace_low).all()
    assert (places <= limits.workspace_high).all()
    assert np.abs(difference(HAND, robot.hand)).max() < 5e-3
    estimate = handeye.calibrate(BOARD, CAMERA, "eye_in_hand", views.poses, views.detections, folds=0)
    assert np.linalg.norm(difference(X, estimate.camera)[3:]) < 2e-3


def test_without_a_board_nothing_moves() -> None:
    robot = LookingArm(board_ahead=False)
    with pytest.raises(RatchetError, match=r"calibration\.no_board"):
        Collector(robot, "wrist", BOARD, CAMERA, "eye_in_hand").automatic(10)
    assert robot.sent == []


def test_guided_by_hand_nothing_is_commanded() -> None:
    robot = LookingArm()
    messages: list[str] = []
    stops = [HAND @ transform(Rotation.from_rotvec(r).as_matrix(), np.array([0.01 * k, 0, 0])) for k, r in enumerate(
        ([0, 0, 0], [0.2, 0, 0], [0.2, 0, 0], [0, 0.25, 0]))]  # fmt: skip

    def person(arm: LookingArm) -> None:
        arm.hand = stops[min(arm.steps // 24, len(stops) - 1)]

    robot.moved_by = person
    views = Collector(
        robot, "wrist", BOARD, CAMERA, "eye_in_hand", pace=robot.pace, tell=messages.append
    ).guided(3)  # fmt: skip
    assert robot.sent == []
    assert len(views.poses) == 3  # the third stop is the second place again
    apart = [np.linalg.norm(difference(a, b)[:3]) for a in views.poses for b in views.poses if a is not b]
    assert min(apart) > 0.1
    assert messages[-1] == "view 3 of 3"


def test_a_joint_robot_is_guided_by_hand() -> None:
    robot = LookingArm()
    robot._contract = dataclasses.replace(
        robot._contract, action=dataclasses.replace(robot._contract.action, control_mode="ee_absolute")
    )
    with pytest.raises(RatchetError, match=r"calibration\.guide_by_hand"):
        Collector(robot, "wrist", BOARD, CAMERA, "eye_in_hand").automatic(10)
    assert robot.sent == []


# -- the report --------------------------------------------------------------------------------------------------------


def mounted(deviation: float = 2e-4, held_out: float = 1e-3) -> Mount:
    return Mount.of(
        X, mounting="eye_in_hand", parent="tool0", child="wrist", covariance=deviation**2 * np.eye(6), poses=12,
        rms=0.2, held_out_pixels=0.4, held_out_position=held_out, held_out_rotation=1e-3,
    )  # fmt: skip


def calibration(**change: object) -> Calibration:
    plain = Calibration("wrist", CAMERA, BOARD, "2026-01-01T00:00:00Z", 0.1, 0.12, 20, mount=mounted())
    return dataclasses.replace(plain, **change)  # type: ignore[arg-type]


def test_the_page_is_whole_and_for_everybody() -> None:
    lens = intrinsics.calibrate(BOARD, scenes.views(16), "none")
    _, _, reported_poses, detections = scenes.arm(count=12)
    hand = handeye.calibrate(BOARD, CAMERA, "eye_in_hand", reported_poses, detections)
    page = report.write(calibration(camera_serial="<script>alert(1)</script>"), lens, hand, reported_poses)
    assert page.count("data:image/png;base64,") == 3
    assert "<script>" not in page
    assert 'src="http' not in page
    for phrase in ("Good", "held-out error", "two standard deviations", "park", "Where corners were"):
        assert phrase in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"held_out_rms": 0.9}, "off by 0.90 px"),
        ({"held_out_rms": float("nan")}, "off by nan px"),
        ({"mount": mounted(deviation=5e-3)}, "only known to"),
        ({"mount": mounted(held_out=0.02)}, "20.0 mm elsewhere"),
    ],
    ids=str,
)
def test_a_bad_calibration_is_called_so(change: dict[str, object], words: str) -> None:
    good, assessment = report.assess(calibration(**change))
    assert not good
    assert words in assessment
    assert report.assess(calibration())[0]


def test_the_stand_in_sees_the_board_where_it_is() -> None:
    """The stand-in itself: its camera sees the board where the geometry puts it."""
    robot = LookingArm()
    collector = Collector(robot, "wrist", BOARD, CAMERA, "eye_in_hand")
    assert collector.look()
    board_in_camera = inverse(X) @ inverse(HAND) @ robot.board
    truth = CAMERA.project(BOARD.corners @ board_in_camera[:3, :3].T + board_in_camera[:3, 3])
    assert np.abs(collector.views.detections[0].points - truth).max() < 0.3
