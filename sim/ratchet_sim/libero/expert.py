"""Scripted pick-and-place expert for LIBERO: one state machine over the simulator's true state.

Knows goals of the form "object in region" and "object on object". Every decision is taken anew from the current
state, so that it carries on from wherever noise, a slip or a bump has led. Needs no frames.
"""

from __future__ import annotations

import math

import numpy as np

from ratchet_sim.base import Expert, TaskEnv
from ratchet_sim.libero.env import LiberoTaskEnv
from ratchet_sim.libero.grasp import Grasp, Shapes, grasps, rotation
from ratchet_sim.libero.simulator import mujoco
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32

_GAIN = 1.5
_STEP = 0.05
_TURN = 0.3
_OPEN = -1.0
_CLOSED = 1.0
_ABOVE = 0.06
_CLOSE_STEPS = 12
_OPEN_STEPS = 10
_PATIENCE = {
    "reach": 90,
    "descend": 40,
    "close": 20,
    "lift": 40,
    "carry": 90,
    "lower": 40,
    "release": 20,
    "retreat": 40,
}


class LiberoExpert(Expert):
    """Picks the goal's object up and puts it where the goal says.

    Raises:
        RatchetError: expert.unsupported_goal in `reset` for goals that are not a single pick-and-place.
    """

    def reset(self, env: TaskEnv) -> None:
        env = _libero(env)
        goal_predicates = env.goal
        if (
            len(goal_predicates) != 1
            or len(goal_predicates[0]) != 3
            or goal_predicates[0][0] not in ("in", "on")
            or goal_predicates[0][1] not in env.bodies
        ):
            raise RatchetError(
                "expert.unsupported_goal",
                f"goal {goal_predicates} is not one object to be put in or on something",
                where=env.info.name,
                fix="use tasks with a single 'in' or 'on' goal",
            )
        _, self._object, self._target = goal_predicates[0]
        self._shapes = Shapes(env.model)
        self._site = mujoco.mj_name2id(env.model, mujoco.mjtObj.mjOBJ_SITE, "gripper0_grip_site")
        self._region = mujoco.mj_name2id(env.model, mujoco.mjtObj.mjOBJ_SITE, self._target)
        self._support = self._target if self._target in env.bodies else self._region_owner(env)
        self._failed: list[Grasp] = []
        self._enter("reach")
        self._grasp: Grasp | None = None

    def act(self, env: TaskEnv) -> Float32:
        env = _libero(env)
        # Patience per phase: a phase that takes longer has failed, and the next grasp is tried.
        self._age += 1
        if self._age > _PATIENCE[self._phase]:
            self._give_up()
        # A phase may hand over to another one within the same step; four hand-overs are more than the graph has.
        for _ in range(4):
            phase = self._phase
            action: Float32 = getattr(self, f"_{phase}")(env)
            if self._phase == phase:
                break
        return action

    # Each phase returns the action, or changes the phase.

    def _reach(self, env: LiberoTaskEnv) -> Float32:
        if self._grasp is None:
            self._grasp = self._plan(env)
        goal_position = self._grasp.position + np.array([0.0, 0.0, _ABOVE])
        position = self._position(env)
        distance = float(np.linalg.norm(position[:2] - goal_position[:2]))
        # Far away: first rise above everything in between, then go across, then come down.
        if distance > 0.03:
            goal_position[2] = max(
                goal_position[2], self._clearance(env, position, goal_position, {self._object}) + 0.03
            )
            if position[2] < goal_position[2] - 0.03:
                goal_position[:2] = position[:2]  # straight up first
        elif self._aligned(env) and distance < 0.008 and abs(position[2] - goal_position[2]) < 0.03:
            self._enter("descend")
        return self._move(env, goal_position, self._grasp.yaw, _OPEN)

    def _descend(self, env: LiberoTaskEnv) -> Float32:
        grasp = self._held_grasp()
        position = self._position(env)
        if np.linalg.norm(position[:2] - grasp.position[:2]) > 0.02:
            self._replan()
        elif position[2] < grasp.position[2] + 0.004 or (self._age > 12 and self._still(env)):
            self._enter("close")
        return self._move(env, grasp.position, grasp.yaw, _OPEN, step_limit=0.035)

    def _close(self, env: LiberoTaskEnv) -> Float32:
        grasp = self._held_grasp()
        if self._age > _CLOSE_STEPS:
            self._hold = self._object_in_hand(env)
            # Fixed now: something that comes along by accident must not raise the height that clears it.
            position = self._position(env)
            self._height = self._carry_height(env, position, self._place(env))
            self._enter("lift")
        return self._move(env, grasp.position, grasp.yaw, _CLOSED)

    def _lift(self, env: LiberoTaskEnv) -> Float32:
        grasp = self._held_grasp()
        if self._dropped(env):
            self._give_up()
            return self._rise(env, 0.05)
        if self._position(env)[2] > self._height - 0.02:
            self._enter("carry")
        goal_position = np.array([*grasp.position[:2], self._height])
        return self._move(env, goal_position, grasp.yaw, _CLOSED)

    def _carry(self, env: LiberoTaskEnv) -> Float32:
        grasp = self._held_grasp()
        if self._dropped(env):
            self._give_up()
            return self._rise(env, 0.05)
        position = self._position(env)
        place_position = self._place(env)
        if np.linalg.norm(position[:2] - place_position[:2]) < 0.012:
            self._enter("lower")
        goal_position = np.array(
            [*(place_position[:2] if position[2] > self._height - 0.03 else position[:2]), self._height]
        )
        return self._move(env, goal_position, grasp.yaw, _CLOSED)

    def _lower(self, env: LiberoTaskEnv) -> Float32:
        grasp = self._held_grasp()
        position = self._position(env)
        place_position = self._place(env)
        if self._dropped(env):
            self._give_up()
        elif np.linalg.norm(position[:2] - place_position[:2]) > 0.04:
            self._enter("carry")
        elif position[2] < place_position[2] + 0.005 or (self._age > 12 and self._still(env)):
            self._enter("release")
        return self._move(env, place_position, grasp.yaw, _CLOSED, step_limit=0.03)

    def _release(self, env: LiberoTaskEnv) -> Float32:
        if self._age > _OPEN_STEPS:
            self._enter("retreat")
        return self._move(env, self._position(env), self._held_grasp().yaw, _OPEN)

    def _retreat(self, env: LiberoTaskEnv) -> Float32:
        # Up and out of the way; when the goal still is not met, start again from what is there.
        if self._age > 20 and not env.success():
            self._failed.clear()
            self._replan()
        return self._rise(env, 0.04 if self._age < 12 else 0.0)

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._age = 0

    def _replan(self) -> None:
        self._grasp = None
        self._enter("reach")

    def _give_up(self) -> None:
        """Remember that this grasp did not work and try the next one."""
        if self._grasp is not None and self._phase not in ("release", "retreat"):
            self._failed.append(self._grasp)
        self._replan()

    def _plan(self, env: LiberoTaskEnv) -> Grasp:
        data = env.data
        body_ids = env.bodies
        obstacle_points = [self._shapes.points(data, body) for name, body in body_ids.items() if name != self._object]
        candidates = grasps(
            self._shapes.points(data, body_ids[self._object]), np.concatenate(obstacle_points), self._yaw(env)
        )
        untried = [
            candidate for candidate in candidates if not any(_alike(candidate, failed) for failed in self._failed)
        ]
        if not untried:
            self._failed.clear()
            untried = candidates
        if not untried:
            raise RatchetError("expert.no_grasp", f"no grasp for '{self._object}'", where=env.info.name)
        return untried[0]

    def _place(self, env: LiberoTaskEnv) -> np.ndarray:
        """(3,) where the grip site must be for the object to stand over its goal, given how it is held."""
        data = env.data
        points = self._shapes.points(data, env.bodies[self._object])
        support = self._shapes.points(data, env.bodies[self._support])
        position = self._position(env)
        object_position = self._object_position(env)
        # How far the held object reaches below the grip site.
        hanging = position[2] - points[:, 2].min()
        if self._region >= 0:
            centre = data.site_xpos[self._region]
            height = max(support[:, 2].max() - 0.02, support[:, 2].min() + hanging + 0.02)
        else:
            centre = data.xpos[env.bodies[self._support]]
            support_under = support[np.linalg.norm(support[:, :2] - centre[:2], axis=1) < 0.05]
            height = (support_under if len(support_under) else support)[:, 2].max() + hanging + 0.002
        return np.array([*(centre[:2] + position[:2] - object_position[:2]), height])

    def _carry_height(self, env: LiberoTaskEnv, position: np.ndarray, place_position: np.ndarray) -> float:
        points = self._shapes.points(env.data, env.bodies[self._object])
        hanging = float(position[2] - points[:, 2].min())
        clear_height = self._clearance(env, position, place_position, {self._object}) + max(hanging, 0.01) + 0.05
        return max(clear_height, float(place_position[2]) + 0.03)

    def _clearance(
        self, env: LiberoTaskEnv, start_position: np.ndarray, end_position: np.ndarray, skipped_names: set[str]
    ) -> float:
        """Height of the highest thing near the straight line from start to end."""
        point_sets = [
            self._shapes.points(env.data, body) for name, body in env.bodies.items() if name not in skipped_names
        ]
        points = np.concatenate(point_sets)
        line_xy = end_position[:2] - start_position[:2]
        # Nearest point of the line to each point, as a share of its length.
        line_share = np.clip((points[:, :2] - start_position[:2]) @ line_xy / max(float(line_xy @ line_xy), 1e-9), 0, 1)
        is_near = np.linalg.norm(points[:, :2] - (start_position[:2] + line_share[:, None] * line_xy), axis=1) < 0.10
        return float(points[is_near, 2].max()) if is_near.any() else -math.inf

    def _move(
        self,
        env: LiberoTaskEnv,
        goal_position: np.ndarray,
        yaw: float | None,
        gripper: float,
        step_limit: float = _STEP,
    ) -> Float32:
        action = np.zeros(7)
        action[:3] = np.clip(_GAIN * (goal_position - self._position(env)), -step_limit, step_limit)
        if yaw is not None:
            rotation_error = rotation(yaw) @ self._orientation(env).T
            action[3:6] = np.clip(_rotation_vector(rotation_error), -_TURN, _TURN)
        action[6] = gripper
        return action.astype(np.float32)

    def _rise(self, env: LiberoTaskEnv, height: float) -> Float32:
        return self._move(env, self._position(env) + np.array([0.0, 0.0, height]), None, _OPEN)

    def _held_grasp(self) -> Grasp:
        assert self._grasp is not None  # every phase after "reach" has one
        return self._grasp

    def _position(self, env: LiberoTaskEnv) -> np.ndarray:
        return np.array(env.data.site_xpos[self._site])

    def _orientation(self, env: LiberoTaskEnv) -> np.ndarray:
        return np.array(env.data.site_xmat[self._site].reshape(3, 3))

    def _yaw(self, env: LiberoTaskEnv) -> float:
        finger_axis = self._orientation(env)[:2, 0]
        return math.atan2(-finger_axis[0], finger_axis[1])

    def _aligned(self, env: LiberoTaskEnv) -> bool:
        rotation_error = rotation(self._held_grasp().yaw) @ self._orientation(env).T
        return bool(np.linalg.norm(_rotation_vector(rotation_error)) < 0.08)

    def _still(self, env: LiberoTaskEnv) -> bool:
        return bool(np.abs(env.data.qvel[:7]).max() < 0.05)

    def _object_position(self, env: LiberoTaskEnv) -> np.ndarray:
        return np.array(env.data.xpos[env.bodies[self._object]])

    def _object_in_hand(self, env: LiberoTaskEnv) -> np.ndarray:
        offset: np.ndarray = (self._object_position(env) - self._position(env)) @ self._orientation(env)
        return offset

    def _dropped(self, env: LiberoTaskEnv) -> bool:
        return bool(np.linalg.norm(self._object_in_hand(env) - self._hold) > 0.03)

    def _region_owner(self, env: LiberoTaskEnv) -> str:
        """The object or fixture that a goal region belongs to: the longest name that begins the region's."""
        owners = [name for name in env.bodies if self._target.startswith(name)]
        if self._region < 0 or not owners:
            raise RatchetError(
                "expert.unsupported_goal", f"'{self._target}' is no place on an object", where=env.info.name
            )
        return max(owners, key=len)


def _alike(first: Grasp, second: Grasp) -> bool:
    return bool(np.linalg.norm(first.position - second.position) < 0.015 and abs(first.yaw - second.yaw) < 0.2)


def _rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """(3,) axis times angle of a rotation matrix, angle in [0, pi]."""
    quaternion = np.zeros(4)
    vector = np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(matrix).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def _libero(env: TaskEnv) -> LiberoTaskEnv:
    if not isinstance(env, LiberoTaskEnv):
        raise RatchetError("expert.wrong_env", f"{type(env).__name__} is not a LIBERO task", fix="use LiberoTaskEnv")
    return env


# Suites whose every goal is one object in or on one place, perturbed versions included.
_SUPPORTED = ("libero_object", "libero_spatial")


def make_libero_expert(suite: str, name: str) -> LiberoExpert:
    """The expert of a task of LIBERO-Object or LIBERO-Spatial, or of a perturbed version of these.

    Raises:
        RatchetError: sim.no_expert for other suites.
    """
    if not suite.startswith(_SUPPORTED):
        raise RatchetError(
            "sim.no_expert", f"no scripted expert for {suite}/{name}", fix=f"experts cover {', '.join(_SUPPORTED)}"
        )
    return LiberoExpert()
