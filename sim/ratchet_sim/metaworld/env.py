"""Meta-World V3 as TaskEnv: all 50 tasks, benchmark physics and predicate, cheap frames.

Knows Meta-World's seeding, its controller units and its cameras. Knows no workers and no learning.
Physics runs on the benchmark's own compiled model. Frames come from a copy of it in which the arm's visual meshes are
thinned to about one vertex per centimetre: at 96 pixels that is below a pixel, and a frame costs 2 ms instead of 16-84.
"""

from __future__ import annotations

import atexit
import copy
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ratchet_sim import gl
from ratchet_sim.base import Expert, TaskEnv, TaskInfo, unknown_name
from ratchet_sim.metaworld.tasks import INSTRUCTIONS
from ratchet_sim.perturbations import change_model, moved_cameras
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, UInt8

gl.require_gl(gl.configure_gl())
# One software-rasteriser thread per process: worker processes already occupy every core.
os.environ.setdefault("LP_NUM_THREADS", "1")

import mujoco  # noqa: E402  (the GL backend must be chosen first)
from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # noqa: E402
from metaworld.policies import ENV_POLICY_MAP  # noqa: E402

SUITE = "metaworld"
# Meta-World has no list of initial states; its seeds are the ids. The two ranges never meet.
EVALUATION_STATES = tuple(range(100))
TRAIN_STATES = tuple(range(1000, 1400))
DEMONSTRATION_STATES = tuple(range(10_000, 11_000))
MAX_STATE = 1_000_000
HORIZON = 40  # control steps at 20 Hz; the experts of these tasks need 9-25
LONG_HORIZON = 80
LONG_TASKS = frozenset(
    {
        *("assembly", "basketball", "bin-picking", "box-close", "coffee-pull", "coffee-push", "disassemble", "hammer"),
        *("hand-insert", "handle-pull", "handle-pull-side", "lever-pull", "peg-insert-side", "peg-unplug-side"),
        *("pick-out-of-hole", "pick-place", "pick-place-wall", "push", "push-back", "push-wall", "shelf-place"),
        *("soccer", "stick-pull", "stick-push", "sweep", "sweep-into", "plate-slide-back"),
    }
)
VERTEX_SPACING = 0.01  # m, grid on which the visual meshes are thinned


def task_infos() -> list[TaskInfo]:
    """All 50 tasks; builds nothing."""
    return [
        TaskInfo(
            suite=SUITE,
            name=name,
            instruction=text,
            train_states=TRAIN_STATES,
            evaluation_states=EVALUATION_STATES,
            horizon=LONG_HORIZON if name in LONG_TASKS else HORIZON,
        )
        for name, text in INSTRUCTIONS.items()
    ]


class MetaWorldTaskEnv(TaskEnv):
    """One Meta-World task under `robots/metaworld.yaml`.

    Args:
        task: name without the version suffix, such as "door-open".
        contract: the robot's contract; cameras are rendered at its sizes.
        thin_meshes: False renders the benchmark's full meshes.
        perturbation: what is changed about the world, see `perturbations`; empty for the benchmark's own.
    """

    def __init__(self, task: str, contract: RobotContract, *, thin_meshes: bool = True, perturbation: str = "") -> None:
        if task not in INSTRUCTIONS:
            raise unknown_name("task", task, INSTRUCTIONS, "sim.unknown_task")
        self.info = next(info for info in task_infos() if info.name == task)
        self.contract = contract
        self._repeat = contract.simulator.steps_per_control if contract.simulator else 1
        self._scale = np.array([dim.command_scale for dim in contract.action.dims], np.float32)
        self._thin = thin_meshes
        env: Any = _compiled_once(task)()
        # Meta-World wants a task object first; the seed does the same work, so its guards are switched off.
        env._set_task_called = True
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)  # cached with the goal hidden
        env.max_path_length = np.inf  # the horizon is the caller's
        self.env = env
        self._perturbation = perturbation
        change_model(env.model, perturbation, base="base")
        if perturbation == "camera":
            self.contract = moved_cameras(contract, env.model)
        self._success = False
        self.last_observation = np.zeros(39)
        self._frames: _Frames | None = None

    def reset(self, initial_state: int) -> None:
        if not 0 <= initial_state < MAX_STATE:
            raise RatchetError(
                "sim.unknown_state",
                f"no initial state {initial_state}",
                where=f"{SUITE}/{self.info.name}",
                fix=f"use 0..{MAX_STATE - 1}",
            )
        start_key = (self.info.name, self._perturbation, initial_state)
        kept_start = _STARTS.get(start_key)
        # The first episode of a state pays the full reset, all later ones restore the copy.
        if kept_start is None:
            self.env.seed(initial_state)
            observation, _ = self.env.reset()
            kept_start = _keep_start(start_key, _Start(self.env, observation))
        else:
            kept_start.restore(self.env)
        self.last_observation = kept_start.observation.copy()
        self._success = False

    def step(self, action: Float32) -> None:
        command = np.clip(np.asarray(action, np.float32) / self._scale, -1.0, 1.0)
        for _ in range(self._repeat):
            # Within a control step too: the benchmark stops at the simulation step that succeeds.
            if self._success:
                return  # an episode ends at its first success
            self.last_observation, _, _, _, info = self.env.step(command)
            self._success = bool(info["success"])

    def success(self) -> bool:
        return self._success

    def state(self) -> dict[str, Float32]:
        observation = self.last_observation
        return {
            "hand": observation[:3].astype(np.float32),
            "gripper": observation[3:4].astype(np.float32),
        }

    def render(self, camera: str) -> UInt8:
        if self._frames is None:
            self._frames = _shared_frames(self._perturbation, self.info.name, self.env.model, self.contract, self._thin)
        image: UInt8 = self._frames.render(camera, self.env)
        return image

    def scene(self) -> Float32:
        observation = self.last_observation
        return np.concatenate([observation[4:7], observation[11:14], observation[36:39]]).astype(np.float32)

    def simulator_state(self) -> np.ndarray:
        model = self.env.model
        data = self.env.data
        state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        return state

    def close(self) -> None:
        self._frames = None
        self.env.close()


