"""Grasp planning for a parallel gripper from above, from an object's collision geometry.

Knows points, the Panda hand's box model and a score. Knows no episode, no controller and no task.
Lengths in m, angles in rad, all positions in the world frame; the hand points straight down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ratchet_sim.libero.simulator import mujoco

# The open hand in the frame of robosuite's grip site, measured from the model's collision geometry: x is the axis along
# which the fingers open, z points down.
APERTURE = 0.070
FINGER_INNER = 0.036
FINGER_OUTER = 0.066
FINGER_HALF_WIDTH = 0.012
TIP_BELOW = 0.010
PALM_ABOVE = 0.031
PALM_HALF_LENGTH = 0.105
PALM_HALF_WIDTH = 0.034
PALM_HEIGHT = 0.09
_RIM_DEPTH = 0.020
_FLOOR_GAP = 0.004
_SPACING = 0.015


@dataclass(frozen=True)
class Grasp:
    """A pose of the grip site above which the hand can come straight down, and its cost (lower is better).

    Attributes:
        position: (3,) m.
        yaw: rotation of the finger axis from world y, in [-pi/2, pi/2].
    """

    position: np.ndarray
    yaw: float
    cost: float
    kind: str


def rotation(yaw: float) -> np.ndarray:
    """(3, 3) orientation of the grip site: x along the fingers, z down."""
    sin_yaw = math.sin(yaw)
    cos_yaw = math.cos(yaw)
    return np.array([[-sin_yaw, cos_yaw, 0.0], [cos_yaw, sin_yaw, 0.0], [0.0, 0.0, -1.0]])


class Shapes:
    """Collision geometry of bodies as points. Vertices for meshes, a grid for boxes and everything else."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        self._geoms: dict[int, list[int]] = {}
        self._local: dict[int, np.ndarray] = {}

    def points(self, data: mujoco.MjData, body: int) -> np.ndarray:
        """(N, 3) points of the body and everything attached to it."""
        point_sets = [
            data.geom_xpos[geom] + self._samples(geom) @ data.geom_xmat[geom].reshape(3, 3).T
            for geom in self._collision_geoms(body)
        ]
        return np.concatenate(point_sets) if point_sets else data.xpos[body][None].copy()

    def _collision_geoms(self, body: int) -> list[int]:
        if body not in self._geoms:
            model = self._model
            body_tree = {body}
            for child in range(body + 1, model.nbody):  # parents have lower ids than their children
                if model.body_parentid[child] in body_tree:
                    body_tree.add(child)
            collides = model.geom_contype | model.geom_conaffinity
            self._geoms[body] = [
                geom for geom in range(model.ngeom) if model.geom_bodyid[geom] in body_tree and collides[geom]
            ]
        return self._geoms[body]

    def _samples(self, geom: int) -> np.ndarray:
        if geom not in self._local:
            model = self._model
            centre = model.geom_aabb[geom, :3]
            half_size = model.geom_aabb[geom, 3:]
            counts = np.clip(np.ceil(2 * half_size / _SPACING).astype(int) + 1, 2, 24)
            axis_samples = [np.linspace(-1, 1, count) for count in counts]
            grid = np.stack(np.meshgrid(*axis_samples, indexing="ij"), -1).reshape(-1, 3)
            # (n, 3) in the geom's own frame.
            samples = centre + half_size * grid
            if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
                mesh = model.geom_dataid[geom]
                first_vertex = model.mesh_vertadr[mesh]
                samples = np.array(
                    model.mesh_vert[first_vertex : first_vertex + model.mesh_vertnum[mesh]], dtype=np.float64
                )
            self._local[geom] = samples
        return self._local[geom]


