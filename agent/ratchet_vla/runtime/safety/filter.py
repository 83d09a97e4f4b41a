"""The safety filter: the last thing an action passes before the robot, on by default.

Knows the contract's limits and times, faults, holds and who may end them. Knows no policy, no camera driver and no ROS.
It is not a safety-rated function; it works inside the robot's own limits. States and transitions: docs/safety.md.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, Float32, Mark, SafetyEvent
from ratchet_vla.runtime.safety import checks
from ratchet_vla.runtime.safety.limits import Limiter
from ratchet_vla.runtime.safety.measured import Measured
from ratchet_vla.runtime.safety.pacing import Pacer
from ratchet_vla.runtime.safety.types import FilterResult, Proposal, SafetyConfig, SafetyState

__all__ = ["MOVING", "FilterResult", "Proposal", "SafetyConfig", "SafetyFilter", "SafetyState"]

MOVING = (SafetyState.RAMPING, SafetyState.RUNNING, SafetyState.WAITING)
"""States of an attempt under way: nothing has stopped it."""

GUARDED = (*MOVING, SafetyState.HOLDING)
"""States in which every input is checked: the arm moves, or goes on by itself once the cause of its hold has passed."""

E_STOP = "safety.e_stop"
CLOCK_FAULTS = ("safety.clock", "safety.clock_paused")


class SafetyFilter:
    """One per arm. Call `start`, then `step` once per control period; send what the result says and nothing else.

    Time is what the caller passes as `now`: seconds on the clock that also stamps observations. Within any window of w
    seconds no dimension is displaced by more than its velocity limit times (w + 1.25 periods). Not thread-safe; the
    flags behind `e_stop`, `dead_man` and `fail` are, and act at the next step.

    Raises (constructor):
        RatchetError: safety.no_measured_pose, safety.cannot_stop, safety.unknown_action, safety.bad_box.
    """

    def __init__(
        self, contract: RobotContract, config: SafetyConfig | None = None, *, period: float | None = None
    ) -> None:
        """period: seconds between commands; the contract's control period if absent."""
        self.contract = contract
        self.config = config or SafetyConfig()
        self.period = period or 1.0 / contract.control_hz
        self.limiter = Limiter(contract, self.period)
        self._state = SafetyState.IDLE
        self._cause = ""
        self._after_stop = SafetyState.IDLE  # what the state STOPPING leads to
        self._e_stop = False
        self._pending: deque[tuple[str, str]] = deque()  # (code, message) of faults, from any thread
        self._dead_man_stamp = -math.inf
        self._moving_since = 0.0
        self._stopping_since = 0.0
        self._stop_steps = 0
        self._pacer = Pacer(self.period)
        self._last_order = (-1, -1)
        self._chunk_sequence = -1
        self._measured: Measured | None = None
        self._measured_stamp = -math.inf
        self._resume_requested = False
        self._faulted_this_step = False
        self._driven_by_human = False

    # -- what a person and the surroundings say ------------------------------------------------------------------

    @property
    def state(self) -> SafetyState:
        """Where the filter stands after the last step; docs/safety.md shows the transitions."""
        return self._state

    @property
    def cause(self) -> str:
        """Code of what stopped the motion; empty while moving or idle."""
        return self._cause

    @property
    def pending(self) -> bool:
        """Whether something was reported from outside that the next step will take up."""
        return bool(self._pending)

    @property
    def resting(self) -> bool:
        """Whether the last command left the arm without speed."""
        return self.limiter.resting

    def start(self, state: Mapping[str, Float32], now: float) -> None:
        """Allow motion from the measured pose, standing still; sequence numbers begin anew.

        Raises:
            RatchetError: safety.latched while a fault or the e-stop is in force, safety.state for a bad measurement.
        """
        if self._state is SafetyState.LATCHED or self._e_stop:
            raise RatchetError(
                "safety.latched",
                f"motion is stopped by {self._cause or E_STOP}",
                fix="remove the cause, release the e-stop, then clear",
            )
        if not self.limiter.resting and self._state is not SafetyState.IDLE:
            raise RatchetError("safety.moving", "the arm is still moving", fix="stop first")
        self._measured = self.limiter.measure(state)
        self._measured_stamp = now
        self.limiter.start(self._measured)
        self._pending.clear()
        self._last_order = (-1, -1)
        self._chunk_sequence = -1
        self._pacer.start(now)
        self._begin(now)

    def stop(self) -> None:
        """End the motion with bounded deceleration and go idle; faults stay latched."""
        if self._state in GUARDED:
            self._brake_then(SafetyState.IDLE, "")
        elif self._state is SafetyState.STOPPING and self._after_stop is SafetyState.HOLDING:
            self._after_stop = SafetyState.IDLE
            self._cause = ""

    def resume(self) -> None:
        """A person lets motion go on after a hold (where `SafetyConfig.resume` is "manual")."""
        self._resume_requested = True

    def clear(self, operator: str) -> SafetyEvent:
        """A person declares a latched fault removed; the state becomes idle and `start` is possible again.

        Raises:
            RatchetError: safety.no_operator without a name, safety.not_latched, safety.e_stop while it is pressed.
        """
        if not operator.strip():
            raise RatchetError(
                "safety.no_operator", "a latched fault is cleared by a named operator", fix="give a name"
            )
        if self._e_stop:
            raise RatchetError(E_STOP, "the e-stop is pressed", fix="release it, then clear")
        if self._state is not SafetyState.LATCHED:
            raise RatchetError("safety.not_latched", f"nothing is latched, state is {self._state.value}")
        event = SafetyEvent(self._pacer.now, "safety.cleared", f"{self._cause} cleared by {operator.strip()}")
        self._state = SafetyState.IDLE
        self._cause = ""
        self._pending.clear()
        return event

    def e_stop(self, pressed: bool) -> None:
        """Emergency stop by software: latches at the next step; releasing it does not clear the latch. Any thread."""
        self._e_stop = pressed
        if pressed:
            self._pending.append((E_STOP, "emergency stop"))

    def dead_man(self, pressed: bool, now: float) -> None:
        """The dead-man switch, repeated while it is held. Any thread."""
        self._dead_man_stamp = now if pressed else -math.inf

    def fail(self, code: str, message: str) -> None:
        """Something outside failed (policy lost, camera lost, robot refused): stop at the next step. Any thread."""
        self._pending.append((code, message))

    # -- chunks --------------------------------------------------------------------------------------------------

    def admit(self, chunk: ActionChunk, now: float) -> tuple[bool, tuple[SafetyEvent, ...]]:
        """Whether a chunk may be executed at all: shape, finite values, order and age of its observation.

        A chunk that is not finite or of a wrong shape is a fault; one that is late, repeated or out of order is
        dropped with an event.
        """
        fault = checks.chunk_fault(chunk, self.contract, self.period, now)
        if fault:
            self.fail(*fault)
            return False, ()
        if chunk.observation_sequence <= self._chunk_sequence:
            event = self._event(
                now,
                "safety.chunk_sequence",
                "repeated or reordered chunk dropped",
                value=float(chunk.observation_sequence),
                limit=float(self._chunk_sequence),
            )
            return False, (event,)
        last_action_age_s = now - (chunk.observation_stamp + (len(chunk.actions) - 1) * self.period)
        allowed_s = self.contract.watchdog.action_max_age
        if last_action_age_s > allowed_s:
            text = "chunk dropped: even its last action is too old, seconds"
            event = self._event(now, "safety.chunk_age", text, value=last_action_age_s, limit=allowed_s)
            return False, (event,)
        self._chunk_sequence = chunk.observation_sequence
        return True, ()

    # -- one tick ------------------------------------------------------------------------------------------------

    def step(
        self,
        proposal: Proposal | None,
        state: Mapping[str, Float32],
        stamp: float,
        now: float,
        *,
        expected: bool = False,
    ) -> FilterResult:
        """Decide what the robot is sent in this period.

        proposal: the next action, None where there is none.
        state, stamp: measured state and when it was measured. now: seconds.
        expected: a missing proposal is part of the plan (`collect` waits for the next chunk); the arm brakes and waits
            without an event. Otherwise it brakes and holds.
        """
        events: list[SafetyEvent] = []
        pace = self._pacer.step(now)
        if pace.problem:
            code = self.config.standing_clock if pace.stands else "safety.clock"
            self._pending.append((code, pace.problem))
        elif pace.gap and not self.limiter.resting:
            text = "commands paused, the arm counts as standing; seconds"
            events.append(self._event(now, "safety.gap", text, value=pace.gap, limit=self._pacer.allowed_gap))
            self.limiter.halt()
        measured = self._check_state(state, stamp, now)
        self._check_dead_man(now)
        if self._e_stop and self._state is not SafetyState.LATCHED and self._cause != E_STOP:
            self._pending.append((E_STOP, "emergency stop"))
        if proposal is not None and self._state in GUARDED and not self._pending:
            proposal = self._check_proposal(proposal, now)
        elif proposal is None and not expected and self._state in MOVING and not self._pending:
            self._pending.append(("safety.no_action", "no action to send"))
        self._take_faults(now, events)
        if self._state is SafetyState.HOLDING and proposal is not None and self._may_resume():
            self.limiter.start(measured)
            self._begin(now)
        if self._state is SafetyState.STOPPING:
            return self._brake(measured, pace.dt, now, events)
        if self._state not in MOVING:
            return FilterResult(None, Mark.HELD, self._state, False, tuple(events))
        if proposal is None:
            return self._wait(measured, pace.dt, events)
        return self._move(proposal, measured, pace.dt, now, events)

    # -- inside --------------------------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        self._cause = ""
        self._resume_requested = False
        self._moving_since = now
        self._state = SafetyState.RAMPING if self.contract.limits.ramp_time > 0 else SafetyState.RUNNING

    def _brake_then(self, after_stop: SafetyState, cause: str) -> None:
        """Enter STOPPING; once the arm stands, the state becomes `after_stop`."""
        self._stopping_since = self._pacer.now
        self._stop_steps = 0
        self._state = SafetyState.STOPPING
        self._after_stop = after_stop
        self._cause = cause
        self._resume_requested = False

    def _check_state(self, state: Mapping[str, Float32], stamp: float, now: float) -> Measured:
        try:
            measured = self.limiter.measure(state)
        except RatchetError as error:
            if self._state in GUARDED:
                self._pending.append((error.code, f"{error.what} ({error.where})"))
            if self._measured is None:
                size = len(self.limiter.target())
                return Measured(np.full(size, np.nan), np.full(4, np.nan), math.nan)
            return self._measured
        if self._state in GUARDED:
            age_s = now - stamp
            allowed_s = self.contract.watchdog.observation_max_age
            if not age_s <= allowed_s:  # this way round, so that NaN is too old
                text = f"the state is {age_s:.3g} s old, allowed {allowed_s} s"
                self._pending.append(("safety.observation_age", text))
            elif age_s < -self.period:
                self._pending.append(("safety.clock", f"the state is stamped {-age_s:.3g} s ahead of the clock"))
            if self._state is not SafetyState.HOLDING and self._measured is not None:
                elapsed_s = max(stamp - self._measured_stamp, self.period)
                problem = checks.jump(self.limiter, self._measured, measured, elapsed_s, self.config.jump_factor)
                problem = problem or checks.lag(self.limiter, measured, self.config.tracking_factor)
                if problem:
                    self._pending.append(problem)
        self._measured = measured
        self._measured_stamp = stamp
        return measured

    def _check_dead_man(self, now: float) -> None:
        if not self.config.dead_man or self._state not in GUARDED:
            return
        if not now - self._dead_man_stamp <= self.config.dead_man_timeout:
            self._pending.append(("safety.dead_man", "the dead-man switch is not held"))

    def _check_proposal(self, proposal: Proposal, now: float) -> Proposal | None:
        problem = checks.proposal_problem(proposal, self.contract, self.limiter, now)
        if problem:
            self._pending.append(problem)
            return None
        order = (proposal.chunk_sequence, proposal.chunk_offset)
        if not proposal.marks & Mark.HUMAN:
            if order <= self._last_order:
                text = f"action {order} after {self._last_order}"
                self._pending.append(("safety.sequence", text))
                return None
            self._last_order = order
        return proposal

    def _take_faults(self, now: float, events: list[SafetyEvent]) -> None:
        """Every fault since the last step becomes an event; the first of the gravest kind decides the state."""
        self._faulted_this_step = bool(self._pending)
        while self._pending:
            code, message = self._pending.popleft()
            latching = code in self.config.latch_on
            if self._state is SafetyState.LATCHED or (self._state is SafetyState.IDLE and code != E_STOP):
                continue
            if self._state is SafetyState.HOLDING and not latching and code == self._cause:
                continue  # still the same cause: one event was enough
            if self._state is SafetyState.STOPPING and code == self._cause:
                continue
            events.append(self._event(now, code, message, latched=latching))
            if latching:
                if self._state in (SafetyState.HOLDING, SafetyState.IDLE):
                    self._state = SafetyState.LATCHED
                    self._cause = code
                elif self._state is SafetyState.STOPPING:
                    if self._after_stop is not SafetyState.LATCHED:
                        self._after_stop = SafetyState.LATCHED
                        self._cause = code
                else:
                    self._brake_then(SafetyState.LATCHED, code)
            elif self._state in MOVING:
                self._brake_then(SafetyState.HOLDING, code)
            elif self._state is SafetyState.HOLDING:
                self._cause = code

    def _may_resume(self) -> bool:
        return not self._faulted_this_step and (self.config.resume == "automatic" or self._resume_requested)

    def _brake(self, measured: Measured, dt: float, now: float, events: list[SafetyEvent]) -> FilterResult:
        self._stop_steps += 1
        allowed_s = self.contract.watchdog.stop_time + 2 * self.period
        # Steps are counted beside the clock, as a clock that stands still would never be overdue.
        overdue = now - self._stopping_since > allowed_s or self._stop_steps * self.period > allowed_s
        if self._cause in CLOCK_FAULTS:
            dt = self.period  # the clock cannot be asked; braking must go on
        if self.limiter.resting or overdue:
            self.limiter.halt()
            self._state = self._after_stop
            return FilterResult(None, Mark.HELD, self._state, False, tuple(events))
        command = self.limiter.brake(measured, dt)
        return FilterResult(command, Mark.HELD, self._state, False, tuple(events))

    def _wait(self, measured: Measured, dt: float, events: list[SafetyEvent]) -> FilterResult:
        self._state = SafetyState.WAITING
        if self.limiter.resting:
            self.limiter.halt()
            return FilterResult(None, Mark.HELD, self._state, False, tuple(events))
        return FilterResult(self.limiter.brake(measured, dt), Mark.HELD, self._state, False, tuple(events))

    def _move(
        self, proposal: Proposal, measured: Measured, dt: float, now: float, events: list[SafetyEvent]
    ) -> FilterResult:
        human = bool(proposal.marks & Mark.HUMAN)
        if self._driven_by_human and not human:
            self._moving_since = now  # the intervention ended: the policy begins as after a start
        self._driven_by_human = human
        ramp_s = self.contract.limits.ramp_time
        moved_s = now - self._moving_since + self.period
        ramping = moved_s < ramp_s
        velocity_share = moved_s / ramp_s if ramping else 1.0
        self._state = SafetyState.RAMPING if ramping else SafetyState.RUNNING
        command, cuts = self.limiter.apply(proposal.action, measured, dt, velocity_share)
        marks = proposal.marks
        for name, cut in cuts:
            slowed = ramping and cut.kind == "velocity"
            marks |= Mark.RAMPED if slowed else Mark.CLIPPED
            events.append(checks.cut_event(self.contract, now, name, cut, slowed))
        return FilterResult(command, marks, self._state, True, tuple(events))

    def _event(
        self, now: float, code: str, message: str, *, value: float = 0.0, limit: float = 0.0, latched: bool = False
    ) -> SafetyEvent:
        return SafetyEvent(now, code, message, "", float(value), float(limit), latched)
