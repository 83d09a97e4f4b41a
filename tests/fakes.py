"""Stand-ins for simulator and robot: small, deterministic, named as what they are.

FakeTaskEnv is a one-dimensional reach: the state is a position, actions move it, success is being at the goal.
Its frames encode episode and step, so that a test can tell which observation a decision was made on.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from ratchet_sim.base import TaskEnv, TaskInfo
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, UInt8


class FakeTaskEnv(TaskEnv):
    """Reach `goal` from 0. The first pixel is the initial state, the second the number of steps so far."""

    def __init__(self, suite: str, task: str, contract: RobotContract) -> None:
        self.info = TaskInfo(suite, task, "reach", tuple(range(100, 140)), tuple(range(40)), 20)
        self.contract = contract
        self.initial_state = self.steps = 0
        self.position = np.zeros(3)
        self.sink = 0.0

    def reset(self, initial_state: int) -> None:
        self.initial_state, self.steps = initial_state, 0
        self.position = np.array([initial_state % 7, 0.0, 0.0]) * 0.001

    def step(self, action: Float32) -> None:
        self.steps += 1
        self.position = self.position + np.asarray(action[:3], np.float64)

    def success(self) -> bool:
        return bool(self.position[0] > 0.2)

    def state(self) -> dict[str, Float32]:
        return {"hand": self.position.astype(np.float32), "gripper": np.zeros(1, np.float32)}

    def render(self, camera: str) -> UInt8:
        spec = self.contract.camera(camera)
        image = np.zeros((spec.height, spec.width, 3), np.uint8)
        image[0, 0, 0], image[0, 1, 0] = self.initial_state % 256, self.steps % 256
        return image

    def scene(self) -> Float32:
        return np.array([self.initial_state, self.steps], np.float32)

    def simulator_state(self) -> np.ndarray:
        return np.concatenate([self.position, [self.steps]])

    def close(self) -> None:
        self.sink = 0.0


def make_fake(suite: str, task: str, contract: RobotContract) -> TaskEnv:
    """Builds a FakeTaskEnv; importable, so that worker processes can be given it."""
    return FakeTaskEnv(suite, task, contract)


class FakeSolvedEnv(FakeTaskEnv):
    """Nothing is left to do in it."""

    def success(self) -> bool:
        return True


def make_solved(suite: str, task: str, contract: RobotContract) -> TaskEnv:
    return FakeSolvedEnv(suite, task, contract)


class FakeHangingEnv(FakeTaskEnv):
    """Hangs once: at its third step, unless the marker file says that it already did."""

    def step(self, action: Float32) -> None:
        marker = Path(os.environ["FAKE_HANG_MARKER"])
        if self.steps == 2 and not marker.exists():
            marker.write_text("hung")
            while True:
                time.sleep(60)  # the fault itself, in the worker process; the test waits on its replacement
        super().step(action)


def make_hanging(suite: str, task: str, contract: RobotContract) -> TaskEnv:
    return FakeHangingEnv(suite, task, contract)


class FakeBrokenEnv(FakeTaskEnv):
    """Raises at its first step."""

    def step(self, action: Float32) -> None:
        raise ValueError("the simulation is unstable")


def make_broken(suite: str, task: str, contract: RobotContract) -> TaskEnv:
    return FakeBrokenEnv(suite, task, contract)


FORBIDDEN_STATE = 13


class FakeChoosyEnv(FakeTaskEnv):
    """Refuses one initial state, as a task does that lacks it."""

    def reset(self, initial_state: int) -> None:
        if initial_state == FORBIDDEN_STATE:
            raise RatchetError("sim.unknown_state", f"no initial state {initial_state}")
        super().reset(initial_state)


def make_choosy(suite: str, task: str, contract: RobotContract) -> TaskEnv:
    return FakeChoosyEnv(suite, task, contract)


def make_fatal(suite: str, task: str, contract: RobotContract) -> TaskEnv:
    """Takes the whole worker process down, as a crash inside a simulator does."""
    os._exit(1)


class FakeTwoSidedEnv(FakeTaskEnv):
    """The goal is ahead for even initial states and behind for odd ones; only the image tells."""

    def success(self) -> bool:
        return bool(self.position[0] * (1 if self.initial_state % 2 == 0 else -1) > 0.2)


def make_two_sided(suite: str, task: str, contract: RobotContract) -> TaskEnv:
    return FakeTwoSidedEnv(suite, task, contract)
