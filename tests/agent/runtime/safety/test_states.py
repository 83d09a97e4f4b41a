"""Who may move an arm when: faults stop it, stops are controlled and short, nothing starts again that must not.

A state machine that forgets one transition moves an arm somebody has just reached into.

Pinned: every transition of docs/safety.md, and over random sequences of everything that can happen (hypothesis drives
the machine): no command outside the moving and stopping states, standstill within the contract's stop time, latched
until a named person clears, limits kept throughout. Time is an argument; nothing sleeps.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, Mark
from ratchet_vla.runtime.safety.filter import FilterResult, Proposal, SafetyConfig, SafetyFilter, SafetyState
from ratchet_vla.runtime.safety.types import LATCHING
from ratchet_vla.testing.fake_contract import arm
from tests.agent.runtime.safety.invariant_checker import InvariantChecker
from tests.agent.runtime.safety.test_limits import state_at

T = 0.05
CONTRACT = arm("ee_delta", rotation="none")
FULL = np.array([0.02, 0.0, 0.0, 1.0], np.float32)


class Rig:
    """A filter and an arm that follows it, one period per call."""

    def __init__(self, config: SafetyConfig | None = None, ramp: float = 0.0) -> None:
        self.contract = arm("ee_delta", rotation="none", ramp=ramp)
        self.stage = SafetyFilter(self.contract, config)
        self.place, self.now, self.count = np.zeros(3), 0.0, 0
        self.stage.start(state_at(self.contract, self.place), self.now)

    def tick(
        self, action: np.ndarray | None = FULL, *, age: float = 0.0, late: float = 0.0, **options: bool
    ) -> FilterResult:
        self.now += T
        self.count += 1
        proposal = None if action is None else Proposal(action, action, self.now - late, self.count, 0)
        result = self.stage.step(proposal, state_at(self.contract, self.place), self.now - age, self.now, **options)
        if result.command is not None:
            self.place = self.place + result.command[:3]
        return result

    def back_and_forth(self) -> np.ndarray:
        sign = 1.0 if (self.count // 10) % 2 else -1.0
        return np.asarray(FULL * sign * np.array([1, 0, 0, 0]) + np.array([0, 0, 0, 1.0]))

    def until_standing(self) -> int:
        for ticks in range(1, 20):
            if self.tick(None).command is None:
                return ticks
        raise AssertionError("the arm does not come to a stop")


@pytest.mark.parametrize("code", sorted(LATCHING))
def test_a_fault_stops_and_stays_stopped_until_a_person_clears_it(code: str) -> None:
    rig = Rig()
    rig.tick()
    rig.tick()
    rig.stage.fail(code, "on purpose")
    result = rig.tick()
    assert result.state is SafetyState.STOPPING
    assert [e.code for e in result.events if e.latched] == [code]
    assert rig.until_standing() * T <= CONTRACT.watchdog.stop_time + T
    assert rig.stage.state is SafetyState.LATCHED
    assert all(rig.tick().command is None for _ in range(5))
    with pytest.raises(RatchetError, match=r"safety\.latched"):
        rig.stage.start(state_at(CONTRACT, rig.place), rig.now)
    with pytest.raises(RatchetError, match=r"safety\.no_operator"):
        rig.stage.clear("  ")
    assert "by Ada" in rig.stage.clear("Ada").message
    assert rig.tick().command is None  # idle: cleared is not started
    rig.stage.start(state_at(CONTRACT, rig.place), rig.now)
    assert rig.tick().command is not None


def test_a_hold_that_may_pass_ends_by_itself_with_the_ramp() -> None:
    rig = Rig(ramp=0.5)
    for _ in range(12):
        rig.tick(FULL * 0.1)
    assert rig.stage.state is SafetyState.RUNNING
    stopped = rig.tick(age=1.0)
    assert stopped.state is SafetyState.STOPPING
    assert [e.code for e in stopped.events] == ["safety.observation_age"]
    rig.until_standing()
    assert rig.stage.state is SafetyState.HOLDING
    again = rig.tick()
    assert again.state is SafetyState.RAMPING
    assert again.command is not None
    assert again.marks & Mark.RAMPED
    assert 0 < again.command[0] < 0.1 * FULL[0] + 1e-6


def test_no_going_on_while_the_cause_lasts() -> None:
    rig = Rig()
    rig.tick()
    rig.tick(age=1.0)
    rig.until_standing()
    results = [rig.tick(age=1.0) for _ in range(5)]
    assert all(v.command is None for v in results)
    assert sum(len(v.events) for v in results) <= 1  # one cause, one event


def test_manual_resume_waits_for_a_person() -> None:
    rig = Rig(SafetyConfig(resume="manual"))
    rig.tick()
    rig.tick(None)
    rig.until_standing()
    assert all(rig.tick().command is None for _ in range(5))
    rig.stage.resume()
    assert rig.tick().command is not None


def test_an_expected_wait_brakes_and_goes_on_without_an_event() -> None:
    rig = Rig(ramp=0.0)
    rig.tick(FULL * 0.2)
    waits = [rig.tick(None, expected=True) for _ in range(4)]
    assert waits[-1].command is None
    assert all(v.state is SafetyState.WAITING and v.events == () for v in waits)
    assert rig.tick(FULL * 0.2).command is not None


def test_the_e_stop_latches_and_its_release_does_not_clear() -> None:
    rig = Rig()
    rig.tick()
    rig.stage.e_stop(True)
    rig.tick()
    rig.until_standing()
    assert rig.stage.cause == "safety.e_stop"
    with pytest.raises(RatchetError, match=r"safety\.e_stop"):
        rig.stage.clear("Ada")
    rig.stage.e_stop(False)
    assert rig.tick().state is SafetyState.LATCHED
    rig.stage.clear("Ada")


def test_the_e_stop_also_latches_an_idle_arm() -> None:
    stage = SafetyFilter(CONTRACT)
    stage.e_stop(True)
    result = stage.step(None, state_at(CONTRACT, np.zeros(3)), 0.0, 0.0)
    assert result.state is SafetyState.LATCHED
    assert result.events[0].latched
    with pytest.raises(RatchetError, match=r"safety\.latched"):
        stage.start(state_at(CONTRACT, np.zeros(3)), 0.0)


def test_motion_needs_the_dead_man_switch() -> None:
    rig = Rig(SafetyConfig(dead_man=True))
    assert rig.tick().command is None  # never pressed
    rig.stage.dead_man(True, rig.now + T)
    assert rig.tick().command is not None
    for _ in range(4):  # held for 0.2 s after the last press
        assert rig.tick().state is SafetyState.RUNNING
    assert [e.code for e in rig.tick().events] == ["safety.dead_man"]
    rig.until_standing()
    rig.stage.dead_man(True, rig.now + T)
    assert rig.tick().command is not None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda a: a * np.nan, "safety.not_finite"),
        (lambda a: a + np.inf, "safety.not_finite"),
        (lambda a: a[:-1], "safety.bad_action"),
    ],
)
def test_hostile_actions_are_faults(change: object, code: str) -> None:
    rig = Rig()
    rig.tick()
    result = rig.tick(change(FULL))  # type: ignore[operator]
    assert [e.code for e in result.events] == [code]
    rig.until_standing()
    assert rig.stage.state is SafetyState.LATCHED


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ({"place": np.full(3, np.nan, np.float32)}, "safety.state"),
        ({"place": np.zeros(2, np.float32)}, "safety.state"),
        ({"place": np.full(3, 0.3, np.float32)}, "safety.state_jump"),
    ],
)
def test_hostile_measurements_are_faults(state: dict[str, np.ndarray], code: str) -> None:
    rig = Rig()
    rig.tick()
    rig.now += T
    result = rig.stage.step(
        Proposal(FULL, FULL, rig.now, 99, 0), {**state_at(CONTRACT, rig.place), **state}, rig.now, rig.now
    )
    assert [e.code for e in result.events] == [code]
    assert result.state is SafetyState.STOPPING


def test_late_actions_and_repeated_ones_are_not_sent() -> None:
    rig = Rig()
    rig.tick()
    assert [e.code for e in rig.tick(late=1.0).events] == ["safety.action_age"]
    rig = Rig()
    rig.tick()
    rig.count -= 1
    assert [e.code for e in rig.tick().events] == ["safety.sequence"]


def test_a_clock_that_stands_still_or_goes_back_is_a_fault() -> None:
    rig = Rig()
    rig.tick()
    rig.now -= 3 * T
    assert [e.code for e in rig.tick().events if e.latched] == ["safety.clock"]
    rig = Rig()
    rig.tick()
    codes = []
    for _ in range(16):
        rig.now -= T
        result = rig.tick()
        codes += [e.code for e in result.events if e.latched]
    assert codes == ["safety.clock"]
    assert result.state is SafetyState.LATCHED  # the stop needs no working clock


def test_an_arm_that_does_not_follow_is_a_fault() -> None:
    contract = arm("joint_absolute")
    stage = SafetyFilter(contract)
    still = state_at(contract, np.zeros(3))
    stage.start(still, 0.0)
    target = np.array([0.7, 0, 0, 0], np.float32)
    codes = []
    for k in range(30):
        result = stage.step(Proposal(target, target, k * T, k, 0), still, k * T, k * T)
        codes += [e.code for e in result.events if e.latched]
    assert codes == ["safety.tracking"]


def chunk(sequence: int, stamp: float = 0.0, actions: np.ndarray | None = None) -> ActionChunk:
    values = np.zeros((4, 4), np.float32) if actions is None else actions
    return ActionChunk(values, None, None, "a", 0.0, stamp, sequence)


def test_chunks_are_admitted_once_in_order_and_while_fresh() -> None:
    rig = Rig()
    assert rig.stage.admit(chunk(3), 0.0) == (True, ())
    for sequence in (3, 2):
        admitted, events = rig.stage.admit(chunk(sequence), 0.0)
        assert not admitted
        assert [e.code for e in events] == ["safety.chunk_sequence"]
    admitted, events = rig.stage.admit(chunk(4, stamp=-1.0), 0.0)
    assert not admitted
    assert [e.code for e in events] == ["safety.chunk_age"]
    assert rig.stage.state is SafetyState.RUNNING or rig.stage.state is SafetyState.RAMPING
    rig.tick()
    assert rig.stage.admit(chunk(5, actions=np.full((4, 4), np.nan, np.float32)), 0.0) == (False, ())
    assert [e.code for e in rig.tick().events] == ["safety.not_finite"]


def test_limits_that_allow_no_stop_in_time_are_refused() -> None:
    with pytest.raises(RatchetError, match=r"safety\.cannot_stop"):
        SafetyFilter(arm(stop_time=0.1))
    with pytest.raises(RatchetError, match=r"safety\.cannot_stop"):
        SafetyFilter(arm(jerk=True, stop_time=0.22))


class AnythingCanHappen(RuleBasedStateMachine):
    """Everything that can be done to a safety filter, in any order."""

    @initialize(
        mode=st.sampled_from(["ee_delta", "joint_absolute", "joint_velocity"]),
        ramp=st.sampled_from([0.0, 0.3]),
        resume=st.sampled_from(["automatic", "manual"]),
        jerk=st.booleans(),
    )
    def set_up(self, mode: str, ramp: float, resume: str, jerk: bool) -> None:
        self.contract = arm(mode, rotation="none", ramp=ramp, jerk=jerk)
        self.stage = SafetyFilter(self.contract, SafetyConfig(resume=resume))  # type: ignore[arg-type]
        self.mode = mode
        self.place, self.now, self.count = np.zeros(3), 0.0, 0
        self.pressed = self.started = False
        self.stopping = 0
        self.result: FilterResult | None = None
        self.checker: InvariantChecker | None = None
        self.latched_since_clear = False

    @rule(count=st.integers(1, 12), seed=st.integers(0, 1000))
    def good_ticks(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            low = np.array([d.low for d in self.contract.action.dims])
            high = np.array([d.high for d in self.contract.action.dims])
            self._step(rng.uniform(low, high).astype(np.float32))

    @rule(what=st.sampled_from(["none", "nan", "huge", "short", "stale", "late", "lost", "expected"]))
    def bad_tick(self, what: str) -> None:
        action: np.ndarray | None = np.zeros(self.contract.action.size, np.float32)
        if what in ("none", "expected"):
            action = None
        elif what == "nan":
            action[0] = np.nan  # type: ignore[index]
        elif what == "huge":
            action[:] = 1e30  # type: ignore[index]
        elif what == "short":
            action = action[:-1]  # type: ignore[index]
        self._step(
            action,
            age=1.0 if what == "stale" else 0.0,
            late=2.0 if what == "late" else 0.0,
            lost=what == "lost",
            expected=what == "expected",
        )

    @rule(code=st.sampled_from(["policy.crashed", "safety.policy_timeout", "runtime.robot", "camera.lost"]))
    def failure(self, code: str) -> None:
        self.stage.fail(code, "on purpose")
        self._step(None)

    @rule(pressed=st.booleans())
    def e_stop(self, pressed: bool) -> None:
        self.pressed = pressed
        self.stage.e_stop(pressed)
        self._step(None)

    @rule()
    def person_clears(self) -> None:
        if self.stage.state is SafetyState.LATCHED and not self.pressed:
            self.stage.clear("Ada")
            assert self.stage.state is SafetyState.IDLE
            self.latched_since_clear = False
        else:
            with pytest.raises(RatchetError):
                self.stage.clear("Ada")

    @rule()
    def start(self) -> None:
        if self.stage.state in (SafetyState.IDLE, SafetyState.HOLDING) and not self.pressed:
            self.stage.start(state_at(self.contract, self.place), self.now)
            self.checker = InvariantChecker(self.contract, self.place, np.zeros(3), self.now)
            self.stopping = 0
        elif self.stage.state is SafetyState.LATCHED or self.pressed:
            with pytest.raises(RatchetError, match=r"safety\.latched"):
                self.stage.start(state_at(self.contract, self.place), self.now)

    @rule()
    def stop(self) -> None:
        self.stage.stop()
        self._step(None)

    @rule()
    def resume(self) -> None:
        self.stage.resume()

    @rule(seconds=st.sampled_from([0.001, 0.04, 0.2, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.result is not None)
    @invariant()
    def no_command_outside_motion(self) -> None:
        assert self.result is not None
        if self.result.state in (SafetyState.IDLE, SafetyState.HOLDING, SafetyState.LATCHED):
            assert self.result.command is None
            assert not self.result.accepted

    @precondition(lambda self: self.checker is not None)
    @invariant()
    def limits_hold(self) -> None:
        assert self.checker is not None
        assert self.checker.violations == []

    @invariant()
    def stops_end(self) -> None:
        assert self.stopping * T <= self.contract.watchdog.stop_time + 3 * T

    def _step(
        self,
        action: np.ndarray | None,
        *,
        age: float = 0.0,
        late: float = 0.0,
        lost: bool = False,
        expected: bool = False,
    ) -> None:
        self.now += T
        self.count += 1
        before = self.stage.state
        proposal = None if action is None else Proposal(action, action, self.now - late, self.count, 0)
        state = state_at(self.contract, self.place)
        if lost:
            state["place"][:] = np.nan
        result = self.result = self.stage.step(proposal, state, self.now - age, self.now, expected=expected)
        self.stopping = self.stopping + 1 if result.state is SafetyState.STOPPING else 0
        if before is SafetyState.LATCHED or self.latched_since_clear:
            assert result.command is None
        self.latched_since_clear |= result.state is SafetyState.LATCHED
        if self.checker is not None:
            self.checker.see(self.now, result.command, self.place, result.state is SafetyState.STOPPING)
        if result.command is not None:
            linear = result.command[:3].astype(float)
            scale = 1.0 if self.mode.endswith("delta") else T
            self.place = linear if self.mode.endswith("absolute") else self.place + linear * scale


TestAnythingCanHappen = AnythingCanHappen.TestCase
TestAnythingCanHappen.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