class _Start:
    """A task as its reset left it.

    Meta-World's reset runs 500 simulator steps, twice what many episodes take, and GRPO starts every state several
    times: a copy costs 1 ms.

    Everything is copied that a reset, a step or a perturbation writes, so what follows is the same bit by bit; the
    tests compare all of the model and the data.
    """

    MODEL = ("body_pos", "body_quat", "site_pos", "site_quat", "site_rgba", "site_size", "geom_pos", "geom_quat")
    PLAIN = (bool, int, float, str, list, tuple, np.ndarray, np.generic, np.random.Generator, type(None))

    def __init__(self, env: Any, observation: np.ndarray) -> None:
        self.observation = observation.copy()
        self.model = {name: getattr(env.model, name).copy() for name in self.MODEL}
        self.data = copy.copy(env.data)
        self.plain = {
            attribute: copy.deepcopy(value)
            for attribute, value in env.__dict__.items()
            if isinstance(value, self.PLAIN)
        }

    def restore(self, env: Any) -> None:
        """Put an environment of the same task there."""
        for name, values in self.model.items():
            getattr(env.model, name)[:] = values
        env.data = copy.copy(self.data)
        env.__dict__.update({attribute: copy.deepcopy(value) for attribute, value in self.plain.items()})
        # These two are no values of the start but views of the data, which was exchanged.
        env.init_left_pad = env.get_body_com("leftpad")
        env.init_right_pad = env.get_body_com("rightpad")


_STARTS: dict[tuple[str, str, int], _Start] = {}
STARTS = 600  # kept per process, 0.2 MB each


def _keep_start(key: tuple[str, str, int], start: _Start) -> _Start:
    while len(_STARTS) >= STARTS:
        _STARTS.pop(next(iter(_STARTS)))
    _STARTS[key] = start
    return start


