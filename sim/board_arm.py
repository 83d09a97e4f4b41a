"""A simulated arm that looks at a calibration board, behind the Robot protocol: nothing of it is known but by looking.

Knows a board in MuJoCo, a camera with a true place, and an arm that goes where it is told and tells its pose with the
errors of a real one. Knows no estimate.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.spatial.transform import Rotation

from agent.contract import CameraSpec, RobotContract
from agent.errors import RatchetError
from agent.records import Float32, Observation
from calibration.boards import Board
from calibration.camera_model import CameraModel
from calibration.geometry import Float, inverse, small, transform
from sim import registry
from sim.board_scene import BoardScene, Look

CAMERA = "camera"


class BoardArm:
    """A Cartesian arm with LIBERO's contract and one camera, in the hand or beside the arm.

    position_error: m, rotation_error: rad: deviations of the pose that it tells at each place.
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
        base = registry.contract_for("libero_object")
        spec = CameraSpec(CAMERA, camera.width, camera.height)
        self._contract = dataclasses.replace(base, name="board-arm", cameras=(spec,), simulator=None)
        self._scene = BoardScene(board, camera)
        self._look = look or Look()
        middle = transform(np.eye(3), np.array([*board.size, 0.0]) / 2)
        ahead = transform(Rotation.from_euler("xyz", [0.15, -0.1, 0.2]).as_matrix(), np.array([0.0, 0.0, 0.42]))
        down = Rotation.from_euler("xyz", [np.pi, 0.0, 0.0]).as_matrix()
        self._hand = transform(down, np.array([-0.05, 0.0, 0.5]))  # base_T_flange
        if mounting == "eye_in_hand":
            self.truth = transform(Rotation.from_rotvec([0.05, -0.03, 0.1]).as_matrix(), np.array([0.04, -0.03, 0.05]))
            self._other = self._hand @ self.truth @ ahead @ inverse(middle)  # base_T_board
        else:
            self._other = transform(np.eye(3), np.array([0.0, 0.02, 0.06])) @ inverse(middle)  # flange_T_board
            self.truth = self._hand @ self._other @ middle @ inverse(ahead)  # base_T_camera
        self._told = self._hand
        self._steps = 0
        self._tell()

    @property
    def contract(self) -> RobotContract:
        return self._contract

    def connect(self) -> None:
        """Nothing to open."""

    def observe(self, cameras: bool = True) -> Observation:
        images = {CAMERA: self._photograph()} if cameras else {}
        turn = Rotation.from_matrix(self._told[:3, :3]).as_rotvec()
        state = {s.name: np.zeros(s.size, np.float32) for s in self._contract.state}
        state["eef_position"] = self._told[:3, 3].astype(np.float32)
        state["eef_rotation"] = turn.astype(np.float32)
        return Observation(images, state, "look at the board", self._steps / self._contract.control_hz, self._steps)

    def act(self, action: Float32) -> None:
        values = np.asarray(action, float)
        if values.shape != (self._contract.action.size,) or not np.isfinite(values).all():
            raise RatchetError("robot.bad_action", "not one finite value per dimension", where=self._contract.name)
        self._steps += 1
        if not values[:6].any():
            return  # it stands still, and tells the same pose again
        turn = Rotation.from_rotvec(values[3:6]).as_matrix()
        self._hand = transform(turn @ self._hand[:3, :3], self._hand[:3, 3] + values[:3])
        self._tell()

    def hold(self) -> None:
        """It stands still by itself."""

    def close(self) -> None:
        self._scene.close()

    def _tell(self) -> None:
        self._told = self._hand @ small(self._generator.normal(0, 1, 6) * self._errors)

    def _photograph(self) -> np.ndarray:
        if self.mounting == "eye_in_hand":
            pose: Float = inverse(self.truth) @ inverse(self._hand) @ self._other
        else:
            pose = inverse(self.truth) @ self._hand @ self._other
        return self._scene.photograph(pose, self._look, self._generator)
