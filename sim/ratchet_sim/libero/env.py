"""LiberoTaskEnv: one LIBERO task behind the TaskEnv interface, with resets that do not recompile the model.

Knows the simulator's episode state: physics, controller, gripper, sampling clock. What it shows and computes is
bitwise the benchmark's own `OffScreenRenderEnv` after `seed(0)`, `reset()` and `set_init_state()`; it only leaves out
work that nobody reads. Knows no policy and no vectorisation.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ratchet_sim.base import TaskEnv, TaskInfo
from ratchet_sim.libero.model import CONTROL_HZ, INTEGRATION, CompiledTask, acquire, release
from ratchet_sim.libero.osc import ObservationClock, Osc
from ratchet_sim.libero.simulator import mujoco
from ratchet_sim.libero.suites import initial_states, libero_suites, libero_task_info, libero_task_infos
from ratchet_sim.perturbations import moved_cameras
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.paths import ROBOTS
from ratchet_vla.records import Float32, UInt8

__all__ = ["CONTRACT", "LiberoTaskEnv", "libero_suites", "libero_task_info", "libero_task_infos", "with_image_size"]

CONTRACT = ROBOTS / "libero.yaml"
_STATE = {"eef_position": 3, "eef_rotation": 3, "gripper": 2}
_COMMANDS = 7


def with_image_size(contract: RobotContract, width: int, height: int) -> RobotContract:
    """The same contract with every camera at width x height pixels."""
    cameras = tuple(dataclasses.replace(camera, width=width, height=height) for camera in contract.cameras)
    return dataclasses.replace(contract, cameras=cameras)


class LiberoTaskEnv(TaskEnv):
    """One task of one suite.

    The model is compiled once per task and process, whatever the number of environments. `state` and `render` give
    what the benchmark's observation holds after the same steps, sampled as there up to a few milliseconds before the
    control step ends; `success` and `simulator_state` are of the end of the step. A frame is drawn when asked for.

    Args:
        suite, task: names as listed by `libero_suites` and `libero_task_infos`.
        contract: describes cameras, units and settle steps; None loads robots/libero.yaml.
        published_horizon: see `libero_task_infos`.
        perturbation: what is changed about the world, see `perturbations`; empty for the benchmark's own.

    Raises:
        RatchetError: sim.unknown_suite, sim.unknown_task, sim.suite_without_files, sim.contract_mismatch,
            sim.missing_package.
    """

    def __init__(
        self,
        suite: str,
        task: str,
        contract: RobotContract | None = None,
        *,
        published_horizon: bool = False,
        perturbation: str = "",
    ) -> None:
        self.info: TaskInfo = libero_task_info(suite, task, published_horizon=published_horizon)
        self.contract = contract if contract is not None else RobotContract.load(CONTRACT)
        self._settle = _check_contract(self.contract)
        dims = self.contract.action.dims
        self._low = np.array([dim.low for dim in dims], dtype=np.float32)
        self._high = np.array([dim.high for dim in dims], dtype=np.float32)
        # Division in float32: 0.05 m is then exactly command 1.0.
        self._scale = np.array([dim.command_scale for dim in dims], dtype=np.float32)
        gripper = self.contract.action.gripper
        assert gripper is not None  # _check_contract
        self._gripper_middle = (gripper.open + gripper.closed) / 2
        self._gripper_polarity = math.copysign(1.0, gripper.closed - gripper.open)
        self._states = initial_states(suite, task)
        # A moved camera changes only the contract, so the unperturbed model is shared.
        self._perturbation = "" if perturbation == "camera" else perturbation
        self._compiled: CompiledTask | None = acquire(suite, task, self._perturbation)
        compiled = self._compiled
        if perturbation == "camera":
            self.contract = moved_cameras(self.contract, compiled.model)
        self._data = mujoco.MjData(compiled.model)
        self._osc = Osc(compiled.osc, self._data)
        self._clock = ObservationClock(1.0 / CONTROL_HZ, compiled.timestep)
        self._frames: dict[str, UInt8] = {}
        try:
            self._cameras = {camera.name: _camera_id(compiled.model, camera.source) for camera in self.contract.cameras}
            self.reset(0)
        except RatchetError:
            self.close()
            raise

    @property
    def model(self) -> mujoco.MjModel:
        """The compiled model, shared: read only."""
        return self._open().model

    @property
    def data(self) -> mujoco.MjData:
        """The true simulator state, for experts and tests: read only."""
        self._open()
        return self._data

    @property
    def bodies(self) -> dict[str, int]:
        """Body id of every object and fixture of the task by its name in the BDDL file."""
        return self._open().object_body

    @property
    def goal(self) -> list[list[str]]:
        """The goal's predicates, such as [["in", "alphabet_soup_1", "basket_1_contain_region"]]."""
        return self._open().goal

    def reset(self, initial_state: int) -> None:
        compiled = self._open()
        data = self._data
        if not 0 <= initial_state < len(self._states):
            raise RatchetError(
                "sim.unknown_state",
                f"no initial state {initial_state}",
                where=f"{self.info.suite}/{self.info.name}",
                fix=f"ids go from 0 to {len(self._states) - 1}",
            )
        model = compiled.model
        state_vector = self._states[initial_state]
        mujoco.mj_resetData(model, data)
        # The state right after the benchmark's own reset, solver's warm start included; the initial state then
        # replaces positions and velocities.
        mujoco.mj_setState(model, data, compiled.start, INTEGRATION)
        data.time = state_vector[0]
        data.qpos[:] = state_vector[1 : 1 + model.nq]
        data.qvel[:] = state_vector[1 + model.nq :]
        mujoco.mj_forward(model, data)
        self._osc.reset()
        self._clock.reset()
        self._site_rgba = compiled.lights(data, compiled.site_rgba)
        self._sample(data.qpos.copy(), self._site_rgba)
        # The benchmark's settle steps: no motion, gripper open, so that objects come to rest before the first frame.
        rest_command = np.zeros(_COMMANDS)
        rest_command[-1] = -1.0
        for _ in range(self._settle):
            self._advance(rest_command)

    def step(self, action: Float32) -> None:
        action = np.asarray(action, dtype=np.float32)
        if action.shape != (_COMMANDS,) or not np.isfinite(action).all():
            raise RatchetError(
                "sim.bad_action",
                f"expected {_COMMANDS} finite values, got {action.tolist()}",
                where=self.info.name,
                fix="give one value per action dimension of the contract",
            )
        command = (np.clip(action, self._low, self._high) / self._scale).astype(np.float64)
        command[-1] = np.sign(float(action[-1]) - self._gripper_middle) * self._gripper_polarity
        self._advance(command)

    def success(self) -> bool:
        return self._open().succeeded(self._data)

    def state(self) -> dict[str, Float32]:
        values = {
            "eef_position": self._eef_position,
            "eef_rotation": _axis_angle(self._eef_quaternion),
            "gripper": self._fingers,
        }
        return {field.name: values[field.name].astype(np.float32) for field in self.contract.state}

    def render(self, camera: str) -> UInt8:
        camera_spec = self.contract.camera(camera)
        compiled = self._open()
        if camera not in self._frames:
            raw_image = compiled.render(camera_spec, self._cameras[camera], self._frame_qpos, self._frame_rgba)
            upright_image = np.rot90(raw_image, camera_spec.rotate // 90)
            self._frames[camera] = np.ascontiguousarray(upright_image[:, ::-1] if camera_spec.mirror else upright_image)
        return self._frames[camera].copy()

    def simulator_state(self) -> np.ndarray:
        """MuJoCo's integration state: time, positions, velocities, warm start, controls and applied forces."""
        model = self._open().model
        state = np.zeros(mujoco.mj_stateSize(model, INTEGRATION))
        mujoco.mj_getState(model, self._data, state, INTEGRATION)
        return state

    def close(self) -> None:
        if self._compiled is not None:
            self._compiled = None
            del self._data, self._osc
            release(self.info.suite, self.info.name, self._perturbation)

    def _open(self) -> CompiledTask:
        if self._compiled is None:
            raise RatchetError("sim.closed", "the environment was closed", where=self.info.name, fix="build a new one")
        return self._compiled

    def _advance(self, command: np.ndarray) -> None:
        """One control step of the benchmark. command: (7,) float64 in the controller's own units."""
        compiled = self._open()
        data = self._data
        osc = self._osc
        clock = self._clock
        model = compiled.model
        gripper = float(np.sign(command[-1]))
        for substep in range(compiled.physics_steps):
            mujoco.mj_step1(model, data)
            mujoco.mj_forwardSkip(model, data, mujoco.mjtStage.mjSTAGE_VEL, 1)
            if substep == 0:
                osc.set_goal(command[:-1])
            # Once per physics step, as robosuite does: the torques follow the arm within the control step.
            osc.control(gripper)
            if clock.tick():
                # The benchmark samples after the step, when positions of bodies are still those before it.
                qpos_before = data.qpos.copy()
                mujoco.mj_step2(model, data)
                self._sample(qpos_before, self._site_rgba)
            else:
                mujoco.mj_step2(model, data)
        self._site_rgba = compiled.lights(data, self._site_rgba)

    def _sample(self, qpos_drawn: np.ndarray, site_rgba: np.ndarray) -> None:
        compiled = self._open()
        data = self._data
        self._eef_position = data.site_xpos[compiled.osc.site].copy()
        self._eef_quaternion = data.xquat[compiled.hand_body][[1, 2, 3, 0]]
        self._fingers = data.qpos[compiled.finger_qpos].copy()
        self._frame_qpos = qpos_drawn
        self._frame_rgba = site_rgba
        self._frames.clear()


def _axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """(3,) rad from an xyzw quaternion, as robosuite's `quat2axisangle`, which policies are fed with."""
    real_part = min(max(float(quaternion[3]), -1.0), 1.0)
    denominator = math.sqrt(1.0 - real_part * real_part)
    # No rotation: the axis is undefined, robosuite returns zeros.
    if math.isclose(denominator, 0.0):
        return np.zeros(3)
    return quaternion[:3] * 2.0 * math.acos(real_part) / denominator


def _camera_id(model: mujoco.MjModel, source: str) -> int:
    camera_id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, source)
    if camera_id < 0:
        camera_names = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_CAMERA, index) for index in range(model.ncam)]
        raise _mismatch(f"the simulator has no camera '{source}'", f"cameras: {', '.join(camera_names)}")
    return int(camera_id)


