"""BoardArm: a simulated arm with a camera and a calibration board, behind the Robot protocol.

Knows a board in MuJoCo, a camera at a true pose, and an arm that moves exactly as commanded and reports its pose with
a real one's errors. Knows no estimate.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.spatial.transform import Rotation

from ratchet_calibration.boards.board import Board
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.geometry import Float, inverse, small, transform
from ratchet_sim import registry
from ratchet_sim.board.scene import BoardScene, Look
from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, Observation

CAMERA = "camera"


class BoardArm:
    """A Cartesian arm with LIBERO's contract and one camera, in the hand or beside the arm.

    position_error: m, rotation_error: rad: standard deviations of the reported pose, drawn anew after each motion.
    """

    def __init__(
        self,
        board: Board,
        camera: CameraModel,
        mounting: str = "eye_in_hand",
        *,
        position_error: float = 5e-4,
        rotation_error: float = float(np.radians(0.1)),
        look: Look | None = None,
        seed: int = 0,
    ) -> None:
        self.board = board
        self.mounting = mounting
        self._generator = np.random.default_rng(seed)
        self._errors = np.repeat([rotation_error, position_error], 3)
        base_contract = registry.contract_for("libero_object")
        camera_spec = CameraSpec(CAMERA, camera.width, camera.height)
        self._contract = dataclasses.replace(base_contract, name="board-arm", cameras=(camera_spec,), simulator=None)
        self._scene = BoardScene(board, camera)
        self._look = look or Look()
        board_centre = transform(np.eye(3), np.array([*board.size, 0.0]) / 2)
        board_ahead = transform(Rotation.from_euler("xyz", [0.15, -0.1, 0.2]).as_matrix(), np.array([0.0, 0.0, 0.42]))
        hand_down = Rotation.from_euler("xyz", [np.pi, 0.0, 0.0]).as_matrix()
        self._hand = transform(hand_down, np.array([-0.05, 0.0, 0.5]))  # base_T_flange
        if mounting == "eye_in_hand":
            self.truth = transform(Rotation.from_rotvec([0.05, -0.03, 0.1]).as_matrix(), np.array([0.04, -0.03, 0.05]))
            self._other = self._hand @ self.truth @ board_ahead @ inverse(board_centre)  # base_T_board
        else:
            self._other = transform(np.eye(3), np.array([0.0, 0.02, 0.06])) @ inverse(board_centre)  # flange_T_board
            self.truth = self._hand @ self._other @ board_centre @ inverse(board_ahead)  # base_T_camera
        self._reported_pose = self._hand
        self._steps = 0
        self._report_pose()

    @property
    def contract(self) -> RobotContract:
        return self._contract

    def connect(self) -> None:
        """Nothing to open."""

    def observe(self, cameras: bool = True) -> Observation:
        images = {CAMERA: self._photograph()} if cameras else {}
        rotation_vector = Rotation.from_matrix(self._reported_pose[:3, :3]).as_rotvec()
        state = {field.name: np.zeros(field.size, np.float32) for field in self._contract.state}
        state["eef_position"] = self._reported_pose[:3, 3].astype(np.float32)
        state["eef_rotation"] = rotation_vector.astype(np.float32)
        return Observation(images, state, "look at the board", self._steps / self._contract.control_hz, self._steps)

    def act(self, action: Float32) -> None:
        command = np.asarray(action, float)
        if command.shape != (self._contract.action.size,) or not np.isfinite(command).all():
            raise RatchetError("robot.bad_action", "not one finite value per dimension", where=self._contract.name)
        self._steps += 1
        if not command[:6].any():
            return  # it stands still, and reports the same pose again
        rotation_step = Rotation.from_rotvec(command[3:6]).as_matrix()
        self._hand = transform(rotation_step @ self._hand[:3, :3], self._hand[:3, 3] + command[:3])
        self._report_pose()

    def hold(self) -> None:
        """It stands still by itself."""

    def close(self) -> None:
        self._scene.close()

    def _report_pose(self) -> None:
        self._reported_pose = self._hand @ small(self._generator.normal(0, 1, 6) * self._errors)

    def _photograph(self) -> np.ndarray:
        if self.mounting == "eye_in_hand":
            board_in_camera: Float = inverse(self.truth) @ inverse(self._hand) @ self._other
        else:
            board_in_camera = inverse(self.truth) @ self._hand @ self._other
        return self._scene.photograph(board_in_camera, self._look, self._generator)
