"""Images and views of boards for the tests: drawn through a homography, without a renderer.

Knows an ideal camera without distortion. All randomness comes from seeds that the caller names.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import Detection
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.geometry import Float, inverse, small, transform

BOARD = Board()
CAMERA = CameraModel(640, 480, 610.0, 612.0, 325.0, 236.0)
LENS = CameraModel(640, 480, 610.0, 612.0, 325.0, 236.0, "brown5", (0.1, -0.2, 0.001, -0.0005, 0.0))
PIXELS = 40  # per square of the drawn board


def pose(
    turn: Sequence[float] | Float = (0.3, -0.2, 0.1), at: Sequence[float] = (0.0, 0.0, 0.45), board: Board = BOARD
) -> Float:
    """(4, 4) camera_T_board. turn: rotation vector. at: m, the board's middle in the camera's frame."""
    rotation = Rotation.from_rotvec(turn).as_matrix()
    return transform(rotation, np.array(at) - rotation @ np.array([*board.size, 0.0]) / 2)


def drawn(board: Board, board_in_camera: Float, camera: CameraModel = CAMERA, noise: float = 1.0) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: the board on grey."""
    board_image = board.image(PIXELS, margin=PIXELS // 2)
    # texture pixel -> metres on the board; a pixel's centre is at its index
    scale = board.square / PIXELS
    shift = -(PIXELS // 2) * scale + scale / 2
    texture = np.array([[scale, 0, shift], [0, scale, shift], [0, 0, 1]])
    plane = camera.matrix @ np.column_stack([board_in_camera[:3, 0], board_in_camera[:3, 1], board_in_camera[:3, 3]])
    fine = 3
    finer = np.array([[fine, 0, (fine - 1) / 2], [0, fine, (fine - 1) / 2], [0, 0, 1]])
    size = (camera.width * fine, camera.height * fine)
    big = cv2.warpPerspective(board_image, finer @ plane @ texture, size, flags=cv2.INTER_LINEAR, borderValue=150)
    image = cv2.resize(big, (camera.width, camera.height), interpolation=cv2.INTER_AREA).astype(float)
    image += np.random.default_rng(0).normal(0, noise, image.shape)
    return np.repeat(image.round().clip(0, 255).astype(np.uint8)[..., None], 3, 2)


def seen(board_in_camera: Float, name: str = "", camera: CameraModel = CAMERA, noise: float = 0.1, seed: int = 0,
         board: Board = BOARD) -> Detection:  # fmt: skip
    """What a detector would give of a board there. noise: px."""
    points = board.corners @ board_in_camera[:3, :3].T + board_in_camera[:3, 3]
    pixels = camera.project(points)
    ids = np.flatnonzero(((pixels > 0) & (pixels < (camera.width - 1, camera.height - 1))).all(1))
    generator = np.random.default_rng(seed)
    return Detection(ids, pixels[ids] + generator.normal(0, noise, (len(ids), 2)), (camera.width, camera.height), name)


def views(count: int, seed: int = 0, camera: CameraModel = CAMERA, noise: float = 0.1) -> list[Detection]:
    """Views all over the image, tilted to all sides."""
    return [seen(p, f"view {i}", camera, noise, 100 * seed + i) for i, p in enumerate(poses(count, seed))]


def poses(count: int, seed: int = 0) -> list[Float]:
    generator = np.random.default_rng(seed)
    board_poses = []
    for _ in range(count):
        z = generator.uniform(0.35, 0.6)
        at = [*(generator.uniform(-0.55, 0.55, 2) * [0.5 * z, 0.38 * z]), z]
        board_poses.append(pose(generator.uniform(-1, 1, 3) * [0.5, 0.5, 0.8], at))
    return board_poses


def arm(
    mounting: str = "eye_in_hand",
    count: int = 15,
    seed: int = 0,
    camera: CameraModel = CAMERA,
    noise: tuple[float, float, float] = (0.1, 0.0, 0.0),
) -> tuple[Float, Float, list[Float], list[Detection]]:
    """(camera, board, robot poses, views) of a hand-eye calibration. noise: px, rad, m per axis."""
    generator = np.random.default_rng(seed)
    if mounting == "eye_in_hand":
        x = transform(Rotation.from_rotvec([0.1, -0.05, 0.2]).as_matrix(), np.array([0.03, -0.05, 0.06]))
        y = transform(Rotation.from_euler("xyz", [0.1, 0.05, 1.0]).as_matrix(), np.array([0.5, 0.0, 0.02]))
    else:
        x = transform(Rotation.from_euler("xyz", [2.2, 0.1, 0.3]).as_matrix(), np.array([0.8, 0.1, 0.7]))
        y = transform(Rotation.from_euler("xyz", [0.1, 0.05, 1.0]).as_matrix(), np.array([0.05, 0.0, 0.1]))
    reported_poses = []
    detections = []
    for index, board_in_camera in enumerate(poses(count, seed)):
        chain = x @ board_in_camera @ inverse(y)
        flange = inverse(chain) if mounting == "eye_in_hand" else chain
        error = np.concatenate([generator.normal(0, noise[1], 3), generator.normal(0, noise[2], 3)])
        reported_poses.append(flange @ small(error))
        detections.append(seen(board_in_camera, f"view {index}", camera, noise[0], 1000 * seed + index))
    return x, y, reported_poses, detections
