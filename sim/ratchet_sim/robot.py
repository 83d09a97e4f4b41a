"""SimRobot: a simulated task behind the Robot protocol, so that a control loop cannot tell it from an arm.

Knows one TaskEnv and simulated time. Knows no policy and no ROS.
"""

from __future__ import annotations

import numpy as np

from ratchet_sim import registry
from ratchet_sim.base import TaskEnv
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, Observation

__all__ = ["SimRobot"]


class SimRobot:
    """One task of a suite as a robot. Time is simulated: it advances by one control period with every `act`.

    Args:
        suite, task: registry names.
        initial_state: id of the state that `connect` starts from.
    """

    def __init__(self, suite: str, task: str, initial_state: int, contract: RobotContract | None = None) -> None:
        self._info = registry.task(suite, task)
        self._contract = contract or registry.contract_for(suite)
        self._initial_state = initial_state
        self._env: TaskEnv | None = None
        self._steps = 0
        self._observations = 0

    @property
    def contract(self) -> RobotContract:
        return self._contract

    @property
    def instruction(self) -> str:
        return self._info.instruction

    def connect(self) -> None:
        if self._env is None:
            self._env = registry.make_env(self._info.suite, self._info.name, self._contract)
        self.reset(self._initial_state)

    def reset(self, initial_state: int) -> None:
        """Restore an initial state of the scene, as a person does on a real robot."""
        self._connected().reset(initial_state)
        self._steps = self._observations = 0

    def observe(self, cameras: bool = True) -> Observation:
        env = self._connected()
        images = {camera.name: env.render(camera.name) for camera in self._contract.cameras} if cameras else {}
        observation = Observation(
            images=images,
            state=env.state(),
            instruction=self._info.instruction,
            stamp=self._steps / self._contract.control_hz,
            sequence=self._observations,
        )
        self._observations += 1
        return observation

    def act(self, action: Float32) -> None:
        env = self._connected()
        command = np.asarray(action, np.float32)
        if command.shape != (self._contract.action.size,):
            raise RatchetError(
                "robot.bad_action",
                f"the action has shape {command.shape}, this robot takes ({self._contract.action.size},)",
                where=self._contract.name,
                fix="send one value per action dimension of the contract",
            )
        if not np.isfinite(command).all():
            bad_dims = [
                dim.name
                for dim, value in zip(self._contract.action.dims, command, strict=True)
                if not np.isfinite(value)
            ]
            raise RatchetError(
                "robot.bad_action",
                f"not finite: {', '.join(bad_dims)}",
                where=self._contract.name,
                fix="nothing was sent",
            )
        env.step(command)
        self._steps += 1

    def hold(self) -> None:
        """A simulation stands still between steps, so there is nothing to send."""

    def success(self) -> bool:
        """The benchmark's own predicate; a real robot has a person instead."""
        return self._connected().success()

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    def _connected(self) -> TaskEnv:
        if self._env is None:
            raise RatchetError("robot.not_connected", "the robot is not connected", fix="call connect() first")
        return self._env
