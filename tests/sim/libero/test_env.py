"""The LIBERO environment's contract: names, splits, units and refusals that the learner and the gate rely on.

Pinned: the registry with LIBERO-PRO's perturbed suites, train and evaluation states that never overlap, physical units
(0.05 m is controller command 1.0), clipping as the controller does, sharing of one compiled model, deterministic
resets that leave numpy's global generator alone, camera sizes from the contract, and the stable codes of refusals.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import numpy as np
import pytest

from ratchet_sim import gl
from ratchet_sim.libero.env import CONTRACT, LiberoTaskEnv, libero_suites, libero_task_infos, with_image_size
from ratchet_sim.libero.model import _compiled
from ratchet_sim.libero.suites import initial_states
from ratchet_sim.perturbations import BASE_SHIFT
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError

SUITE = "libero_object"
TASK = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoTaskEnv]:
    built = LiberoTaskEnv(SUITE, TASK, with_image_size(RobotContract.load(CONTRACT), 64, 48))
    yield built
    built.close()


def test_suites_include_the_originals_and_the_perturbed() -> None:
    suites = libero_suites()
    originals = {"libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"}
    assert originals | {"libero_spatial_swap", "libero_object_lan", "libero_goal_task", "libero_10_object"} <= set(
        suites
    )
    assert len(suites) > 40
    assert len(libero_task_infos("libero_90")) == 90


@pytest.mark.parametrize("suite", libero_suites())
def test_every_suite_lists_tasks_with_disjoint_states(suite: str) -> None:
    infos = libero_task_infos(suite)
    assert infos
    for info in infos:
        assert not set(info.train_states) & set(info.evaluation_states)
        assert len(info.train_states) + len(info.evaluation_states) == len(initial_states(suite, info.name))
        assert info.instruction == info.instruction.strip()
        assert info.instruction


def test_split_and_horizons_of_the_originals() -> None:
    info = libero_task_infos(SUITE)[0]
    assert info.train_states == tuple(range(30))
    assert info.evaluation_states == tuple(range(30, 50))
    assert info.horizon == 512
    published = {s: libero_task_infos(s, published_horizon=True)[0].horizon for s in ("libero_spatial", SUITE)}
    assert published == {"libero_spatial": 220, SUITE: 280}
    assert libero_task_infos("libero_10_swap", published_horizon=True)[0].horizon == 520


def test_instruction_of_a_language_perturbation_is_the_perturbed_one() -> None:
    plain = {i.name: i.instruction for i in libero_task_infos("libero_goal")}
    changed = {i.name: i.instruction for i in libero_task_infos("libero_goal_lan")}
    assert plain["put_the_wine_bottle_on_the_rack"] == "put the wine bottle on the rack"
    assert changed["put_the_wine_bottle_on_the_rack"] == "place the wine bottle on the rack"


def test_unknown_names_are_refused_with_close_matches() -> None:
    with pytest.raises(RatchetError, match="libero_spatial") as refused:
        libero_task_infos("libero_spacial")
    assert refused.value.code == "sim.unknown_suite"
    with pytest.raises(RatchetError, match=TASK) as refused:
        LiberoTaskEnv(SUITE, TASK.replace("soup", "soupe"))
    assert refused.value.code == "sim.unknown_task"
    with pytest.raises(RatchetError) as refused:
        libero_task_infos("libero_goal_env")
    assert refused.value.code == "sim.suite_without_files"


def test_initial_states_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        initial_states(SUITE, TASK)[0, 0] = 1.0


def test_physical_units_reach_the_controller(env: LiberoTaskEnv) -> None:
    commands: list[np.ndarray] = []
    original = env._osc.set_goal

    def noted(command: np.ndarray) -> None:
        commands.append(command.copy())
        original(command)

    env._osc.set_goal = noted  # type: ignore[method-assign]
    try:
        env.reset(0)
        commands.clear()
        env.step(np.array([0.05, -0.025, 0.05, 0.5, 0.0, -0.25, 1.0], dtype=np.float32))
        env.step(np.array([0.2, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0], dtype=np.float32))
    finally:
        env._osc.set_goal = original  # type: ignore[method-assign]
    np.testing.assert_array_equal(commands[0], [1.0, -0.5, 1.0, 1.0, 0.0, -0.5])
    np.testing.assert_array_equal(commands[1], [1.0, 0, 0, 0, 0, 0])


def test_motion_and_gripper_follow_the_contract(env: LiberoTaskEnv) -> None:
    env.reset(0)
    start = env.state()
    for _ in range(10):
        env.step(np.array([0.0, 0.0, 0.03, 0.0, 0.0, 0.0, 1.0], dtype=np.float32))
    end = env.state()
    assert end["eef_position"][2] - start["eef_position"][2] > 0.05
    assert abs(end["gripper"]).max() < 0.01 < abs(start["gripper"]).max()
    assert {name: value.shape for name, value in end.items()} == {
        "eef_position": (3,),
        "eef_rotation": (3,),
        "gripper": (2,),
    }


def test_bad_actions_and_states_are_refused_before_anything_moves(env: LiberoTaskEnv) -> None:
    env.reset(0)
    before = env.simulator_state()
    for action in (np.zeros(6, dtype=np.float32), np.full(7, np.nan, dtype=np.float32)):
        with pytest.raises(RatchetError) as refused:
            env.step(action)
        assert refused.value.code == "sim.bad_action"
    for state in (-1, 50):
        with pytest.raises(RatchetError) as refused:
            env.reset(state)
        assert refused.value.code == "sim.unknown_state"
    np.testing.assert_array_equal(env.simulator_state(), before)


def test_reset_is_deterministic_and_leaves_the_global_generator_alone(env: LiberoTaskEnv) -> None:
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    env.reset(11)
    first = env.simulator_state()
    env.reset(12)
    assert not np.array_equal(env.simulator_state(), first)
    env.step(np.array([0.05, 0.0, -0.05, 0.1, 0.0, 0.0, 1.0], dtype=np.float32))
    env.reset(11)
    np.testing.assert_array_equal(env.simulator_state(), first)
    second_env = LiberoTaskEnv(SUITE, TASK)
    second_env.reset(11)
    np.testing.assert_array_equal(second_env.simulator_state(), first)
    assert np.random.random() == expected  # noqa: NPY002
    second_env.close()


def test_a_moved_base_carries_the_arm_with_it(env: LiberoTaskEnv) -> None:
    # Also after the settle steps: a controller that still aimed at the old place would have pulled the hand back.
    moved_env = LiberoTaskEnv(SUITE, TASK, perturbation="base")
    try:
        for e in (env, moved_env):
            e.reset(1)
        shift = moved_env.state()["eef_position"] - env.state()["eef_position"]
        np.testing.assert_allclose(shift, BASE_SHIFT, atol=1e-6)
        assert moved_env.model is not env.model
    finally:
        moved_env.close()


def test_one_compiled_model_per_task_and_independent_episodes(env: LiberoTaskEnv) -> None:
    second_env = LiberoTaskEnv(SUITE, TASK)
    assert second_env.model is env.model
    env.reset(2)
    before = env.simulator_state()
    second_env.step(np.array([0.05, 0.0, -0.05, 0.1, 0.0, 0.0, 1.0], dtype=np.float32))
    np.testing.assert_array_equal(env.simulator_state(), before)
    second_env.close()
    second_env.close()
    assert (SUITE, TASK, "") in _compiled
    with pytest.raises(RatchetError) as refused:
        second_env.reset(0)
    assert refused.value.code == "sim.closed"


def test_frames_have_the_contracts_size_and_belong_to_the_caller(env: LiberoTaskEnv) -> None:
    env.reset(0)
    frame = env.render("agentview")
    assert frame.shape == (48, 64, 3)
    assert frame.dtype == np.uint8
    assert frame.std() > 10
    frame[:] = 0
    assert env.render("agentview").std() > 10
    assert not np.array_equal(env.render("wrist"), env.render("agentview"))
    with pytest.raises(RatchetError) as refused:
        env.render("topview")
    assert refused.value.code == "contract.unknown_camera"


def test_a_contract_that_is_not_liberos_is_refused() -> None:
    contract = RobotContract.load(CONTRACT)
    for wrong in (
        dataclasses.replace(contract, control_hz=10.0),
        dataclasses.replace(contract, simulator=None),
        dataclasses.replace(contract, state=(dataclasses.replace(contract.state[0], name="joints"),)),
    ):
        with pytest.raises(RatchetError) as refused:
            LiberoTaskEnv(SUITE, TASK, wrong)
        assert refused.value.code == "sim.contract_mismatch"


def test_a_camera_that_the_simulator_lacks_is_refused_and_frees_the_model() -> None:
    contract = RobotContract.load(CONTRACT)
    wrong = dataclasses.replace(contract, cameras=(dataclasses.replace(contract.cameras[0], source="ceiling"),))
    task = "pick_up_the_butter_and_place_it_in_the_basket"
    with pytest.raises(RatchetError, match="frontview") as refused:
        LiberoTaskEnv(SUITE, task, wrong)
    assert refused.value.code == "sim.contract_mismatch"
    assert (SUITE, task, "") not in _compiled


def test_a_camera_can_be_moved_by_the_contract(env: LiberoTaskEnv) -> None:
    contract = with_image_size(RobotContract.load(CONTRACT), 64, 48)
    moved_camera = dataclasses.replace(contract.cameras[0], position=(0.7, 0.3, 0.8))
    second_env = LiberoTaskEnv(SUITE, TASK, dataclasses.replace(contract, cameras=(moved_camera, contract.cameras[1])))
    env.reset(0)
    second_env.reset(0)
    assert not np.array_equal(second_env.render("agentview"), env.render("agentview"))
    np.testing.assert_array_equal(second_env.render("wrist"), env.render("wrist"))
    np.testing.assert_array_equal(second_env.simulator_state(), env.simulator_state())
    second_env.close()


def test_missing_gl_library_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gl, "_checked", set())
    monkeypatch.setattr(gl, "_loads", lambda name: False)
    with pytest.raises(RatchetError, match=r"libegl1 libgl1 libosmesa6 libgl1-mesa-dri.*MUJOCO_GL") as refused:
        gl.require_gl("egl")
    assert refused.value.code == "sim.no_gl"


def test_robosuite_writes_no_log_file() -> None:
    assert not [h for h in logging.getLogger("robosuite_logs").handlers if isinstance(h, logging.FileHandler)]


def test_contradicting_gl_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")
    with pytest.raises(RatchetError) as refused:
        gl.configure_gl()
    assert refused.value.code == "sim.bad_gl"
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(RatchetError) as refused:
        gl.configure_gl()
    assert refused.value.code == "sim.bad_gl"
