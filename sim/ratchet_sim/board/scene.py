"""BoardScene: images of a calibration board, rendered in MuJoCo by cameras with known parameters.

Knows how to render a textured board from a pose, and how to add what a real camera adds: distortion, blur, noise and
uneven light. Knows nothing of what is estimated from the images.

The image is rendered by an ideal camera at twice the resolution and then sampled along the distorted camera's rays,
so that the truth is the camera model itself and not MuJoCo's field of view.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from ratchet_calibration.boards.board import Board
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.geometry import Float
from ratchet_sim import gl
from ratchet_vla.errors import RatchetError

gl.require_gl(gl.configure_gl())

import mujoco  # noqa: E402  (the GL backend must be chosen first)

FINER = 2  # rendered pixels per pixel of the image
BORDER = 0.5  # squares of white paper around the board
TEXTURE = 64  # pixels per square


@dataclass(frozen=True)
class Look:
    """Imperfections of a real image.

    Attributes:
        blur: px, Gaussian deviation.
        noise: grey levels, deviation per channel.
        light: share by which one side is darker.
        gain: factor on brightness.
    """

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
        # The ideal camera must see every ray that the distorted one sees, so its size follows from the widest of
        # them.
        widest_ray = np.abs(self._rays).max(axis=(0, 1))
        focal_px = FINER * max(camera.fx, camera.fy)
        self._width = int(np.ceil(2 * widest_ray[0] * focal_px)) + 8
        self._height = int(np.ceil(2 * widest_ray[1] * focal_px)) + 8
        if max(self._width, self._height) > 6000:
            raise RatchetError(
                "sim.bad_camera",
                f"a plain image behind this lens would have {self._width} x {self._height} px",
                where="camera",
                fix="use a lens that sees less than 130 degrees from corner to corner",
            )
        self._focal = focal_px
        fovy_deg = float(np.degrees(2 * np.arctan(self._height / 2 / focal_px)))
        width_m, height_m = board.size
        margin_m = BORDER * board.square
        texture = board.image(TEXTURE, margin=int(BORDER * TEXTURE))
        # A geom's texture on a box is mapped per face; a thin box's upper face shows it once.
        self._texture = texture
        half_size_m = (width_m / 2 + margin_m, height_m / 2 + margin_m)
        model_spec = mujoco.MjSpec()
        model_spec.visual.global_.offwidth = self._width
        model_spec.visual.global_.offheight = self._height
        model_spec.visual.quality.offsamples = 8
        model_spec.visual.headlight.ambient = [1.0, 1.0, 1.0]
        model_spec.visual.headlight.diffuse = [0.0, 0.0, 0.0]
        model_spec.visual.headlight.specular = [0.0, 0.0, 0.0]
        model_spec.visual.map.znear = 0.01
        model_spec.visual.map.zfar = 50.0
        board_texture = model_spec.add_texture(
            name="board",
            type=mujoco.mjtTexture.mjTEXTURE_2D,
            width=texture.shape[1],
            height=texture.shape[0],
            nchannel=3,
        )
        board_texture.data = np.repeat(texture[:, :, None], 3, 2).tobytes()
        material = model_spec.add_material(name="board", texrepeat=[1.0, 1.0], texuniform=False)
        material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "board"
        body = model_spec.worldbody.add_body(name="board", mocap=True)
        body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_PLANE, size=[*half_size_m, 0.1], material="board", contype=0, conaffinity=0
        )
        # MuJoCo's cameras look along their own -z with y up.
        model_spec.worldbody.add_camera(name="camera", fovy=fovy_deg, quat=[0.0, 1.0, 0.0, 0.0])
        self._model = model_spec.compile()
        # In MuJoCo znear is a multiple of the model's extent, known only after compiling.
        self._model.vis.map.znear = 0.01 / self._model.stat.extent
        self._data = mujoco.MjData(self._model)
        self._renderer = mujoco.Renderer(self._model, self._height, self._width)
        self._place = np.eye(4)
        self._place[:3, 3] = [width_m / 2, height_m / 2, 0.0]
        self._place[:3, :3] = np.diag([1.0, -1.0, -1.0])  # a plane's image is seen from its +z side, y up

    def photograph(self, pose: Float, look: Look, generator: np.random.Generator) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB. pose: (4, 4) camera_T_board."""
        plane_pose = pose @ self._place
        self._data.mocap_pos[0] = plane_pose[:3, 3]
        quaternion = np.zeros(4)
        mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(plane_pose[:3, :3]).ravel())
        self._data.mocap_quat[0] = quaternion
        mujoco.mj_forward(self._model, self._data)
        self._renderer.update_scene(self._data, camera="camera")
        rendered = self._renderer.render()
        rendered = cv2.GaussianBlur(rendered, (0, 0), 0.5 * FINER)  # a pixel's own area
        sample_points = self._rays * self._focal + np.array([(self._width - 1) / 2, (self._height - 1) / 2])
        image = cv2.remap(
            rendered,
            sample_points[..., 0].astype(np.float32),
            sample_points[..., 1].astype(np.float32),
            cv2.INTER_CUBIC,
        )
        return spoiled(image, look, generator)

    def close(self) -> None:
        self._renderer.close()

    def _ray_table(self) -> Float:
        """(H, W, 2): x / z and y / z of every pixel of the true camera."""
        column_px, row_px = np.meshgrid(np.arange(self.camera.width), np.arange(self.camera.height))
        pixels = np.stack([column_px.ravel(), row_px.ravel()], 1).astype(float)
        return self.camera.undistorted(pixels).reshape(self.camera.height, self.camera.width, 2)


def spoiled(image: NDArray[np.uint8], look: Look, generator: np.random.Generator) -> NDArray[np.uint8]:
    """An image (H, W, 3) uint8 with blur, uneven light and noise added."""
    pixels = image.astype(np.float32)
    if look.blur > 0:
        pixels = cv2.GaussianBlur(pixels, (0, 0), look.blur)
    light_angle = generator.uniform(0, 2 * np.pi)
    down, across = np.mgrid[-1 : 1 : image.shape[0] * 1j, -1 : 1 : image.shape[1] * 1j]
    # A linear ramp in a random direction: brightest at one side, darker by `light` at the other.
    brightness = 1 - look.light * (0.5 + 0.5 * (np.cos(light_angle) * across + np.sin(light_angle) * down) / np.sqrt(2))
    pixels = pixels * (look.gain * brightness)[..., None] + generator.normal(0, look.noise, pixels.shape)
    spoiled_image: NDArray[np.uint8] = pixels.round().clip(0, 255).astype(np.uint8)
    return spoiled_image


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
    board_poses: list[Float] = []
    board_centre = np.array([*board.size, 0.0]) / 2
    while len(board_poses) < count:
        rotation = cv2.Rodrigues(generator.uniform(-1, 1, 3) * [tilt, tilt, np.pi])[0]
        depth_m = generator.uniform(*distance)
        half_view = np.array([camera.width / camera.fx, camera.height / camera.fy]) / 2
        centre_position = np.array([*(generator.uniform(-0.9, 0.9, 2) * half_view * depth_m), depth_m])
        pose = np.eye(4)
        pose[:3, :3] = rotation
        pose[:3, 3] = centre_position - rotation @ board_centre
        points = board.corners @ rotation.T + pose[:3, 3]
        # Nearer than 5 cm or behind the camera.
        if (points[:, 2] < 0.05).any():
            continue
        pixels = camera.project(points)
        if ((pixels > 4) & (pixels < (camera.width - 5, camera.height - 5))).all(1).sum() >= corners:
            board_poses.append(pose)
    return board_poses
