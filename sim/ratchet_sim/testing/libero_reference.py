"""Reference LIBERO environment: the benchmark's own, for parity tests and rollout benchmarks.

Knows `OffScreenRenderEnv` and nothing of how Ratchet avoids its costs. Not used by anything that learns or runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ratchet_sim.libero.model import INTEGRATION, SCENE_SEED
from ratchet_sim.libero.simulator import mujoco, quiet
from ratchet_sim.libero.suites import bddl_path, initial_states
from ratchet_vla.records import UInt8

SETTLE_STEPS = 10
REST = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)


class ReferenceLibero:
    """`OffScreenRenderEnv` as published evaluation scripts use it: recompiles on reset, renders at every step.

    Args:
        width, height: size of both cameras' frames.
    """

    def __init__(self, suite: str, task: str, width: int = 128, height: int = 128) -> None:
        with quiet():
            from libero.libero.envs.env_wrapper import OffScreenRenderEnv

            self.env: Any = OffScreenRenderEnv(
                bddl_file_name=str(bddl_path(suite, task)), camera_widths=width, camera_heights=height
            )
        self._states = initial_states(suite, task)
        self.observation: dict[str, np.ndarray] = {}

    def reset(self, initial_state: int) -> None:
        """Seed, reset (a recompile), write the initial state, settle."""
        self._make_current()
        with quiet():
            self.env.seed(SCENE_SEED)
            self.env.reset()
        self.observation = self.env.set_init_state(self._states[initial_state])
        for _ in range(SETTLE_STEPS):
            self.step(np.array(REST))

    def step(self, command: np.ndarray) -> None:
        """command: (7,) in the controller's units, [-1, 1]."""
        self._make_current()
        self.observation, _, _, _ = self.env.step(command)

    def success(self) -> bool:
        return bool(self.env.check_success())

    def images(self) -> dict[str, UInt8]:
        """Both cameras' frames of the last observation, upright."""
        observation_keys = {"agentview": "agentview_image", "wrist": "robot0_eye_in_hand_image"}
        return {
            camera: np.ascontiguousarray(self.observation[observation_key][::-1, ::-1])
            for camera, observation_key in observation_keys.items()
        }

    def simulator_state(self) -> np.ndarray:
        model = self.env.sim.model._model
        data = self.env.sim.data._data
        state = np.zeros(mujoco.mj_stateSize(model, INTEGRATION))
        mujoco.mj_getState(model, data, state, INTEGRATION)
        return state

    def close(self) -> None:
        self._make_current()
        self.env.close()

    def _make_current(self) -> None:
        """Make this environment's GL context the current one.

        robosuite draws into, and frees, whichever is current: without this, another environment's. No reference to the
        context may stay behind, or it is freed after its successor became current.
        """
        self.env.sim._render_context_offscreen.gl_ctx.make_current()
