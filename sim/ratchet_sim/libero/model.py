"""Compiled LIBERO task, shared by every environment of that task in the process, and its renderer.

Knows the benchmark's domain object, its success predicate and what must be put back for a new episode.
Holds no episode: simulator data, controller and gripper belong to `LiberoTaskEnv`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ratchet_sim.gl import configure_gl, no_gl, require_gl
from ratchet_sim.libero.osc import OscLayout
from ratchet_sim.libero.simulator import mujoco, quiet, trim_memory
from ratchet_sim.libero.suites import bddl_path
from ratchet_sim.perturbations import change_model
from ratchet_vla.contract import CameraSpec
from ratchet_vla.records import UInt8

# Fixtures (cabinet, stove) are placed at random by a reset and are not part of an initial state. The seed is the one
# that the published evaluation scripts set (`env.seed(0)`), so that an initial state always means the same scene.
SCENE_SEED = 0
CONTROL_HZ = 20.0
# Integration state: everything from which MuJoCo continues, the solver's warm start and the controls included.
INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION
_compiled: dict[tuple[str, str, str], CompiledTask] = {}


class _Undrawn:
    """Replaces robosuite's render context while a scene is built: same physics calls, no OpenGL."""

    offscreen = True

    def __init__(self, sim: Any, device_id: int) -> None:
        self.vopt = mujoco.MjvOption()
        sim.forward()
        sim.add_render_context(self)


def _build(bddl: str) -> Any:
    """The benchmark's environment in the state that `seed(SCENE_SEED)` and `reset()` give a fresh one.

    A hard reset repeats what construction does, so one construction from the seed is enough, with one exception: every
    reset appends the samplers of doors and knobs once more, and their draws shift all that follow. Tasks that have any
    are reset in earnest. Every forward pass of the original stays in: the solver's warm start depends on their number.
    """
    import robosuite.environments.base as robosuite_base
    from libero.libero.envs.env_wrapper import ControlEnv
    from robosuite.utils.errors import RandomizationError

    original_context = robosuite_base.MjRenderContextOffscreen
    robosuite_base.MjRenderContextOffscreen = _Undrawn
    np.random.seed(SCENE_SEED)  # noqa: NPY002
    try:
        while True:
            try:
                env = ControlEnv(bddl_file_name=bddl, use_camera_obs=False, control_freq=CONTROL_HZ)
                break
            except RandomizationError:
                continue  # as `ControlEnv.reset` does: draw another placement
        if env.env.object_property_initializers:
            env.seed(SCENE_SEED)
            env.reset()
        else:
            env.env.sim.forward()
            env.env.visualize(dict.fromkeys(env.env._visualizations, False))
    finally:
        robosuite_base.MjRenderContextOffscreen = original_context
    return env


