"""A gripper that closes where the policy meant to open fails every task, silently, and only with other people's models.

Pinned: open stays open and closed stays closed between any two conventions, OpenVLA-OFT's on LIBERO by value; every
other dimension and the policy's own array stay as they are; conventions that are not stated are refused.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ratchet_vla.contract import GripperSpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy import presets
from ratchet_vla.policy.commands import policy_actions, robot_actions

LIBERO = RobotContract.load(Path(__file__).resolve().parents[3] / "robots" / "libero.yaml")
SPEC = presets.spec_for(LIBERO, cameras=["agentview"], state=[], chunk=2, statistics_key="libero")
OFT = dataclasses.replace(SPEC, gripper_open=1.0, gripper_closed=0.0)
number = st.floats(-5, 5, width=16)


def actions(gripper: list[float]) -> np.ndarray:
    out = np.random.default_rng(0).uniform(-0.05, 0.05, (len(gripper), 7)).astype(np.float32)
    out[:, 6] = gripper
    return out


def test_openvla_oft_on_libero() -> None:
    given_ = actions([1.0, 0.0, 0.5, 1.5])
    before = given_.copy()
    out = robot_actions(given_, OFT, LIBERO)
    # The published evaluation does the same in two steps: 2 x - 1, then the sign turned round.
    np.testing.assert_allclose(out[:, 6], [-1.0, 1.0, 0.0, -2.0])
    np.testing.assert_array_equal(out[:, :6], before[:, :6])
    np.testing.assert_array_equal(given_, before)
    assert out.dtype == np.float32


def test_equal_numbers_cost_nothing() -> None:
    same = actions([1.0, -1.0])
    assert robot_actions(same, SPEC, LIBERO) is same


@given(number, number, number, number)
def test_open_stays_open_and_closed_closed(a: float, b: float, c: float, d: float) -> None:
    assume(abs(a - b) > 0.1 and abs(c - d) > 0.1)
    spec = dataclasses.replace(SPEC, gripper_open=a, gripper_closed=b)
    action = dataclasses.replace(LIBERO.action, gripper=GripperSpec("gripper", c, d))
    out = robot_actions(actions([a, b]), spec, dataclasses.replace(LIBERO, action=action))
    np.testing.assert_allclose(out[:, 6], [c, d], atol=1e-4)
    back = policy_actions(out, spec, dataclasses.replace(LIBERO, action=action))
    np.testing.assert_allclose(back[:, 6], [a, b], atol=1e-3 * max(1.0, abs((a - b) / (c - d))))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"gripper_dim": None}, "compat.gripper"),
        ({"gripper_dim": "dz"}, "compat.gripper"),
        ({"gripper_open": None}, "compat.gripper_polarity"),
        ({"gripper_closed": None}, "compat.gripper_polarity"),
        ({"gripper_open": 0.0, "gripper_closed": 0.0}, "compat.gripper_polarity"),
    ],
)
def test_unstated_conventions_are_refused(change: dict[str, Any], code: str) -> None:
    with pytest.raises(RatchetError) as refused:
        robot_actions(actions([0.0]), dataclasses.replace(SPEC, **change), LIBERO)
    assert refused.value.code == code


def test_a_robot_without_a_gripper_takes_actions_as_they_are() -> None:
    bare = dataclasses.replace(LIBERO, action=dataclasses.replace(LIBERO.action, gripper=None))
    spec = dataclasses.replace(SPEC, gripper_dim=None, gripper_open=None, gripper_closed=None)
    same = actions([0.3])
    assert robot_actions(same, spec, bare) is same