class _Frames:
    """The visual model of one task and its renderers, shared by all environments of that task in a process."""

    # What a reset may change in the physics model and a viewer would see.
    SYNCED = ("geom_rgba", "geom_size", "geom_pos", "geom_quat", "site_rgba", "site_size", "site_pos")

    def __init__(self, model: mujoco.MjModel, contract: RobotContract, thin: bool) -> None:
        self.contract = contract
        self.thin = thin
        # A model of its own: thinning must not reach the physics model.
        self.model = copy.copy(model)
        if thin:
            thin_meshes(self.model, VERTEX_SPACING)
            self.model.vis.quality.offsamples = 0
        self.renderers: dict[str, mujoco.Renderer] = {}

    def render(self, camera: str, env: Any) -> UInt8:
        camera_spec = self.contract.camera(camera)
        if camera not in self.renderers:
            renderer = mujoco.Renderer(self.model, camera_spec.height, camera_spec.width)
            _close_frames_first_at_exit()
            if self.thin:
                for field in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE"):
                    renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{field}")] = 0
            self.renderers[camera] = renderer
        # What a reset moved is copied before each frame; it is a few kilobytes.
        for field in self.SYNCED:
            getattr(self.model, field)[:] = getattr(env.model, field)
        if camera_spec.position:
            # The pose that drawing uses lies in the data; it feeds back into nothing.
            env.data.cam_xpos[env.model.camera(camera_spec.source).id] = camera_spec.position
        renderer = self.renderers[camera]
        renderer.update_scene(env.data, camera_spec.source)
        image: UInt8 = renderer.render()
        if camera_spec.rotate:
            image = np.rot90(image, camera_spec.rotate // 90)
        if camera_spec.mirror:
            image = image[:, ::-1]
        return np.ascontiguousarray(image)

    def close(self) -> None:
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers.clear()


_FRAMES: dict[tuple[str, str, str, bool], _Frames] = {}


def close_frames() -> None:
    """Close every renderer that is kept between environments."""
    for frames in _FRAMES.values():
        frames.close()
    _FRAMES.clear()


def _close_frames_first_at_exit() -> None:
    """Let GL contexts go before the display does.

    MuJoCo and robosuite have the display closed by exit handlers that they register with their first context, and
    handlers run in reverse order: so this goes to the end again and again.
    """
    atexit.unregister(close_frames)
    atexit.register(close_frames)


_CLASSES: dict[str, type] = {}


def _shared_frames(perturbation: str, task: str, model: mujoco.MjModel, contract: RobotContract, thin: bool) -> _Frames:
    frames_key = (perturbation, task, contract.id, thin)
    if frames_key not in _FRAMES:
        if len(_FRAMES) >= 6:  # every entry holds a copy of the model and a GL context
            _FRAMES.pop(next(iter(_FRAMES))).close()
        _FRAMES[frames_key] = _Frames(model, contract, thin)
    return _FRAMES[frames_key]


def _compiled_once(task: str) -> type:
    """The task's class, compiling its model on first use and copying the compiled model afterwards."""
    if task not in _CLASSES:
        benchmark_class: Any = ALL_V3_ENVIRONMENTS[f"{task}-v3"]
        compiled_models: list[mujoco.MjModel] = []

        def initialize(self: Any) -> tuple[mujoco.MjModel, mujoco.MjData]:
            if not compiled_models:
                compiled_models.append(mujoco.MjModel.from_xml_path(self.fullpath))
            model = copy.copy(compiled_models[0])
            model.vis.global_.offwidth = self.width
            model.vis.global_.offheight = self.height
            return model, mujoco.MjData(model)

        _CLASSES[task] = type(benchmark_class.__name__, (benchmark_class,), {"_initialize_simulation": initialize})
    return _CLASSES[task]


def thin_meshes(model: mujoco.MjModel, spacing: float) -> None:
    """Collapse the faces of large meshes onto about one vertex per `spacing` metres, in place.

    Vertex clustering (Rossignac and Borrel 1993): each grid cell keeps the vertex nearest to its mean. Vertices stay
    where they are, only the list of drawn faces becomes shorter, so positions and materials are untouched.
    For models used for rendering only: mesh collision would see the thinned faces.
    """
    for mesh in range(model.nmesh):
        face_count = int(model.mesh_facenum[mesh])
        # Meshes below 300 faces are cheap to draw as they are.
        if face_count < 300:
            continue
        first_vertex = model.mesh_vertadr[mesh]
        vertex_count = model.mesh_vertnum[mesh]
        first_face = model.mesh_faceadr[mesh]
        points = model.mesh_vert[first_vertex : first_vertex + vertex_count].astype(np.float64)
        triangles = model.mesh_face[first_face : first_face + face_count].copy()
        # (vertices,) index of the grid cell of each vertex.
        _, cell_of_vertex = np.unique(np.floor(points / spacing).astype(np.int64), axis=0, return_inverse=True)
        cell_of_vertex = cell_of_vertex.ravel()
        cell_means = (
            np.stack([np.bincount(cell_of_vertex, points[:, axis]) for axis in range(3)], 1)
            / np.bincount(cell_of_vertex)[:, None]
        )
        by_distance = np.lexsort((np.linalg.norm(points - cell_means[cell_of_vertex], axis=1), cell_of_vertex))
        kept_vertex = by_distance[np.searchsorted(cell_of_vertex[by_distance], np.arange(cell_of_vertex.max() + 1))]
        thinned = kept_vertex[cell_of_vertex[triangles]]
        is_proper = (
            (thinned[:, 0] != thinned[:, 1]) & (thinned[:, 1] != thinned[:, 2]) & (thinned[:, 0] != thinned[:, 2])
        )
        # Several faces may collapse onto the same three vertices; one is enough.
        _, first_of_each = np.unique(np.sort(thinned[is_proper], axis=1), axis=0, return_index=True)
        kept_faces = np.flatnonzero(is_proper)[np.sort(first_of_each)]
        model.mesh_face[first_face : first_face + len(kept_faces)] = thinned[kept_faces]
        model.mesh_facenormal[first_face : first_face + len(kept_faces)] = model.mesh_facenormal[
            first_face + kept_faces
        ]
        model.mesh_facenum[mesh] = len(kept_faces)


class MetaWorldExpert(Expert):
    """Meta-World's own scripted policy of a task, queried at the contract's control rate."""

    def __init__(self, task: str) -> None:
        if f"{task}-v3" not in ENV_POLICY_MAP:
            raise unknown_name("task", task, INSTRUCTIONS, "sim.unknown_task")
        policies: Mapping[str, Callable[[], Any]] = ENV_POLICY_MAP  # declared as classes of the abstract base
        self._make = policies[f"{task}-v3"]
        self._policy = self._make()

    def reset(self, env: TaskEnv) -> None:
        self._policy = self._make()

    def act(self, env: TaskEnv) -> Float32:
        assert isinstance(env, MetaWorldTaskEnv)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            command = self._policy.get_action(env.last_observation)
        scale = np.array([dim.command_scale for dim in env.contract.action.dims], np.float32)
        action: Float32 = (np.clip(command, -1.0, 1.0) * scale).astype(np.float32)
        return action