def grasps(points: np.ndarray, obstacles: np.ndarray, current_yaw: float) -> list[Grasp]:
    """All feasible grasps of an object, best first.

    The whole object is taken where it fits between the fingers, else its rim. The cost prefers free space around
    fingers and palm, then little turning of the wrist.

    Args:
        points: (N, 3) of the object; obstacles: (M, 3) of everything else that must not be hit.
        current_yaw: of the hand, so that turning can be judged.
    """
    candidates = list(_centre_grasps(points, current_yaw)) or list(_rim_grasps(points, current_yaw))
    # Points farther than 25 cm from the object's middle are out of reach of the hand, whose palm is 21 cm long.
    near_obstacles = obstacles[np.linalg.norm(obstacles[:, :2] - points[:, :2].mean(0), axis=1) < 0.25]
    scored = [
        Grasp(grasp.position, grasp.yaw, grasp.cost + 0.05 * _hits(near_obstacles, grasp), grasp.kind)
        for grasp in candidates
    ]
    return sorted(scored, key=lambda grasp: grasp.cost)


def _height(low: float, high: float) -> float:
    """Height of the grip site on an object from `low` to `high`: at its middle, within reach of fingers and palm."""
    return max((low + high) / 2, high - PALM_ABOVE + 0.006, low + TIP_BELOW + _FLOOR_GAP)


def _centre_grasps(points: np.ndarray, current_yaw: float) -> Iterable[Grasp]:
    lowest = points[:, 2].min()
    highest = points[:, 2].max()
    height = _height(lowest, highest)
    # Half a turn is enough, because the two fingers are alike.
    for yaw in np.linspace(-math.pi / 2, math.pi / 2, 13):
        finger_axes = rotation(yaw)[:2, :2]
        finger_points = points[:, :2] @ finger_axes
        low_corner = finger_points.min(0)
        high_corner = finger_points.max(0)
        width = high_corner[0] - low_corner[0]
        if width <= APERTURE:
            centre_xy = finger_axes @ ((low_corner + high_corner) / 2)
            turn_angle = abs(yaw - current_yaw)
            yield Grasp(
                np.array([centre_xy[0], centre_xy[1], height]),
                yaw,
                0.02 * turn_angle + 0.5 * max(width - 0.055, 0.0),
                "centre",
            )


def _rim_grasps(points: np.ndarray, current_yaw: float) -> Iterable[Grasp]:
    centre = (points[:, :2].min(0) + points[:, :2].max(0)) / 2
    offset = points[:, :2] - centre
    azimuth = np.arctan2(offset[:, 1], offset[:, 0])
    radius = np.linalg.norm(offset, axis=1)
    for angle in np.linspace(-math.pi, math.pi, 24, endpoint=False):
        sector = np.abs((azimuth - angle + math.pi) % (2 * math.pi) - math.pi) < math.radians(20)
        if not sector.any():
            continue
        rim_top = points[sector, 2].max()
        # The topmost 6 mm of the sector are its rim.
        rim = sector & (points[:, 2] > rim_top - 0.006)
        distance = float(np.median(radius[rim]))
        direction = np.array([math.cos(angle), math.sin(angle)])
        # The finger axis is radial; yaw 0 is world y, and the fingers are alike, so that a half turn changes nothing.
        yaw = angle % math.pi - math.pi / 2
        rim_xy = centre + direction * (distance - 0.004)
        height = max(rim_top - _RIM_DEPTH, points[sector, 2].min() + TIP_BELOW + _FLOOR_GAP)
        yield Grasp(
            np.array([rim_xy[0], rim_xy[1], height]), yaw, 0.02 * abs(yaw - current_yaw) + 0.002 * abs(angle), "rim"
        )


def _hits(obstacles: np.ndarray, grasp: Grasp) -> int:
    """How many obstacle points lie in the volumes that fingers and palm sweep when they come down."""
    hand_points = (obstacles - grasp.position) @ rotation(grasp.yaw)
    across_fingers = np.abs(hand_points[:, 0])
    along_palm = np.abs(hand_points[:, 1])
    above_site = -hand_points[:, 2]
    fingers = (
        (across_fingers > FINGER_INNER)
        & (across_fingers < FINGER_OUTER)
        & (along_palm < FINGER_HALF_WIDTH + 0.004)
        & (above_site > -TIP_BELOW)
    )
    palm = (across_fingers < PALM_HALF_LENGTH) & (along_palm < PALM_HALF_WIDTH) & (above_site > PALM_ABOVE - 0.004)
    return int((fingers | palm).sum())
