"""Demonstrations make the base model: a label of another frame, or noise taken for intent, trains it wrongly.

Pinned: a sample's K labels are what was executed from its frame on, never a noise burst; noise is executed and
recovered from; failed attempts leave nothing; equal seeds give equal data whatever the number of processes; files give
the data back.
Determinism: frames of the fake task encode initial state and step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ratchet_sim import registry
from ratchet_sim.base import Expert, TaskEnv
from ratchet_sim.demonstrations import Demonstrations, NoiseConfig, collect, demonstrate
from ratchet_vla.contract import ActionDim, GripperSpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32
from tests.fakes import FakeTaskEnv

CHUNK = 4
NOISY = NoiseConfig(probability=0.25, length=3, scale=0.8, grip_flip=0.5)


class FakeRecordedEnv(FakeTaskEnv):
    """Remembers what was executed, by initial state; slow enough that an episode takes many steps."""

    def __init__(self, contract: RobotContract) -> None:
        super().__init__("metaworld", "door-open", contract)
        self.executed: dict[int, list[np.ndarray]] = {}

    def reset(self, initial_state: int) -> None:
        super().reset(initial_state)
        self.executed[initial_state] = []

    def step(self, action: Float32) -> None:
        super().step(action)
        self.executed[self.initial_state].append(np.array(action))


class FakeExpert(Expert):
    """Goes to the goal; its y command says at which step it was asked, so that a label names its origin."""

    def __init__(self, pace: float = 0.015) -> None:
        self.pace = pace
        self.asked: list[np.ndarray] = []

    def reset(self, env: TaskEnv) -> None:
        self.asked = []

    def act(self, env: TaskEnv) -> Float32:
        assert isinstance(env, FakeTaskEnv)
        self.asked.append(np.array([self.pace, env.steps / 1000, 0.01, 1.0], np.float32))
        return self.asked[-1].copy()


@pytest.fixture
def contract() -> RobotContract:
    return registry.contract_for("metaworld")


def gather(env: TaskEnv, expert: Expert, noise: NoiseConfig, seed: int = 0, stride: int = 1) -> Demonstrations:
    return demonstrate(
        env,
        expert,
        range(30),
        cameras=["corner2"],
        state_fields=["hand", "gripper"],
        chunk=CHUNK,
        stride=stride,
        noise=noise,
        seed=seed,
    )


def test_labels_are_what_was_executed_from_their_frame_on(contract: RobotContract) -> None:
    env = FakeRecordedEnv(contract)
    data = gather(env, FakeExpert(), NOISY)
    assert len(data) > 50
    for image, labels, start in zip(data.images, data.actions, data.start, strict=True):
        assert image[0, 0, 0, 0] == start
        t = int(image[0, 0, 1, 0])
        executed = env.executed[int(start)][t : t + CHUNK]
        assert executed, "a frame without a motion after it"
        np.testing.assert_array_equal(labels[: len(executed)], executed)
        np.testing.assert_array_equal(labels[len(executed) :], np.tile(executed[-1], (CHUNK - len(executed), 1)))
        assert labels[0, 1] == pytest.approx(t / 1000), "the expert's answer to another step"
    disturbed = [a for actions in env.executed.values() for t, a in enumerate(actions) if abs(a[1] - t / 1000) > 1e-6]
    assert len(disturbed) > 50, "nothing was disturbed, so the test shows nothing"
    assert all(contract.action.dims[i].low <= a[i] <= contract.action.dims[i].high for a in disturbed for i in range(4))
    assert {float(a[3]) for a in disturbed} == {-1.0, 1.0}, "some bursts invert the gripper, some do not"


def test_the_scene_is_that_of_the_frame(contract: RobotContract, tmp_path: Path) -> None:
    data = gather(FakeRecordedEnv(contract), FakeExpert(), NOISY)
    np.testing.assert_array_equal(data.scene, data.images[:, 0, 0, :2, 0])
    # A file from a recorder that did not know of scenes.
    older = dataclasses.replace(data, scene=np.zeros((0, 0), np.float32))
    assert older.scene.shape == (len(data), 0)
    older.save(tmp_path / "older.safetensors")
    assert Demonstrations.load(tmp_path / "older.safetensors").scene.shape == (len(data), 0)


def test_a_gripper_of_any_range_is_inverted_inside_it(contract: RobotContract) -> None:
    dims = (*contract.action.dims[:3], ActionDim("gripper", "m", 0.0, 1.5))
    action = dataclasses.replace(contract.action, dims=dims, gripper=GripperSpec("gripper", 1.5, 0.0))
    env = FakeRecordedEnv(dataclasses.replace(contract, action=action))
    gather(env, FakeExpert(), dataclasses.replace(NOISY, grip_flip=1.0))
    executed_values = {round(float(a[3]), 6) for actions in env.executed.values() for a in actions}
    assert executed_values == {1.0, 0.5}


def test_without_noise_every_frame_is_a_sample(contract: RobotContract) -> None:
    env = FakeRecordedEnv(contract)
    data = gather(env, FakeExpert(), NoiseConfig(probability=0.0))
    assert len(data) == sum(len(a) for a in env.executed.values())
    assert data.images.shape == (len(data), 1, 96, 96, 3)
    assert data.state.shape == (len(data), 4)
    assert (data.images.dtype, data.state.dtype, data.actions.dtype) == (np.uint8, np.float32, np.float32)


def test_stride_thins_each_episode_from_its_own_phase(contract: RobotContract) -> None:
    data = gather(FakeRecordedEnv(contract), FakeExpert(), NoiseConfig(probability=0.0), stride=3)
    steps = data.images[:, 0, 0, 1, 0].astype(int)
    phases = set()
    for start in np.unique(data.start):
        episode_steps = steps[data.start == start]
        assert set(np.diff(episode_steps)) == {3}
        phases.add(int(episode_steps[0]))
    assert phases == {0, 1, 2}


def test_failures_leave_nothing(contract: RobotContract) -> None:
    class Undecided(FakeExpert):
        def reset(self, env: TaskEnv) -> None:
            super().reset(env)
            assert isinstance(env, FakeTaskEnv)
            self.pace = 0.02 if env.initial_state % 2 else 0.0

    data = gather(FakeRecordedEnv(contract), Undecided(), NoiseConfig(probability=0.0))
    assert set(data.start % 2) == {1}
    with pytest.raises(RatchetError, match=r"sim\.no_demonstrations.*metaworld/door-open"):
        gather(FakeRecordedEnv(contract), FakeExpert(pace=0.0), NoiseConfig(probability=0.0))


def equal(first: Demonstrations, second: Demonstrations) -> bool:
    def same(a: object, b: object) -> bool:
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            return a.dtype == b.dtype and np.array_equal(a, b)
        return a == b

    return all(same(getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(first))


def test_the_seed_alone_decides(contract: RobotContract) -> None:
    first = gather(FakeRecordedEnv(contract), FakeExpert(), NOISY, seed=3)
    assert equal(first, gather(FakeRecordedEnv(contract), FakeExpert(), NOISY, seed=3))
    assert not equal(first, gather(FakeRecordedEnv(contract), FakeExpert(), NOISY, seed=4))


def test_files_give_back_what_was_saved(contract: RobotContract, tmp_path: Path) -> None:
    first = gather(FakeRecordedEnv(contract), FakeExpert(), NOISY)
    second = dataclasses.replace(first, tasks=["push"], instructions=["push the puck"])
    together = Demonstrations.concatenate([first, second])
    assert together.tasks == ["door-open", "push"]
    assert together.task.tolist() == [0] * len(first) + [1] * len(first)
    together.save(tmp_path / "data.safetensors")
    assert equal(Demonstrations.load(tmp_path / "data.safetensors"), together)


def test_processes_do_not_change_the_data() -> None:
    def run(processes: int) -> Demonstrations:
        return collect(
            "metaworld",
            ["door-open", "button-press"],
            [10_000, 10_001],
            cameras=["corner2"],
            state_fields=["hand"],
            chunk=5,
            stride=8,
            processes=processes,
        )

    two = run(2)
    assert equal(run(1), two)
    assert two.tasks == ["door-open", "button-press"]
    contract = registry.contract_for("metaworld")
    for i, dim in enumerate(contract.action.dims):
        assert two.actions[..., i].min() >= dim.low
        assert two.actions[..., i].max() <= dim.high
