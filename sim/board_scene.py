"""A calibration board in MuJoCo, photographed by cameras whose every number is known.

Knows how to render a textured board from a pose, and how to make of it what a real camera gives: distortion, blur,
noise, uneven light. Knows nothing of what is estimated from the pictures.

The picture is rendered by an ideal camera at twice the resolution and then sampled along the distorted camera's rays,
so that the truth is the camera model itself and not MuJoCo's field of view.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.errors import RatchetError
from calibration.boards import Board
from calibration.camera_model import CameraModel
from calibration.geometry import Float
from sim import gl

gl.require_gl(gl.configure_gl())

import mujoco  # noqa: E402  (the GL backend must be chosen first)

FINER = 2  # rendered pixels per pixel of the picture
BORDER = 0.5  # squares of white paper around the board
TEXTURE = 64  # pixels per square


@dataclass(frozen=True)
class Look:
    """How a picture is worse than a drawing. blur: px, Gaussian deviation. noise: grey levels, deviation per channel.
    light: share by which one side is darker. gain: factor on brightness."""

    blur: float = 0.5
    noise: float = 2.0
    light: float = 0.3
    gain: float = 1.0


class BoardScene:
    """One board, one camera. Close it after use.

    The world's frame is the camera's: x right, y down, z ahead; the board is moved instead of the camera.
    """

    def __init__(self, board: Board, camera: CameraModel) -> None:
        self.board = board
        self.camera = camera
        self._rays = self._ray_table()
        reach = np.abs(self._rays).max(axis=(0, 1))
        scale = FINER * max(camera.fx, camera.fy)
        self._width = int(np.ceil(2 * reach[0] * scale)) + 8
        self._height = int(np.ceil(2 * reach[1] * scale)) + 8
        if max(self._width, self._height) > 6000:
            raise RatchetError(
                "sim.bad_camera",
                f"a plain picture behind this lens would have {self._width} x {self._height} px",
                where="camera",
                fix="use a lens that sees less than 130 degrees from corner to corner",
            )
        self._focal = scale
        fovy = float(np.degrees(2 * np.arctan(self._height / 2 / scale)))
        width, height = board.size
        margin = BORDER * board.square
        texture = board.image(TEXTURE, margin=int(BORDER * TEXTURE))
        # A geom's texture on a box is mapped per face; a thin box's upper face shows it once.
        self._texture = texture
        half = (width / 2 + margin, height / 2 + margin)
        spec = mujoco.MjSpec()
        spec.visual.global_.offwidth = self._width
        spec.visual.global_.offheight = self._height
        spec.visual.quality.offsamples = 8
        spec.visual.headlight.ambient = [1.0, 1.0, 1.0]
        spec.visual.headlight.diffuse = [0.0, 0.0, 0.0]
        spec.visual.headlight.specular = [0.0, 0.0, 0.0]
        spec.visual.map.znear = 0.01
        spec.visual.map.zfar = 50.0
        picture = spec.add_texture(
            name="board",
            type=mujoco.mjtTexture.mjTEXTURE_2D,
            width=texture.shape[1],
            height=texture.shape[0],
            nchannel=3,
        )
        picture.data = np.repeat(texture[:, :, None], 3, 2).tobytes()
        material = spec.add_material(name="board", texrepeat=[1.0, 1.0], texuniform=False)
        material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "board"
        body = spec.worldbody.add_body(name="board", mocap=True)
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[*half, 0.1], material="board", contype=0, conaffinity=0)
        # MuJoCo's cameras look along their own -z with y up.
        spec.worldbody.add_camera(name="camera", fovy=fovy, quat=[0.0, 1.0, 0.0, 0.0])
        self._model = spec.compile()
        self._model.vis.map.znear = 0.01 / self._model.stat.extent
        self._data = mujoco.MjData(self._model)
        self._renderer = mujoco.Renderer(self._model, self._height, self._width)
        self._place = np.eye(4)
        self._place[:3, 3] = [width / 2, height / 2, 0.0]
        self._place[:3, :3] = np.diag([1.0, -1.0, -1.0])  # a plane's picture is seen from its +z side, y up

    def photograph(self, pose: Float, look: Look, generator: np.random.Generator) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB. pose: (4, 4) camera_T_board."""
        whole = pose @ self._place
        self._data.mocap_pos[0] = whole[:3, 3]
        quaternion = np.zeros(4)
        mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(whole[:3, :3]).ravel())
        self._data.mocap_quat[0] = quaternion
        mujoco.mj_forward(self._model, self._data)
        self._renderer.update_scene(self._data, camera="camera")
        fine = self._renderer.render()
        fine = cv2.GaussianBlur(fine, (0, 0), 0.5 * FINER)  # a pixel's own area
        at = self._rays * self._focal + np.array([(self._width - 1) / 2, (self._height - 1) / 2])
        image = cv2.remap(fine, at[..., 0].astype(np.float32), at[..., 1].astype(np.float32), cv2.INTER_CUBIC)
        return spoiled(image, look, generator)

    def close(self) -> None:
        self._renderer.close()

    def _ray_table(self) -> Float:
        """(H, W, 2): x / z and y / z of every pixel of the true camera."""
        x, y = np.meshgrid(np.arange(self.camera.width), np.arange(self.camera.height))
        flat = np.stack([x.ravel(), y.ravel()], 1).astype(float)
        return self.camera.undistorted(flat).reshape(self.camera.height, self.camera.width, 2)


def spoiled(image: NDArray[np.uint8], look: Look, generator: np.random.Generator) -> NDArray[np.uint8]:
    """The picture with blur, uneven light and noise."""
    out = image.astype(np.float32)
    if look.blur > 0:
        out = cv2.GaussianBlur(out, (0, 0), look.blur)
    angle = generator.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : image.shape[0] * 1j, -1 : 1 : image.shape[1] * 1j]
    shade = 1 - look.light * (0.5 + 0.5 * (np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(2))
    out = out * (look.gain * shade)[..., None] + generator.normal(0, look.noise, out.shape)
    return out.round().clip(0, 255).astype(np.uint8)


def poses(
    board: Board,
    camera: CameraModel,
    count: int,
    generator: np.random.Generator,
    distance: tuple[float, float],
    tilt: float = 0.6,
    corners: int = 16,
) -> list[Float]:
    """Poses of the board, (4, 4) in the camera's frame, that show at least so many corners. distance: m. tilt: rad."""
    out: list[Float] = []
    middle = np.array([*board.size, 0.0]) / 2
    while len(out) < count:
        turn = cv2.Rodrigues(generator.uniform(-1, 1, 3) * [tilt, tilt, np.pi])[0]
        z = generator.uniform(*distance)
        edge = np.array([camera.width / camera.fx, camera.height / camera.fy]) / 2
        at = np.array([*(generator.uniform(-0.9, 0.9, 2) * edge * z), z])
        pose = np.eye(4)
        pose[:3, :3] = turn
        pose[:3, 3] = at - turn @ middle
        points = board.corners @ turn.T + pose[:3, 3]
        if (points[:, 2] < 0.05).any():
            continue
        pixels = camera.project(points)
        if ((pixels > 4) & (pixels < (camera.width - 5, camera.height - 5))).all(1).sum() >= corners:
            out.append(pose)
    return out
