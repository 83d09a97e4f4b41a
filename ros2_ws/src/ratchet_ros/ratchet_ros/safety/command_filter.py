"""The command filter, last before the arm: commands in, results of a SafetyFilter out, in a thread of its own.

Knows the order of commands, silence, and when to brake by itself. Knows no topic: sending is an argument.
A command is checked the moment it comes, so that the filter adds no period of delay. Silence is noticed by deadline: a
little before two periods the arm brakes and waits, after the contract's `action_max_age` that is a fault and it holds.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ratchet_ros.messages.times import TimeBase
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, Mark, SafetyEvent
from ratchet_vla.runtime.messages.align import Aligner
from ratchet_vla.runtime.safety.filter import FilterResult, Proposal, SafetyConfig, SafetyFilter, SafetyState

BRAKE_AFTER_PERIODS = (
    1.75  # periods without a command until the arm brakes; less than what counts as a pause of the whole motion
)
STEP_EVERY_PERIODS = 1.0  # while the arm brakes, or has been without a command for one step already
ROUNDING_S = 1e-6  # deadlines are sums of periods
IDLE_WAIT_S = 1.0  # nothing is due at rest: the thread wakes for commands alone
LONGEST_WAIT_S = 0.2  # of an arm in motion or held: bounds how late a clock that stands still is noticed
SHORTEST_WAIT_S = 0.0005
COMMAND_LOST = "safety.command_lost"
AT_REST = (SafetyState.IDLE, SafetyState.LATCHED)  # no command is expected
MOVING = (SafetyState.RAMPING, SafetyState.RUNNING, SafetyState.WAITING)


@dataclass(frozen=True)
class IncomingCommand:
    """A command as it arrives.

    action: (A,) float32 in the contract's units; absent unless kind is "action". stamp, due: seconds on the filter's
    clock. session: whose command it is. number: counts up within a session, from 1.
    """

    kind: Literal["action", "hold", "stop"]
    action: Float32 | None
    stamp: float
    due: float
    session: int
    number: int
    chunk_sequence: int = -1
    chunk_offset: int = -1
    adapter_id: str = ""
    marks: Mark = Mark.NONE


def was_changed(proposal: Proposal, result: FilterResult) -> bool:
    """Whether the arm was sent something else than was proposed."""
    added_marks = result.marks & ~proposal.marks
    return not result.accepted or bool(added_marks & (Mark.CLIPPED | Mark.RAMPED))


@dataclass(frozen=True)
class FilterCallbacks:
    """Whom a command filter tells.

    send: (result, command or None, new), in the filter's thread; the command is None where the filter acts by itself;
        new is False where the arm keeps a pose that it was told to keep before.
    on_event: gets every event, in the filter's thread or in that of `clear`.
    on_thread_start: called once in the filter's thread, before anything else: for its scheduling.
    on_thread_death: called in the filter's thread with whatever ended it although it must not end.
    """

    send: Callable[[FilterResult, IncomingCommand | None, bool], None]
    on_event: Callable[[SafetyEvent], None]
    on_thread_start: Callable[[], None]
    on_thread_death: Callable[[BaseException], None]


class CommandFilter:
    """One per arm. Any thread may call `put`, `e_stop`, `dead_man`, `fail`, `clear`; everything else happens inside.

    safety: the rules; this class adds when they are applied.
    lock_step: simulated time stands still while a command travels; each is checked against the state of its own moment,
        which is waited for (at most `patience` real seconds).
    """

    def __init__(
        self,
        contract: RobotContract,
        aligner: Aligner,
        clock: TimeBase,
        callbacks: FilterCallbacks,
        config: SafetyConfig | None = None,
        *,
        lock_step: bool = False,
        patience: float = 30.0,
    ) -> None:
        self.safety = SafetyFilter(contract, config)
        self.contract = contract
        self._aligner = aligner
        self._clock = clock
        self._callbacks = callbacks
        self._lock_step = lock_step
        self._patience_s = patience
        self._queue: deque[IncomingCommand] = deque(maxlen=50)
        # Guards the queue and `_stopping`, and is held through each step, so that `clear` falls between two steps.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        # From here on only the filter's thread writes.
        self._last_command_s = -np.inf
        self._last_step_s = -np.inf
        self._session = 0
        self._last_number = 0  # of this session's commands
        self._hold_sent = True  # the hold that ends a motion
        self.commands = 0
        self.changed_commands = 0
        clock.watch(self._notify)

    # -- from outside --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the filter's thread."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="command-filter", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Brake, hold, end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(self.contract.watchdog.stop_time + 2.0)
            self._thread = None

    def arrived(self) -> None:
        """New state is there."""
        if self._lock_step:
            self._notify()

    def put(self, command: IncomingCommand) -> None:
        """Queue a command; beyond 50 unserved ones the oldest is dropped."""
        with self._changed:
            self._queue.append(command)
            self._changed.notify_all()

    def e_stop(self, pressed: bool) -> None:
        """Stop and latch while pressed; see `SafetyFilter.e_stop`."""
        self.safety.e_stop(pressed)
        self._notify()

    def dead_man(self, pressed: bool) -> None:
        """Take one report of the dead-man switch."""
        self.safety.dead_man(pressed, self._clock.now())

    def fail(self, code: str, message: str) -> None:
        """Take a fault from outside; whether it latches, the configuration says by its code."""
        self.safety.fail(code, message)
        self._notify()

    def clear(self, operator: str) -> SafetyEvent:
        """A person clears a latched fault; done between two steps. Raises what SafetyFilter.clear raises."""
        with self._changed:
            event = self.safety.clear(operator)
            self._queue.clear()
        self._callbacks.on_event(event)
        return event

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._callbacks.on_thread_start()
            self._serve()
        except BaseException as error:  # a filter that is gone must not go unnoticed
            self._callbacks.on_thread_death(error)

    def _serve(self) -> None:
        while True:
            command = self._next()
            if self._stopping:
                break
            with self._changed:
                self._step(command)
        with self._changed:
            self.safety.stop()
            for _ in range(int(self.contract.watchdog.stop_time / self.safety.period) + 3):
                if self.safety.state is not SafetyState.STOPPING:
                    break
                self._act(None)
                time.sleep(self.safety.period)  # real pace of the braking commands, also where simulated time stands
            self._send_hold_once()

    def _next(self) -> IncomingCommand | None:
        """The next command, or None when something is due without one."""
        with self._changed:
            while not self._stopping and not self._queue and not self._step_is_due():
                self._changed.wait(self._seconds_to_wait())
            return self._queue.popleft() if self._queue else None

    def _step_is_due(self) -> bool:
        state = self.safety.state
        if self.safety.pending:
            return True
        if state in AT_REST:
            return False
        if state is SafetyState.HOLDING:
            return self._lost_while_holding()
        if self._clock.stalled:
            return True
        return self._clock.now() >= self._step_deadline() - ROUNDING_S

    def _seconds_to_wait(self) -> float:
        """Real seconds until it is worth looking again."""
        state = self.safety.state
        if state in AT_REST:
            return IDLE_WAIT_S
        if state is SafetyState.HOLDING:
            return LONGEST_WAIT_S
        return min(max(self._step_deadline() - self._clock.now(), SHORTEST_WAIT_S), LONGEST_WAIT_S)

    def _step_deadline(self) -> float:
        """When the filter acts by itself unless a command comes first; seconds on its clock."""
        periods = STEP_EVERY_PERIODS
        if self.safety.state in MOVING and self._last_step_s <= self._last_command_s:
            periods = BRAKE_AFTER_PERIODS
        return self._last_step_s + periods * self.safety.period

    def _step(self, command: IncomingCommand | None) -> None:
        if command is not None and not self._in_sequence(command):
            return
        if command is None:
            if self._clock.stalled and self.safety.state in MOVING:
                self.safety.fail(self.safety.config.standing_clock, "the simulated clock stands still")
            self._fail_when_silent()
            self._act(None)
            return
        self.commands += 1
        if self._lock_step:
            # A quarter of a period: stamps of one moment differ by rounding, those of two by a whole period.
            moment = command.stamp - 0.25 * self.safety.period
            self._changed.wait_for(lambda: self._aligner.state_stamp() >= moment or self._stopping, self._patience_s)
        self._last_command_s = self._now(command)
        if command.kind == "action":
            self._arm_when_idle()
        if command.kind == "stop":
            self.safety.stop()
        self._act(command)

    def _lost_while_holding(self) -> bool:
        """Whoever commands the arm goes on commanding holds; silence takes the place of what the arm was held for."""
        quiet_s = self._clock.now() - self._last_command_s
        return quiet_s > self.contract.watchdog.action_max_age and self.safety.cause != COMMAND_LOST

    def _fail_when_silent(self) -> None:
        quiet_s = self._clock.now() - self._last_command_s
        listening = (*MOVING, SafetyState.HOLDING)
        if self.safety.state in listening and quiet_s > self.contract.watchdog.action_max_age:
            text = f"no command for {quiet_s:.3g} s, allowed {self.contract.watchdog.action_max_age} s"
            self.safety.fail(COMMAND_LOST, text)

    def _arm_when_idle(self) -> None:
        """The first action after a rest arms the filter at the measured pose."""
        if self.safety.state is not SafetyState.IDLE:
            return
        try:
            state, state_stamp = self._aligner.newest_state()
            age = self._last_command_s - state_stamp
            if age > self.contract.watchdog.observation_max_age:
                raise RatchetError("safety.observation_age", f"the state is {age:.3g} s old")
            self.safety.start(state, self._last_command_s)
        except RatchetError as error:
            self._callbacks.on_event(SafetyEvent(self._clock.now(), error.code, str(error)))

    def _act(self, command: IncomingCommand | None) -> None:
        now = self._now(command)
        proposal = None
        if command is not None and command.kind == "action" and command.action is not None:
            proposal = Proposal(
                command.action, command.action, command.due, command.number, 0, command.adapter_id, command.marks
            )
        try:
            state, state_stamp = self._aligner.newest_state()
        except RatchetError:  # nothing was measured yet: infinitely old, so that the rules hold the arm
            state = {}
            state_stamp = -np.inf
        result = self.safety.step(proposal, state, state_stamp, now, expected=True)
        if command is None or command.kind != "action":
            self._last_step_s = now
        else:
            self._last_step_s = self._last_command_s
        if proposal is not None and was_changed(proposal, result):
            self.changed_commands += 1
        for event in result.events:
            self._callbacks.on_event(event)
        new = result.command is not None or not self._hold_sent  # else the arm keeps the pose that it keeps already
        self._hold_sent = result.command is None
        if new or command is not None:
            self._callbacks.send(result, command, new)

    def _now(self, command: IncomingCommand | None) -> float:
        """A command's own stamp is a lower bound: in a simulation it may overtake the /clock that it was made on."""
        now = self._clock.now()
        if command is not None and self._lock_step:
            return max(now, command.stamp)
        return now

    def _send_hold_once(self) -> None:
        if not self._hold_sent:
            self._hold_sent = True
            self._callbacks.send(FilterResult(None, Mark.HELD, self.safety.state, False), None, True)

    def _in_sequence(self, command: IncomingCommand) -> bool:
        if command.session != self._session:
            if self.safety.state in MOVING and self._session:
                self.safety.fail("safety.second_sender", "commands of another sender arrived while the arm moved")
            self._session = command.session
            self._last_number = 0
        if command.number <= self._last_number:
            text = f"command {command.number} after {self._last_number} dropped"
            self._callbacks.on_event(
                SafetyEvent(self._clock.now(), "safety.sequence", text, "", command.number, self._last_number)
            )
            return False
        self._last_number = command.number
        return True

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
