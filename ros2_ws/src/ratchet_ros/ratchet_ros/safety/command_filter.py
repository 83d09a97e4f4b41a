"""The last stage before the arm: commands in, verdicts of a SafetyFilter out, in a thread of its own.

Knows the order of commands, silence, and when to brake by itself. Knows no topic: sending is an argument.
A command is checked the moment it comes, so that the stage adds no period of delay. Silence is noticed by deadline: a
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
from ratchet_vla.runtime.safety.filter import Proposal, SafetyConfig, SafetyFilter, SafetyState, Verdict

PATIENCE = 1.75  # periods without a command until the arm brakes; less than what counts as a pause of the whole motion
COMMAND_LOST = "safety.command_lost"
MOVING = (SafetyState.RAMPING, SafetyState.RUNNING, SafetyState.WAITING)


@dataclass(frozen=True)
class Order:
    """A command as the stage takes it. kind: "action", "hold" or "stop"; times in seconds on the stage's clock."""

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


class LastStage:
    """One per arm. Any thread may call `put`, `e_stop`, `dead_man`, `fail`, `clear`; everything else happens inside.

    send: (verdict, order or None, new) -> None, called from the stage's thread; the order is None where the stage acts
        by itself; new is False where the arm keeps a pose that it was told to keep before. told: gets every event.
    wake: called once in the stage's thread, before anything else: for its scheduling.
    broken: called from the stage's thread with whatever ended it although it must not end.
    lock_step: simulated time stands still while a command travels; each is checked against the state of its own moment,
        which is waited for (at most `patience` real seconds).
    """

    def __init__(
        self,
        contract: RobotContract,
        aligner: Aligner,
        clock: TimeBase,
        send: Callable[[Verdict, Order | None, bool], None],
        told: Callable[[SafetyEvent], None],
        config: SafetyConfig | None = None,
        *,
        broken: Callable[[BaseException], None],
        lock_step: bool = False,
        patience: float = 30.0,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.filter = SafetyFilter(contract, config)
        self.contract, self._aligner, self._clock = contract, aligner, clock
        self._send, self._told, self._broken = send, told, broken
        self._lock_step, self._patience, self._wake_up = lock_step, patience, wake
        self._orders: deque[Order] = deque(maxlen=50)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._heard = self._stepped = -np.inf
        self._session, self._number = 0, 0
        self._silent = True  # the hold that ends a motion has been sent
        self.commands = self.interventions = 0
        clock.watch(self._wake)

    # -- from outside --------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="last-stage", daemon=True)
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

    def put(self, order: Order) -> None:
        with self._changed:
            self._orders.append(order)
            self._changed.notify_all()

    def e_stop(self, pressed: bool) -> None:
        self.filter.e_stop(pressed)
        self._wake()

    def dead_man(self, pressed: bool) -> None:
        self.filter.dead_man(pressed, self._clock.now())

    def fail(self, code: str, message: str) -> None:
        self.filter.fail(code, message)
        self._wake()

    def clear(self, person: str) -> SafetyEvent:
        """A person clears a latched fault; done between two steps. Raises what SafetyFilter.clear raises."""
        with self._changed:
            event = self.filter.clear(person)
            self._orders.clear()
        self._told(event)
        return event

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._wake_up()
            self._serve()
        except BaseException as error:  # a stage that is gone must not go unnoticed
            self._broken(error)

    def _serve(self) -> None:
        while True:
            order = self._next()
            if self._stopping:
                break
            with self._changed:
                self._step(order)
        with self._changed:
            self.filter.stop()
            for _ in range(int(self.contract.watchdog.stop_time / self.filter.period) + 3):
                if self.filter.state is not SafetyState.STOPPING:
                    break
                self._act(None)
                time.sleep(self.filter.period)  # real pace of the braking commands, also where simulated time stands
            self._hold_once()

    def _next(self) -> Order | None:
        """The next command, or None when something is due without one."""
        with self._changed:
            while not self._stopping and not self._orders and not self._due():
                self._changed.wait(self._wait())
            return self._orders.popleft() if self._orders else None

    def _due(self) -> bool:
        state = self.filter.state
        if self.filter.pending:
            return True
        if state in (SafetyState.IDLE, SafetyState.LATCHED):
            return False
        if state is SafetyState.HOLDING:
            return self._lost_while_holding()
        if self._clock.stalled:
            return True
        patience = PATIENCE if state in MOVING and self._stepped <= self._heard else 1.0
        return self._clock.now() >= self._stepped + patience * self.filter.period - 1e-6

    def _wait(self) -> float:
        """Real seconds until it is worth looking again."""
        state = self.filter.state
        if state in (SafetyState.IDLE, SafetyState.LATCHED):
            return 1.0
        if state is SafetyState.HOLDING:
            return 0.2
        patience = PATIENCE if state in MOVING and self._stepped <= self._heard else 1.0
        left = self._stepped + patience * self.filter.period - self._clock.now()
        return min(max(left, 0.0005), 0.2)

    def _step(self, order: Order | None) -> None:
        if order is not None and not self._in_order(order):
            return
        if order is None:
            if self._clock.stalled and self.filter.state in MOVING:
                self.filter.fail(self.filter.config.standing_clock, "the simulated clock stands still")
            self._silence()
            self._act(None)
            return
        self.commands += 1
        if self._lock_step:
            moment = order.stamp - 0.25 * self.filter.period
            self._changed.wait_for(lambda: self._aligner.state_stamp() >= moment or self._stopping, self._patience)
        self._heard = self._now(order)
        if order.kind == "action":
            self._ready()
        if order.kind == "stop":
            self.filter.stop()
        self._act(order)

    def _lost_while_holding(self) -> bool:
        """Whoever commands the arm goes on commanding holds; silence takes the place of what the arm was held for."""
        quiet = self._clock.now() - self._heard
        return quiet > self.contract.watchdog.action_max_age and self.filter.cause != COMMAND_LOST

    def _silence(self) -> None:
        quiet = self._clock.now() - self._heard
        listening = (*MOVING, SafetyState.HOLDING)
        if self.filter.state in listening and quiet > self.contract.watchdog.action_max_age:
            text = f"no command for {quiet:.3g} s, allowed {self.contract.watchdog.action_max_age} s"
            self.filter.fail(COMMAND_LOST, text)

    def _ready(self) -> None:
        """The first action after a rest arms the filter at the measured pose."""
        if self.filter.state is not SafetyState.IDLE:
            return
        try:
            state, stamp = self._aligner.newest_state()
            age = self._heard - stamp
            if age > self.contract.watchdog.observation_max_age:
                raise RatchetError("safety.observation_age", f"the state is {age:.3g} s old")
            self.filter.start(state, self._heard)
        except RatchetError as error:
            self._told(SafetyEvent(self._clock.now(), error.code, str(error)))

    def _act(self, order: Order | None) -> None:
        now = self._now(order)
        proposal = None
        if order is not None and order.kind == "action" and order.action is not None:
            proposal = Proposal(order.action, order.action, order.due, order.number, 0, order.adapter_id, order.marks)
        try:
            state, stamp = self._aligner.newest_state()
        except RatchetError:
            state, stamp = {}, -np.inf
        verdict = self.filter.step(proposal, state, stamp, now, expected=True)
        if order is None or order.kind != "action":
            self._stepped = now
        else:
            self._stepped = self._heard
        changed = proposal is not None and (
            not verdict.accepted or bool((verdict.marks & ~proposal.marks) & (Mark.CLIPPED | Mark.RAMPED))
        )
        self.interventions += changed
        for event in verdict.events:
            self._told(event)
        new = verdict.command is not None or not self._silent
        self._silent = verdict.command is None
        if new or order is not None:
            self._send(verdict, order, new)

    def _now(self, order: Order | None) -> float:
        """A command's own stamp is a lower bound: in a simulation it may overtake the /clock that it was made on."""
        now = self._clock.now()
        return max(now, order.stamp) if order is not None and self._lock_step else now

    def _hold_once(self) -> None:
        if not self._silent:
            self._silent = True
            self._send(Verdict(None, Mark.HELD, self.filter.state, False), None, True)

    def _in_order(self, order: Order) -> bool:
        if order.session != self._session:
            if self.filter.state in MOVING and self._session:
                self.filter.fail("safety.second_sender", "commands of another sender arrived while the arm moved")
            self._session, self._number = order.session, 0
        if order.number <= self._number:
            text = f"command {order.number} after {self._number} dropped"
            self._told(SafetyEvent(self._clock.now(), "safety.sequence", text, "", order.number, self._number))
            return False
        self._number = order.number
        return True

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
