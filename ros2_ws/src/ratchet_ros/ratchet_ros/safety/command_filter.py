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

import numpy as np

from ratchet_ros.messages.times import TimeBase
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, Mark, SafetyEvent
from ratchet_vla.runtime.messages.align import Aligner
from ratchet_vla.runtime.safety.filter import FilterResult, Proposal, SafetyConfig, SafetyFilter, SafetyState

PATIENCE = 1.75  # periods without a command until the arm brakes; less than what counts as a pause of the whole motion
COMMAND_LOST = "safety.command_lost"
MOVING = (SafetyState.RAMPING, SafetyState.RUNNING, SafetyState.WAITING)


@dataclass(frozen=True)
class IncomingCommand:
    """A command as it arrives. kind: "action", "hold" or "stop"; times in seconds on the filter's clock."""

    kind: str
    action: Float32 | None
    stamp: float
    due: float
    session: int
    number: int
    chunk_sequence: int = -1
    chunk_offset: int = -1
    adapter_id: str = ""
    marks: Mark = Mark.NONE


class CommandFilter:
    """One per arm. Any thread may call `put`, `e_stop`, `dead_man`, `fail`, `clear`; everything else happens inside.

    safety: the rules; this class adds when they are applied.
    send: (result, command or None, new) -> None, called from the filter's thread; the command is None where the filter
        acts by itself; new is False where the arm keeps a pose that it was told to keep before. told: gets every event.
    wake: called once in the filter's thread, before anything else: for its scheduling.
    broken: called from the filter's thread with whatever ended it although it must not end.
    lock_step: simulated time stands still while a command travels; each is checked against the state of its own moment,
        which is waited for (at most `patience` real seconds).
    """

    def __init__(
        self,
        contract: RobotContract,
        aligner: Aligner,
        clock: TimeBase,
        send: Callable[[FilterResult, IncomingCommand | None, bool], None],
        told: Callable[[SafetyEvent], None],
        config: SafetyConfig | None = None,
        *,
        broken: Callable[[BaseException], None],
        lock_step: bool = False,
        patience: float = 30.0,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.safety = SafetyFilter(contract, config)
        self.contract, self._aligner, self._clock = contract, aligner, clock
        self._send, self._told, self._broken = send, told, broken
        self._lock_step, self._patience, self._wake_up = lock_step, patience, wake
        self._queue: deque[IncomingCommand] = deque(maxlen=50)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._heard = self._stepped = -np.inf
        self._session, self._number = 0, 0
        self._silent = True  # the hold that ends a motion has been sent
        self.commands = self.changed_commands = 0
        clock.watch(self._wake)

    # -- from outside --------------------------------------------------------------------------------------------

    def start(self) -> None:
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
            self._wake()

    def put(self, command: IncomingCommand) -> None:
        with self._changed:
            self._queue.append(command)
            self._changed.notify_all()

    def e_stop(self, pressed: bool) -> None:
        self.safety.e_stop(pressed)
        self._wake()

    def dead_man(self, pressed: bool) -> None:
        self.safety.dead_man(pressed, self._clock.now())

    def fail(self, code: str, message: str) -> None:
        self.safety.fail(code, message)
        self._wake()

    def clear(self, operator: str) -> SafetyEvent:
        """A person clears a latched fault; done between two steps. Raises what SafetyFilter.clear raises."""
        with self._changed:
            event = self.safety.clear(operator)
            self._queue.clear()
        self._told(event)
        return event

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._wake_up()
            self._serve()
        except BaseException as error:  # a filter that is gone must not go unnoticed
            self._broken(error)

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
            self._hold_once()

    def _next(self) -> IncomingCommand | None:
        """The next command, or None when something is due without one."""
        with self._changed:
            while not self._stopping and not self._queue and not self._due():
                self._changed.wait(self._wait())
            return self._queue.popleft() if self._queue else None

    def _due(self) -> bool:
        state = self.safety.state
        if self.safety.pending:
            return True
        if state in (SafetyState.IDLE, SafetyState.LATCHED):
            return False
        if state is SafetyState.HOLDING:
            return self._lost_while_holding()
        if self._clock.stalled:
            return True
        patience = PATIENCE if state in MOVING and self._stepped <= self._heard else 1.0
        return self._clock.now() >= self._stepped + patience * self.safety.period - 1e-6

    def _wait(self) -> float:
        """Real seconds until it is worth looking again."""
        state = self.safety.state
        if state in (SafetyState.IDLE, SafetyState.LATCHED):
            return 1.0
        if state is SafetyState.HOLDING:
            return 0.2
        patience = PATIENCE if state in MOVING and self._stepped <= self._heard else 1.0
        left = self._stepped + patience * self.safety.period - self._clock.now()
        return min(max(left, 0.0005), 0.2)

    def _step(self, command: IncomingCommand | None) -> None:
        if command is not None and not self._in_sequence(command):
            return
        if command is None:
            if self._clock.stalled and self.safety.state in MOVING:
                self.safety.fail(self.safety.config.standing_clock, "the simulated clock stands still")
            self._silence()
            self._act(None)
            return
        self.commands += 1
        if self._lock_step:
            moment = command.stamp - 0.25 * self.safety.period
            self._changed.wait_for(lambda: self._aligner.state_stamp() >= moment or self._stopping, self._patience)
        self._heard = self._now(command)
        if command.kind == "action":
            self._ready()
        if command.kind == "stop":
            self.safety.stop()
        self._act(command)

    def _lost_while_holding(self) -> bool:
        """Whoever commands the arm goes on commanding holds; silence takes the place of what the arm was held for."""
        quiet = self._clock.now() - self._heard
        return quiet > self.contract.watchdog.action_max_age and self.safety.cause != COMMAND_LOST

    def _silence(self) -> None:
        quiet = self._clock.now() - self._heard
        listening = (*MOVING, SafetyState.HOLDING)
        if self.safety.state in listening and quiet > self.contract.watchdog.action_max_age:
            text = f"no command for {quiet:.3g} s, allowed {self.contract.watchdog.action_max_age} s"
            self.safety.fail(COMMAND_LOST, text)

    def _ready(self) -> None:
        """The first action after a rest arms the filter at the measured pose."""
        if self.safety.state is not SafetyState.IDLE:
            return
        try:
            state, stamp = self._aligner.newest_state()
            age = self._heard - stamp
            if age > self.contract.watchdog.observation_max_age:
                raise RatchetError("safety.observation_age", f"the state is {age:.3g} s old")
            self.safety.start(state, self._heard)
        except RatchetError as error:
            self._told(SafetyEvent(self._clock.now(), error.code, str(error)))

    def _act(self, command: IncomingCommand | None) -> None:
        now = self._now(command)
        proposal = None
        if command is not None and command.kind == "action" and command.action is not None:
            proposal = Proposal(
                command.action, command.action, command.due, command.number, 0, command.adapter_id, command.marks
            )
        try:
            state, stamp = self._aligner.newest_state()
        except RatchetError:
            state, stamp = {}, -np.inf
        result = self.safety.step(proposal, state, stamp, now, expected=True)
        if command is None or command.kind != "action":
            self._stepped = now
        else:
            self._stepped = self._heard
        changed = proposal is not None and (
            not result.accepted or bool((result.marks & ~proposal.marks) & (Mark.CLIPPED | Mark.RAMPED))
        )
        self.changed_commands += changed
        for event in result.events:
            self._told(event)
        new = result.command is not None or not self._silent
        self._silent = result.command is None
        if new or command is not None:
            self._send(result, command, new)

    def _now(self, command: IncomingCommand | None) -> float:
        """A command's own stamp is a lower bound: in a simulation it may overtake the /clock that it was made on."""
        now = self._clock.now()
        return max(now, command.stamp) if command is not None and self._lock_step else now

    def _hold_once(self) -> None:
        if not self._silent:
            self._silent = True
            self._send(FilterResult(None, Mark.HELD, self.safety.state, False), None, True)

    def _in_sequence(self, command: IncomingCommand) -> bool:
        if command.session != self._session:
            if self.safety.state in MOVING and self._session:
                self.safety.fail("safety.second_sender", "commands of another sender arrived while the arm moved")
            self._session, self._number = command.session, 0
        if command.number <= self._number:
            text = f"command {command.number} after {self._number} dropped"
            self._told(SafetyEvent(self._clock.now(), "safety.sequence", text, "", command.number, self._number))
            return False
        self._number = command.number
        return True

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
