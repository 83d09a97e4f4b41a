"""A zero-shot score under a changed camera is worthless if the camera did not change, or if anything else did.

Pinned: each perturbation changes what it says (frames, light, where the arm stands) and nothing of the task
(instruction, states, success, objects); the plain task beside it in the same process stays bit-identical; names of
other suites and refusals. Determinism: fixed initial states, no policy.
"""

from __future__ import annotations

import numpy as np
import pytest

from ratchet_sim import registry
from ratchet_sim.perturbations import BASE_SHIFT, KINDS, LIGHT_FACTOR
from ratchet_vla.errors import RatchetError

TASK = "button-press"


def frame_and_state(name: str) -> tuple[np.ndarray, np.ndarray, object]:
    env = registry.make_env("metaworld", name)
    env.reset(3)
    frame = env.render("corner2").astype(np.float64)
    return frame, env.simulator_state(), env


@pytest.mark.parametrize("kind", KINDS)
def test_a_perturbation_changes_what_it_says_and_nothing_else(kind: str) -> None:
    plain, state, env = frame_and_state(TASK)
    frame, perturbed, perturbed_state = frame_and_state(f"{TASK}@{kind}")
    change = np.abs(frame - plain).mean()
    assert change > 1.0
    info = registry.task("metaworld", TASK)
    changed = registry.task("metaworld", f"{TASK}@{kind}")
    assert (changed.instruction, changed.evaluation_states, changed.horizon) == (
        info.instruction,
        info.evaluation_states,
        info.horizon,
    )
    button = env.env.data.body("button").xpos, perturbed_state.env.data.body("button").xpos  # type: ignore[attr-defined]
    np.testing.assert_array_equal(*button)
    if kind == "light":
        np.testing.assert_array_equal(perturbed, state)
        assert 0.8 * LIGHT_FACTOR < frame.mean() / plain.mean() < 0.95
    elif kind == "camera":
        np.testing.assert_array_equal(perturbed, state)
        assert abs(frame.mean() / plain.mean() - 1) < 0.1
    else:
        bases = [e.env.data.body("base").xpos for e in (env, perturbed_state)]  # type: ignore[attr-defined]
        np.testing.assert_allclose(bases[1] - bases[0], BASE_SHIFT)
    frame_again, back, _ = frame_and_state(TASK)
    np.testing.assert_array_equal(frame_again, plain)
    np.testing.assert_array_equal(back, state)


def test_names_of_other_suites_and_refusals() -> None:
    name = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    swapped_task = registry.task("libero_object", f"libero_object_swap/{name}")
    assert swapped_task.name == f"libero_object_swap/{name}"
    assert swapped_task.suite == "libero_object_swap"
    for suite, wrong, code in (
        ("metaworld", "button-press@fog", "sim.unknown_perturbation"),
        ("metaworld", "buton-press@light", "sim.unknown_task"),
        ("metaworld", f"libero_object/{name}", "sim.other_robot"),
        ("libero_object", f"libero_objct/{name}", "sim.unknown_suite"),
    ):
        with pytest.raises(RatchetError) as refused:
            registry.task(suite, wrong)
        assert refused.value.code == code, wrong
