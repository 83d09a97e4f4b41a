"""Meta-World carries the demo and the study: had cheap frames or fast resets changed its physics, every figure lies.

Pinned: physics bitwise equal to the benchmark's own environment, resets that leak nothing, frames close to the full
meshes, experts that succeed. Determinism: initial states are seeds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ratchet_sim import registry
from ratchet_sim.metaworld import env as metaworld
from ratchet_sim.metaworld.env import EVALUATION_STATES, TRAIN_STATES, MetaWorldTaskEnv
from ratchet_sim.metaworld.tasks import INSTRUCTIONS
from ratchet_vla.errors import RatchetError

import mujoco  # isort: skip  (after sim, which chooses the GL back end)
from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # isort: skip

TASKS = ["door-open", "push", "button-press-topdown", "peg-insert-side"]


def commands(count: int) -> np.ndarray:
    return np.random.default_rng(7).uniform(-1, 1, (count, 4)).astype(np.float32)


def state_of(env: Any) -> np.ndarray:
    model = env.model
    data = env.data
    state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    return state


def benchmark_trajectory(task: str, state: int, plan: np.ndarray) -> list[np.ndarray]:
    env = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
    env._set_task_called = True
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._partially_observable = False
    env.__dict__.pop("sawyer_observation_space", None)
    env.seed(state)
    env.reset()
    states = [state_of(env)]
    for command in plan:
        for _ in range(4):
            env.step(command)
        states.append(state_of(env))
    return states


@pytest.mark.parametrize("task", TASKS)
def test_physics_is_the_benchmarks_own_bit_by_bit(task: str) -> None:
    plan = commands(12)
    contract = registry.contract_for("metaworld")
    scale = np.array([d.command_scale for d in contract.action.dims], np.float32)
    env = registry.make_env("metaworld", task)
    env.reset(3)  # an earlier episode must not leak
    for command in plan[:5]:
        env.step(command * scale)
        env.render("corner2")
    for state in (11, 5):
        env.reset(state)
        our_states = [env.simulator_state()]
        for command in plan:
            env.step(command * scale)
            env.render("corner2")  # drawing feeds back into nothing
            our_states.append(env.simulator_state())
        if env.success():
            pytest.fail("random commands must not end the episode, or the comparison is cut short")
        for a, b in zip(our_states, benchmark_trajectory(task, state, plan), strict=True):
            np.testing.assert_array_equal(a, b)
    env.close()


def arrays_of(thing: object) -> dict[str, np.ndarray]:
    arrays = {}
    for name in dir(thing):
        # Constraint solver and islands use scratch memory, which holds something else in every environment.
        if not name.startswith(("_", "efc_", "island_", "dof_island")):
            value = getattr(thing, name, None)
            if isinstance(value, np.ndarray):
                arrays[name] = value.copy()
    return arrays


def assert_same(first: MetaWorldTaskEnv, second: MetaWorldTaskEnv) -> None:
    for first_object, second_object in ((first.env.model, second.env.model), (first.env.data, second.env.data)):
        first_arrays = arrays_of(first_object)
        second_arrays = arrays_of(second_object)
        assert [n for n in first_arrays if not np.array_equal(first_arrays[n], second_arrays[n], equal_nan=True)] == []
    np.testing.assert_array_equal(first.last_observation, second.last_observation)


@pytest.mark.parametrize("task", INSTRUCTIONS)
def test_a_start_that_is_copied_is_the_start_that_was_made(task: str) -> None:
    """The second reset to a state restores a copy; nothing that follows may tell."""
    contract = registry.contract_for("metaworld")
    scale = np.array([d.command_scale for d in contract.action.dims], np.float32)
    original = MetaWorldTaskEnv(task, contract)
    copied = MetaWorldTaskEnv(task, contract)
    metaworld._STARTS.clear()
    original.reset(1005)
    first_seen = dict(metaworld._STARTS)
    metaworld._STARTS.clear()
    copied.reset(1006)  # another episode, which must leave no trace
    for command in commands(3):
        copied.step(command * scale)
    metaworld._STARTS.update(first_seen)
    copied.reset(1005)
    assert len(metaworld._STARTS) == 2, "the start was made again"
    assert_same(original, copied)
    for command in commands(4):
        for env in (original, copied):
            env.step(command * scale)
    assert_same(original, copied)
    assert original.success() == copied.success()
    original_fields = original.env.__dict__
    copied_fields = copied.env.__dict__
    for name, value in original_fields.items():
        if isinstance(value, np.ndarray | float | int | str | list):
            np.testing.assert_array_equal(np.asarray(value), np.asarray(copied_fields[name]), err_msg=name)


def test_starts_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metaworld, "STARTS", 3)
    metaworld._STARTS.clear()
    env = registry.make_env("metaworld", "push")
    for state in range(5):
        env.reset(state)
    assert [key[2] for key in metaworld._STARTS] == [2, 3, 4]


def test_two_environments_of_one_task_share_a_renderer_but_no_scene() -> None:
    first, second = (registry.make_env("metaworld", "door-open") for _ in range(2))
    first.reset(1)
    alone = first.render("corner2")
    second.reset(2)
    second_frame = second.render("corner2")
    assert (alone != second_frame).any()
    np.testing.assert_array_equal(first.render("corner2"), alone)
    first.close()
    np.testing.assert_array_equal(second.render("corner2"), second_frame)
    second.close()


def test_thin_meshes_look_like_full_ones() -> None:
    contract = registry.contract_for("metaworld")
    thin, full = (MetaWorldTaskEnv("door-open", contract, thin_meshes=t) for t in (True, False))
    for env in (thin, full):
        env.reset(0)
    a, b = (env.render("corner2").astype(float) for env in (thin, full))
    # Sky, shadows and edge smoothing are left out by design; the scene must be the same.
    scene = a.sum(2) > 0
    assert scene.mean() > 0.5
    assert np.corrcoef(a[scene].ravel(), b[scene].ravel())[0, 1] > 0.9
    assert a.shape == (96, 96, 3)


def test_fifty_tasks_have_words_and_separate_states() -> None:
    infos = registry.tasks("metaworld")
    assert len(infos) == 50
    assert {f"{i.name}-v3" for i in infos} == set(ALL_V3_ENVIRONMENTS)
    assert len({i.instruction for i in infos}) == 50
    assert not set(TRAIN_STATES) & set(EVALUATION_STATES)


@pytest.mark.parametrize("task", ["door-open", "push", "button-press"])
def test_experts_succeed(task: str) -> None:
    env = registry.make_env("metaworld", task)
    expert = registry.make_expert("metaworld", task)
    for state in (0, 1):
        env.reset(state)
        expert.reset(env)
        for _ in range(env.info.horizon):
            env.step(expert.act(env))
            if env.success():
                break
        assert env.success()
    env.close()


def test_bad_names_and_states_are_refused() -> None:
    with pytest.raises(RatchetError, match=r"sim\.unknown_task.*door-open"):
        registry.make_env("metaworld", "door-opn")
    env = registry.make_env("metaworld", "door-open")
    with pytest.raises(RatchetError, match=r"sim\.unknown_state"):
        env.reset(-1)
    env.close()
