"""Where a parallel gripper can take hold of an object from above, from the object's collision geometry.

Knows points, the Panda hand's box model and a score. Knows no episode, no controller and no task.
Lengths in m, angles in rad, all positions in the world frame; the hand points straight down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sim.libero_import import mujoco

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

    position: (3,) m; yaw: rotation of the finger axis from world y, in [-pi/2, pi/2].
    """

    position: np.ndarray
    yaw: float
    cost: float
    kind: str


def rotation(yaw: float) -> np.ndarray:
    """(3, 3) orientation of the grip site: x along the fingers, z down."""
    sin = math.sin(yaw)
    cos = math.cos(yaw)
    return np.array([[-sin, cos, 0.0], [cos, sin, 0.0], [0.0, 0.0, -1.0]])


class Shapes:
    """Collision geometry of bodies as points. Vertices for meshes, a grid for boxes and everything else."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        self._geoms: dict[int, list[int]] = {}
        self._local: dict[int, np.ndarray] = {}

    def points(self, data: mujoco.MjData, body: int) -> np.ndarray:
        """(N, 3) points of the body and everything attached to it."""
        parts = [
            data.geom_xpos[geom] + self._samples(geom) @ data.geom_xmat[geom].reshape(3, 3).T
            for geom in self._collision_geoms(body)
        ]
        return np.concatenate(parts) if parts else data.xpos[body][None].copy()

    def _collision_geoms(self, body: int) -> list[int]:
        if body not in self._geoms:
            model = self._model
            inside = {body}
            for child in range(body + 1, model.nbody):  # parents have lower ids than their children
                if model.body_parentid[child] in inside:
                    inside.add(child)
            solid = model.geom_contype | model.geom_conaffinity
            self._geoms[body] = [g for g in range(model.ngeom) if model.geom_bodyid[g] in inside and solid[g]]
        return self._geoms[body]

    def _samples(self, geom: int) -> np.ndarray:
        if geom not in self._local:
            model = self._model
            centre = model.geom_aabb[geom, :3]
            half = model.geom_aabb[geom, 3:]
            counts = np.clip(np.ceil(2 * half / _SPACING).astype(int) + 1, 2, 24)
            lines = [np.linspace(-1, 1, count) for count in counts]
            grid = np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, 3)
            samples = centre + half * grid
            if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
                mesh = model.geom_dataid[geom]
                first = model.mesh_vertadr[mesh]
                samples = np.array(model.mesh_vert[first : first + model.mesh_vertnum[mesh]], dtype=np.float64)
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
    found = list(_centre_grasps(points, current_yaw)) or list(_rim_grasps(points, current_yaw))
    near = obstacles[np.linalg.norm(obstacles[:, :2] - points[:, :2].mean(0), axis=1) < 0.25]
    judged = [Grasp(g.position, g.yaw, g.cost + 0.05 * _hits(near, g), g.kind) for g in found]
    return sorted(judged, key=lambda g: g.cost)


def _height(low: float, high: float) -> float:
    """Height of the grip site on an object from `low` to `high`: at its middle, within reach of fingers and palm."""
    return max((low + high) / 2, high - PALM_ABOVE + 0.006, low + TIP_BELOW + _FLOOR_GAP)


def _centre_grasps(points: np.ndarray, current_yaw: float) -> Iterable[Grasp]:
    low = points[:, 2].min()
    high = points[:, 2].max()
    z = _height(low, high)
    for yaw in np.linspace(-math.pi / 2, math.pi / 2, 13):
        axes = rotation(yaw)[:2, :2]
        along = points[:, :2] @ axes
        least = along.min(0)
        most = along.max(0)
        width = most[0] - least[0]
        if width <= APERTURE:
            xy = axes @ ((least + most) / 2)
            turn = abs(yaw - current_yaw)
            yield Grasp(np.array([xy[0], xy[1], z]), yaw, 0.02 * turn + 0.5 * max(width - 0.055, 0.0), "centre")


def _rim_grasps(points: np.ndarray, current_yaw: float) -> Iterable[Grasp]:
    centre = (points[:, :2].min(0) + points[:, :2].max(0)) / 2
    offset = points[:, :2] - centre
    azimuth = np.arctan2(offset[:, 1], offset[:, 0])
    radius = np.linalg.norm(offset, axis=1)
    for angle in np.linspace(-math.pi, math.pi, 24, endpoint=False):
        sector = np.abs((azimuth - angle + math.pi) % (2 * math.pi) - math.pi) < math.radians(20)
        if not sector.any():
            continue
        top = points[sector, 2].max()
        rim = sector & (points[:, 2] > top - 0.006)
        distance = float(np.median(radius[rim]))
        direction = np.array([math.cos(angle), math.sin(angle)])
        # The finger axis is radial; yaw 0 is world y, and the fingers are alike, so that a half turn changes nothing.
        yaw = angle % math.pi - math.pi / 2
        xy = centre + direction * (distance - 0.004)
        z = max(top - _RIM_DEPTH, points[sector, 2].min() + TIP_BELOW + _FLOOR_GAP)
        yield Grasp(np.array([xy[0], xy[1], z]), yaw, 0.02 * abs(yaw - current_yaw) + 0.002 * abs(angle), "rim")


def _hits(obstacles: np.ndarray, grasp: Grasp) -> int:
    """How many obstacle points lie in the volumes that fingers and palm sweep when they come down."""
    local = (obstacles - grasp.position) @ rotation(grasp.yaw)
    x = np.abs(local[:, 0])
    y = np.abs(local[:, 1])
    up = -local[:, 2]
    fingers = (x > FINGER_INNER) & (x < FINGER_OUTER) & (y < FINGER_HALF_WIDTH + 0.004) & (up > -TIP_BELOW)
    palm = (x < PALM_HALF_LENGTH) & (y < PALM_HALF_WIDTH) & (up > PALM_ABOVE - 0.004)
    return int((fingers | palm).sum())
