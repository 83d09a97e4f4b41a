"""LIBERO without recompiling must be LIBERO: success rates are only comparable where physics and pixels are the same.

Pinned: for the same initial state and actions, Ratchet's environment and a freshly constructed `OffScreenRenderEnv`
have bitwise equal integration states (positions, velocities, solver warm start, controls) at every step, equal
pixels from both cameras, equal proprioception and equal success. Before that, Ratchet's environment plays
another episode from another initial state, so that anything left over would show. One task has a stove with a knob:
its glow is model state outside the physics, and its random placement takes the draws of a real reset.
Determinism: fixed seed for actions; `benchmarks/science/parity_libero.py` is the long version.
"""

from __future__ import annotations

import numpy as np
import pytest

from ratchet_sim.libero.env import LiberoTaskEnv
from ratchet_sim.testing.libero_reference import ReferenceLibero

STEPS = 12
FRAME_EVERY = 6
SCALE = np.array([0.05] * 3 + [0.5] * 3 + [1.0], dtype=np.float32)


@pytest.mark.parametrize(
    ("suite", "task"),
    [
        ("libero_object", "pick_up_the_alphabet_soup_and_place_it_in_the_basket"),
        ("libero_10", "KITCHEN_SCENE8_put_both_moka_pots_on_the_stove"),
    ],
)
def test_equal_to_a_fresh_plain_environment(suite: str, task: str) -> None:
    rng = np.random.default_rng(7)
    commands = np.clip(rng.normal([0.3, 0, -0.6, 0, 0, 0, 0], 0.7, size=(STEPS, 7)), -1, 1).astype(np.float32)
    env = LiberoTaskEnv(suite, task)
    env.reset(4)
    for command in commands[::-1]:
        env.step(command * SCALE)
    env.render("wrist")
    env.reset(33)

    plain = ReferenceLibero(suite, task)
    plain.reset(33)
    for index, command in enumerate(commands):
        np.testing.assert_array_equal(env.simulator_state(), plain.simulator_state())
        if index % FRAME_EVERY == 0:
            for camera, image in plain.images().items():
                np.testing.assert_array_equal(env.render(camera), image)
        env.step(command * SCALE)
        plain.step((command * SCALE / SCALE).astype(np.float64))
        assert env.success() == plain.success()
    state = env.state()
    np.testing.assert_array_equal(state["eef_position"], plain.observation["robot0_eef_pos"].astype(np.float32))
    np.testing.assert_array_equal(state["gripper"], plain.observation["robot0_gripper_qpos"].astype(np.float32))
    from robosuite.utils.transform_utils import quat2axisangle

    expected = quat2axisangle(plain.observation["robot0_eef_quat"].copy()).astype(np.float32)
    np.testing.assert_array_equal(state["eef_rotation"], expected)
    plain.close()
    env.close()