def _check_contract(contract: RobotContract) -> int:
    """Refuse a contract that this simulator does not realise; returns the number of settle steps."""
    action = contract.action
    simulator = contract.simulator
    if simulator is None or simulator.kind != "libero" or simulator.steps_per_control != 1:
        raise _mismatch(f"contract '{contract.name}' is not LIBERO's", "use robots/libero.yaml")
    if contract.control_hz != CONTROL_HZ:
        raise _mismatch(f"LIBERO runs at {CONTROL_HZ} Hz, not {contract.control_hz}", "set control_hz")
    if action.control_mode != "ee_delta" or action.rotation != "axis_angle" or action.size != _COMMANDS:
        raise _mismatch("LIBERO takes 7 dimensions: position and axis-angle deltas, gripper", "correct `action`")
    if action.gripper is None or action.gripper.dim != action.dims[-1].name or not action.gripper.binary:
        raise _mismatch("LIBERO's gripper is binary and the last dimension", "correct `action.gripper`")
    for field in contract.state:
        if _STATE.get(field.name) != field.size:
            raise _mismatch(f"LIBERO has no state '{field.name}' of size {field.size}", f"fields: {_STATE}")
    return simulator.settle_steps


def _mismatch(what: str, fix: str) -> RatchetError:
    return RatchetError("sim.contract_mismatch", what, where="robots/libero.yaml", fix=fix)
