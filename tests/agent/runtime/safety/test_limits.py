"""The safety filter is the last thing between a policy and an arm: whatever comes in, what goes out keeps the limits.

Pinned: velocity, acceleration, jerk, workspace and gripper rate at the output, checked by code that shares nothing with
the filter, for every control mode, over random and hostile actions, jittering and bursting clocks; actions within
limits pass bit by bit. Deterministic: hypothesis draws the inputs, time is an argument, nothing sleeps.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratchet_vla.contract import RobotContract
from ratchet_vla.records import Mark
from ratchet_vla.runtime.safety.filter import Proposal, SafetyConfig, SafetyFilter, SafetyState
from ratchet_vla.testing.fake_contract import MODES, arm
from tests.agent.runtime.safety.invariant_checker import InvariantChecker

CASES = [(m, "axis_angle", j) for m in MODES for j in (False, True)]
CASES += [(m, r, False) for m in ("ee_delta", "ee_absolute") for r in ("none", "euler_xyz", "quaternion_xyzw")]


def state_at(contract: RobotContract, place: np.ndarray) -> dict[str, np.ndarray]:
    state = {s.name: np.zeros(s.size, np.float32) for s in contract.state}
    state["place"] = place.astype(np.float32)
    state["gripper"][0] = 1.0
    if "turned" in state and len(state["turned"]) == 4:
        state["turned"][3] = 1.0
    return state


def drive(contract: RobotContract, actions: np.ndarray, gaps: np.ndarray, slip: float = 0.0) -> InvariantChecker:
    """Send every action through a filter to an arm that follows (but for `slip`); the checker sees all of it."""
    mode = contract.action.control_mode
    stage = SafetyFilter(contract, SafetyConfig(tracking_factor=1e9, jump_factor=1e9))
    place = np.zeros(3)
    now = 0.0
    state = state_at(contract, place)
    stage.start(state, now)
    checker = InvariantChecker(contract, place, state.get("turned", np.zeros(3)), now)
    rng = np.random.default_rng(len(actions))
    period = 1.0 / contract.control_hz
    for k, (action, gap) in enumerate(zip(actions, gaps, strict=True)):
        now += gap * period
        state = state_at(contract, place)
        result = stage.step(Proposal(action, action, now, k, 0), state, now, now)
        checker.see(now, result.command, state["place"], result.state is SafetyState.STOPPING)
        if result.command is not None:
            assert np.isfinite(result.command).all()
            linear = result.command[:3].astype(np.float64)
            place = (
                linear
                if mode.endswith("absolute")
                else place + linear * (1.0 if mode.endswith("delta") else min(gap, 1.0) * period)
            )
            place = place + slip * rng.normal(size=3)
    return checker


def hostile(contract: RobotContract, rng: np.random.Generator, count: int) -> np.ndarray:
    """Random walks, full-range jumps, far too large values, and zeros, in runs of a few actions each."""
    low = np.array([d.low for d in contract.action.dims])
    high = np.array([d.high for d in contract.action.dims])
    out = np.empty((count, len(low)), np.float32)
    k = 0
    while k < count:
        run = int(rng.integers(1, 12))
        kind = rng.integers(0, 6)
        base = rng.uniform(low, high)
        if kind == 0:
            rows = np.tile(base, (run, 1))
        elif kind == 1:
            rows = np.where(rng.random((run, len(low))) < 0.5, low, high)
        elif kind == 2:
            rows = rng.uniform(low, high, (run, len(low))) * 10 ** rng.uniform(0, 6)
        elif kind == 3:
            rows = np.zeros((run, len(low)))
        elif kind == 4:
            rows = base + np.cumsum(rng.normal(size=(run, len(low))) * (high - low) * 0.02, axis=0)
        else:
            rows = np.tile(high, (run, 1)) * rng.choice([-1.0, 1.0])
        out[k : k + run] = rows[: count - k]
        k += run
    if contract.action.rotation == "quaternion_xyzw":
        turn = rng.normal(size=(count, 4))
        if contract.action.control_mode == "ee_delta":
            turn = turn * 0.05 + np.array([0, 0, 0, 1.0])
        out[:, 3:7] = turn / np.linalg.norm(turn, axis=1, keepdims=True)
    return out


@pytest.mark.parametrize(("mode", "rotation", "jerk"), CASES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), jitter=st.floats(0.0, 0.9), slip=st.sampled_from([0.0, 0.0, 1e-4]))
def test_the_output_keeps_every_limit(
    mode: str, rotation: str, jerk: bool, seed: int, jitter: float, slip: float
) -> None:
    contract = arm(mode, rotation=rotation, jerk=jerk)
    rng = np.random.default_rng(seed)
    gaps = np.abs(1.0 + jitter * rng.standard_normal(120))
    checker = drive(contract, hostile(contract, rng, 120), gaps, 0.0 if jerk else slip)
    assert checker.violations == []


@pytest.mark.parametrize("mode", MODES)
def test_full_speed_is_used_not_only_forbidden(mode: str) -> None:
    """A filter that never moves would keep every limit too."""
    contract = arm(mode, rotation="none")
    target = np.array([d.high for d in contract.action.dims], np.float32)
    checker = drive(contract, np.tile(target, (12, 1)), np.ones(12))
    assert checker.worst["velocity"] > 0.99
    assert checker.worst["acceleration"] > 0.99
    assert checker.violations == []


@pytest.mark.parametrize("mode", MODES)
def test_actions_within_limits_pass_bit_by_bit(mode: str) -> None:
    contract = arm(mode)
    stage = SafetyFilter(contract)
    state = state_at(contract, np.zeros(3))
    stage.start(state, 0.0)
    rng = np.random.default_rng(3)
    action = np.zeros(contract.action.size, np.float32)
    for k in range(50):
        action = action + rng.normal(size=action.shape).astype(np.float32) * np.float32(1e-4)
        action[-1] = 1.0 - abs(action[0])
        now = 0.05 * k + rng.uniform(-0.002, 0.002)
        result = stage.step(Proposal(action, action, now, k, 0), state, now, now)
        assert result.command is not None
        np.testing.assert_array_equal(result.command, action)
        assert result.marks == Mark.NONE
        assert result.events == ()


def test_a_far_target_is_approached_from_the_measured_pose() -> None:
    contract = arm("joint_absolute", ramp=1.0)
    stage = SafetyFilter(contract)
    stage.start(state_at(contract, np.full(3, -0.5)), 0.0)
    target = np.array([0.5, 0.5, 0.5, 0.0], np.float32)
    place, steps = np.full(3, -0.5), []
    for k in range(60):
        now = k * 0.05
        result = stage.step(Proposal(target, target, now, k, 0), state_at(contract, place), now, now)
        assert result.command is not None
        steps.append(float(result.command[0] - place[0]))
        assert bool(result.marks & Mark.RAMPED) == (k < 19)
        place = result.command[:3].astype(float)
    assert 0 < steps[0] <= 1.5 * 0.05 * 0.05 + 1e-6  # a twentieth of full speed in the first period
    np.testing.assert_allclose(place, 0.5, atol=1e-3)


def test_straight_lines_stay_straight_when_shortened() -> None:
    contract = arm("joint_velocity")
    stage = SafetyFilter(contract)
    state = state_at(contract, np.zeros(3))
    stage.start(state, 0.0)
    wish = np.array([1.5, 0.5, -0.25, 1.0], np.float32)
    for k in range(6):
        now = k * 0.05
        result = stage.step(Proposal(wish * 4, wish, now, k, 0), state, now, now)
    assert result.command is not None
    np.testing.assert_allclose(result.command[:3], [1.5, 1.5, -1.0], atol=1e-5)  # range first, as a controller does


def test_commands_in_a_burst_get_only_the_time_that_passed() -> None:
    """Forty commands at once, as a delayed network delivers them: together they move at most V (w + 1.25 T)."""
    contract = arm("ee_delta", rotation="none")
    stage = SafetyFilter(contract)
    state = state_at(contract, np.zeros(3))
    stage.start(state, 0.0)
    full = np.array([0.02, 0, 0, 1.0], np.float32)
    total, now = 0.0, 0.0
    for k in range(40):
        now += 0.001
        result = stage.step(Proposal(full, full, now, k, 0), state, now, now)
        total += float(result.command[0]) if result.command is not None else 0.0
    assert total <= 0.4 * (0.04 + 1.25 * 0.05) * (1 + 1e-6)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), jitter=st.floats(0.0, 0.9))
def test_a_gripper_with_inertia_brakes_before_its_stops(seed: int, jitter: float) -> None:
    """The grippers of servo arms have a finite acceleration: at full speed they need room to stop."""
    raw = arm("joint_absolute").to_dict()
    raw["limits"]["velocity"][-1], raw["limits"]["acceleration"][-1] = 6.0, 30.0
    contract = RobotContract.from_dict(raw)
    rng = np.random.default_rng(seed)
    actions = np.zeros((120, contract.action.size), np.float32)
    actions[:, -1] = np.repeat(rng.integers(0, 2, 24), 5)  # to one stop, to the other
    stage = SafetyFilter(contract, SafetyConfig(tracking_factor=1e9, jump_factor=1e9))
    state, now = state_at(contract, np.zeros(3)), 0.0
    stage.start(state, now)
    sent = []
    for k, action in enumerate(actions):
        now += abs(1.0 + jitter * rng.standard_normal()) / contract.control_hz
        result = stage.step(Proposal(action, action, now, k, 0), state, now, now)
        if result.command is not None:
            sent.append(float(result.command[-1]))
    assert min(sent) >= -1e-5
    assert max(sent) <= 1.0 + 1e-5
    assert max(sent) - min(sent) > 0.5  # it did move