class CompiledTask:
    """A compiled model with the scene in place. Get one from `acquire`, give it back with `release`."""

    def __init__(self, suite: str, task: str, perturbation: str = "") -> None:
        bddl_file = bddl_path(suite, task)
        with quiet():
            random_state = np.random.get_state()  # noqa: NPY002 (robosuite draws from the global generator)
            try:
                env = _build(str(bddl_file))
            finally:
                np.random.set_state(random_state)  # noqa: NPY002
        self.users = 0
        self._domain: Any = env.env
        self._sim: Any = env.env.sim
        robot = self._domain.robots[0]
        self.model: mujoco.MjModel = self._sim.model._model
        if perturbation:
            change_model(self.model, perturbation, base=robot.robot_model.root_body)
            self._sim.forward()
            robot.controller.update(force=True)  # its goal is where the hand is now
            robot.controller.reset_goal()
        self.osc = OscLayout(self.model, robot)
        self.physics_steps = int(self._domain.control_timestep / self._domain.model_timestep)
        self.timestep: float = self._domain.model_timestep
        self.hand_body: int = self._sim.model.body_name2id(robot.robot_model.eef_name)
        self.finger_qpos: list[int] = list(robot._ref_gripper_joint_pos_indexes)
        self.object_body: dict[str, int] = dict(self._domain.obj_body_id)
        self.goal: list[list[str]] = self._domain.parsed_problem["goal_state"]
        self._tracked = bool(self._domain.tracking_object_states_change or self._domain.visualization_sites_list)
        self.site_rgba = self.model.site_rgba.copy()
        data = self._sim.data._data
        self.start = np.zeros(mujoco.mj_stateSize(self.model, INTEGRATION))
        mujoco.mj_getState(self.model, data, self.start, INTEGRATION)
        self._renderer: Renderer | None = None

    def succeeded(self, data: mujoco.MjData) -> bool:
        """The benchmark's predicate on this simulator state."""
        self._sim.data._data = data
        return bool(self._domain._check_success())

    def lights(self, data: mujoco.MjData, site_rgba: np.ndarray) -> np.ndarray:
        """Site colours after the benchmark's visual update (a burner glows), from those before; (nsite, 4) float32."""
        if not self._tracked:
            return site_rgba
        self._sim.data._data = data
        self.model.site_rgba[:] = site_rgba
        self._domain._post_process()
        updated_rgba: np.ndarray = self.model.site_rgba.copy()
        return updated_rgba

    def render(self, camera_spec: CameraSpec, camera: int, qpos: np.ndarray, site_rgba: np.ndarray) -> UInt8:
        """(H, W, 3) uint8 as OpenGL delivers it, of positions qpos: (nq,). Raises RatchetError sim.no_gl."""
        width = camera_spec.width
        height = camera_spec.height
        if self._tracked:
            self.model.site_rgba[:] = site_rgba
        if self._renderer is None:
            self._renderer = Renderer(self.model, width, height)
            self._posed = mujoco.MjData(self.model)
        # Only what is drawn is computed, in data of its own: no episode may notice that a frame was taken.
        self._posed.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self._posed)
        mujoco.mj_comPos(self.model, self._posed)
        mujoco.mj_camlight(self.model, self._posed)
        if camera_spec.position:
            self._posed.cam_xpos[camera] = camera_spec.position
        return self._renderer.render(camera, width, height, self._posed)

    def free(self) -> None:
        if self._renderer is not None:
            self._renderer.free()
            self._renderer = None


def acquire(suite: str, task: str, perturbation: str = "") -> CompiledTask:
    """Get the process's compiled model of this task, compiling it on first use. Pair each call with `release`."""
    task_key = (suite, task, perturbation)
    if task_key not in _compiled:
        _compiled[task_key] = CompiledTask(*task_key)
        trim_memory()
    _compiled[task_key].users += 1
    return _compiled[task_key]


def release(suite: str, task: str, perturbation: str = "") -> None:
    """Return a compiled model; it and its GL context are freed when no environment uses them."""
    compiled = _compiled[(suite, task, perturbation)]
    compiled.users -= 1
    if compiled.users == 0:
        compiled.free()
        del _compiled[(suite, task, perturbation)], compiled
        trim_memory()


class Renderer:
    """One off-screen GL context for one model, drawing exactly what robosuite's own context draws.

    The frame buffer is as large as the frames (robosuite's is 640x480 and is cleared and resolved in full).
    """

    def __init__(self, model: mujoco.MjModel, width: int, height: int) -> None:
        backend = configure_gl()
        require_gl(backend)
        from robosuite.utils.binding_utils import GLContext

        self._model = model
        self._size = (width, height)
        try:
            self._gl = GLContext(max_width=width, max_height=height, device_id=-1)
            self._gl.make_current()
        except (ImportError, RuntimeError, AttributeError) as error:
            raise no_gl(backend, str(error)) from None
        model.vis.global_.offwidth = width
        model.vis.global_.offheight = height
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._options = mujoco.MjvOption()
        # Group 0 is collision geometry, group 1 what is seen.
        self._options.geomgroup[0] = 0
        self._options.geomgroup[1] = 1
        self._perturb = mujoco.MjvPerturb()

    def render(self, camera: int, width: int, height: int, data: mujoco.MjData) -> UInt8:
        self._gl.make_current()
        if width > self._size[0] or height > self._size[1]:
            self._size = (max(width, self._size[0]), max(height, self._size[1]))
            mujoco.mjr_resizeOffscreen(*self._size, self._context)
        self._camera.fixedcamid = camera
        mujoco.mjv_updateScene(
            self._model, data, self._options, self._perturb, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, self._scene, self._context)
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(pixels, None, viewport, self._context)
        return pixels

    def free(self) -> None:
        self._gl.make_current()
        self._context.free()
        self._gl.free()
