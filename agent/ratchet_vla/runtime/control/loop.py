"""The fixed-rate control loop: observe, decide, check, command, once per period, on absolute deadlines.

Knows the order of a tick and how time is kept. Knows no model, no process, no ROS: robot, chunk source, executor,
safety filter, sink and clock are arguments. Requests to the policy never hold a tick up; in lock-step they do, on
purpose.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import numpy as np

from ratchet_vla.episodes.success_rules import already_solved, require_goal
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, ControlTick, Float32, Mark, Observation, SafetyEvent
from ratchet_vla.runtime.clock import Clock, ExternalClock, MonotonicClock
from ratchet_vla.runtime.control.chunks import ChunkExecutor
from ratchet_vla.runtime.control.episode import until_end
from ratchet_vla.runtime.control.labelling import Attempt, Labeller, SuccessLabel
from ratchet_vla.runtime.control.outcome import EpisodeEnd, FrameStamped, Termination, Timing
from ratchet_vla.runtime.control.priority import offer_interpreter, undisturbed
from ratchet_vla.runtime.control.sink import GuardedSink, NoSink, TickSink
from ratchet_vla.runtime.control.watchdog import Watchdog
from ratchet_vla.runtime.inference.source import ChunkSource, PolicyFault
from ratchet_vla.runtime.robots.protocol import Robot
from ratchet_vla.runtime.safety.filter import MOVING, FilterResult, Proposal, SafetyFilter, SafetyState

__all__ = ["ControlLoop", "EpisodeEnd", "FrameStamped", "Termination", "Timing"]


class ControlLoop:
    """One arm under control. `run_episode` for a task, or `begin`, `tick` …, `end` where somebody else keeps the order.

    lock_step: simulated time stands still while the policy thinks: the loop waits for each answer (at most `patience`
        real seconds), the clock advances by periods only, and what is observed is by definition of this moment.
    frozen_after: see `Watchdog`; seconds, 0 to not look for cameras that repeat themselves.
    All methods belong to one thread, except `cancel` and `human`, which are safe from any.
    """

    def __init__(
        self,
        robot: Robot,
        source: ChunkSource,
        safety: SafetyFilter,
        executor: ChunkExecutor,
        *,
        sink: TickSink | None = None,
        clock: Clock | None = None,
        lock_step: bool = False,
        patience: float = 30.0,
        frozen_after: float = 0.0,
    ) -> None:
        self.robot = robot
        self.source = source
        self.safety = safety
        self.executor = executor
        self.sink: TickSink = GuardedSink(sink) if sink is not None else NoSink()
        self.clock: Clock = clock or MonotonicClock()
        self.period = safety.period
        self.watchdog = Watchdog(safety.contract.watchdog, frozen_after)
        self.timing = Timing()
        self._lock_step = lock_step
        self._patience_s = patience
        self._time_in_steps = isinstance(self.clock, ExternalClock) and not lock_step
        self._frames = robot if isinstance(robot, FrameStamped) else None
        self._cancel = threading.Event()
        self._human: tuple[Float32, float] | None = None
        self._deadline = 0.0
        self._index = 0
        self._sequence = 0
        self._moved_at = -np.inf
        self._events = 0
        self._decided: set[int] = set()  # observations whose answer reached the robot, at least in part
        self._human_ticks = 0
        self._was_moving = False
        self._newest_state: Observation | None = None
        self._camera_error = ""  # code of the newest observation that failed, empty after a good one

    # -- an episode ----------------------------------------------------------------------------------------------

    def begin(self, task: str, instruction: str) -> None:
        """Arm the safety filter at the measured pose and start counting ticks.

        Raises:
            RatchetError: safety.latched, safety.state, and what the robot raises.
        """
        observation = self.robot.observe(cameras=False)
        self._newest_state = observation
        now = self.clock.now()
        self.safety.start(observation.state, now)
        self.executor.reset()
        self.executor.retired()
        self.source.forget()
        if self.source.ready:
            self.source.poll()  # faults of an earlier process, which nobody asked for while the arm was at rest
        self._cancel.clear()
        self._human = None
        self.watchdog.forget()
        self._index = 0
        self._sequence = 0
        self._events = 0
        self._human_ticks = 0
        self._decided.clear()
        self._moved_at = -np.inf
        self._was_moving = True
        # Of a step of simulated time there may be too little left for a tick.
        self._deadline = now + self.period if self._time_in_steps else now
        self.timing = Timing()
        self.sink.begin(task, instruction, now)

    def run_episode(
        self,
        task: str,
        instruction: str,
        *,
        horizon: int,
        labeller: Labeller | None = None,
        hold_timeout: float = 10.0,
        on_tick: Callable[[ControlTick], None] | None = None,
    ) -> EpisodeEnd:
        """Run until an outcome, `horizon` ticks, a cancel, a latched fault, or a hold of `hold_timeout` seconds.

        labeller: None where nobody can tell, and `EpisodeEnd.success` stays None.

        Raises:
            RatchetError: goal.no_task, goal.no_instruction, goal.already_solved, and what `begin` raises; nothing has
                moved then.
        """
        require_goal(task, instruction)
        if labeller is not None and labeller.outcome() is not None:
            raise already_solved(task)
        with undisturbed():  # before `begin`: from there on the first deadline runs
            self.begin(task, instruction)
            started_s = self.clock.now()
            termination = Termination.FAULT  # unless the episode comes to its end
            label = SuccessLabel()
            try:
                termination = until_end(self, horizon, labeller, hold_timeout, on_tick)
            finally:
                reason = self.safety.cause
                self._stop_or_hold()
                duration_s = self.clock.now() - started_s
                if labeller is not None:
                    label = labeller.label(Attempt(termination, len(self._decided), self._human_ticks))
                self.sink.end(termination.value, label.success, label.source, self.clock.now())
        return EpisodeEnd(
            termination,
            label.success,
            self._index,
            duration_s,
            self._events,
            reason,
            label.source,
            len(self._decided),
            self._human_ticks,
        )

    def stop(self) -> None:
        """Brake to standstill (a few ticks), hold, and drop what was planned."""
        self.safety.stop()
        while self.safety.state is SafetyState.STOPPING:
            self.tick()
        self.robot.hold()
        self.executor.reset()
        self._settle()
        self.source.forget()
        self.watchdog.forget()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called in this episode."""
        return self._cancel.is_set()

    def _stop_or_hold(self) -> None:
        try:
            self.stop()
        except BaseException:
            self.robot.hold()  # no controlled stop is possible any more
            raise

    def cancel(self) -> None:
        """End `run_episode` after the current tick, with a controlled stop. Any thread."""
        self._cancel.set()

    def human(self, action: Float32 | None) -> None:
        """A person's command for the coming ticks: (D,) float32, physical units; None ends it. Any thread.

        It passes the safety filter like any other, is marked HUMAN, and is too old after `action_max_age`. After the
        intervention the policy starts from a new observation, with the ramp.
        """
        self._human = None if action is None else (np.array(action, np.float32), self.clock.now())

    # -- one period ----------------------------------------------------------------------------------------------

    def tick(self) -> ControlTick:
        """Wait for the deadline, then run one period; returns what was done.

        Where a clock that may pause stands still, the arm brakes and is held, with every call once more for the same
        deadline. The next chunk is asked for after the command is out, so that reading images does not delay it; in
        lock-step before it, as time stands still meanwhile.
        """
        deadline = self._deadline
        time_goes_on = self.clock.sleep_until(deadline)
        if not time_goes_on:
            self.safety.fail(self.safety.config.standing_clock, f"the clock stands still before {deadline:.3f} s")
        now = self.clock.now()
        if self._lock_step:
            observation = self._ask_and_wait(now)
        else:
            observation = self._measure()
            self._answers(self.source.poll(), now)
        self._watch(now)
        proposal = self._propose(self._human, deadline, now)
        result = self.safety.step(proposal, observation.state, observation.stamp, now, expected=self.executor.expecting)
        sent = self._send(result)
        after = self.clock.now()
        offer_interpreter()  # nothing waits for what follows; whoever is let in here does not break in there
        tick = self._account(proposal, result, sent, observation, after, deadline)
        if not self._lock_step and time_goes_on:
            self._ask(deadline, now)
        self._settle()
        if time_goes_on or not self.safety.config.clock_may_pause:
            self._advance(deadline, after)
        return tick

    def _propose(self, human: tuple[Float32, float] | None, deadline: float, now: float) -> Proposal | None:
        if human is not None:
            if self.watchdog.asked or not self.executor.wants(now):
                self._drop_plan()
            action, given_at = human
            return Proposal(action, None, given_at, -1, -1, "", Mark.HUMAN)
        if self.safety.state in (SafetyState.STOPPING, SafetyState.LATCHED, SafetyState.IDLE):
            return None
        return self.executor.next(deadline)

    def _send(self, result: FilterResult) -> bool:
        """Command the robot; a refusal is a fault, and the arm holds."""
        try:
            if result.command is None:
                self.robot.hold()
                return False
            self.robot.act(result.command)
        except RatchetError as error:
            self.safety.fail("runtime.robot", f"{error.code}: {error.what}")
            return False
        return True

    def _account(
        self,
        proposal: Proposal | None,
        result: FilterResult,
        sent: bool,
        observation: Observation,
        after: float,
        deadline: float,
    ) -> ControlTick:
        marks = result.marks
        if marks & Mark.HUMAN:
            self._human_ticks += 1
        elif proposal is not None and result.accepted and sent:
            self.executor.sent(proposal, marks)
            self._decided.add(proposal.chunk_sequence)
        if not self.safety.resting:
            self._moved_at = after
        moving = result.state in MOVING
        self.watchdog.waiting(result.state is SafetyState.WAITING, deadline)
        if self._was_moving and not moving:
            self._drop_plan()
        self._was_moving = moving
        tick = ControlTick(
            stamp=after,
            deadline=deadline,
            index=self._index,
            sampled=proposal.sampled if proposal is not None else None,
            command=result.command if sent else None,
            marks=marks,
            chunk_sequence=proposal.chunk_sequence if proposal is not None else -1,
            chunk_offset=proposal.chunk_offset if proposal is not None else -1,
            adapter_id=proposal.adapter_id if proposal is not None else "",
            state=observation.state,
        )
        self._index += 1
        self.sink.tick(tick)
        for event in result.events:
            self._tell(event)
        return tick

    def _advance(self, deadline: float, after: float) -> None:
        """The next deadline on the grid that lies ahead; those already past are missed, not caught up with."""
        self.timing.jitter.append(after - deadline)
        work_s = self.clock.now() - deadline
        self.timing.work.append(work_s)
        missed_deadlines = 0 if self._lock_step else int(work_s / self.period)
        if missed_deadlines > 0:
            self.timing.overruns += 1
            self.timing.missed += missed_deadlines
        self._deadline = deadline + (missed_deadlines + 1) * self.period

    # -- the policy ----------------------------------------------------------------------------------------------

    def _ask(self, deadline: float, now: float) -> Observation | None:
        """Send a request when one is due and possible; the observation it was made on, else None."""
        state = self.safety.state
        may_move = state in MOVING or (state is SafetyState.HOLDING and self.safety.resting)
        if not (may_move and self._human is None and self.source.ready and self.executor.wants(deadline)):
            return None
        try:
            observation = self._observe(cameras=True)
        except RatchetError as error:
            if (
                error.code != self._camera_error
            ):  # told once; without observations the arm runs out of actions and holds
                self._tell(SafetyEvent(now, error.code, f"{error.what} ({error.where})"))
            self._camera_error = error.code
            return None
        self._camera_error = ""
        problem = self.watchdog.frozen(observation.images, now, not self.safety.resting)
        problem = problem or self.watchdog.old(observation.stamp, self.clock.now())
        if problem is not None:
            self.safety.fail(*problem)  # nothing is decided on such an observation
            return None
        observation = dataclasses.replace(observation, sequence=self._sequence)
        self.source.request(observation, self.executor.ahead(observation.stamp))
        self._sequence += 1
        self.watchdog.request(now)
        self.executor.asked(deadline)
        self.sink.observation(observation)
        return observation

    def _ask_and_wait(self, now: float) -> Observation:
        self._answers(self.source.poll(), now)
        observation = self._ask(self._deadline, now)
        if observation is None:
            return self._measure()
        replies = self.source.wait(self._patience_s)
        if not replies:
            self.safety.fail("safety.policy_timeout", f"no chunk after {self._patience_s} real seconds")
        self._answers(replies, now)
        return observation

    def _answers(self, replies: list[ActionChunk | PolicyFault], now: float) -> None:
        for reply in replies:
            if isinstance(reply, PolicyFault):
                self.watchdog.answered()
                self.safety.fail(reply.code, reply.message)
                continue
            awaited = self.watchdog.asked
            admitted, events = self.safety.admit(reply, now)
            for event in events:
                self._tell(event)
            if not awaited:
                continue  # a repetition, or nobody waits for it any more
            self.watchdog.answered()
            if admitted:
                self.sink.chunk(reply)
                self.executor.offer(reply, self._deadline, self._moved_at < reply.observation_stamp)
            else:
                self._drop_plan()

    def _watch(self, now: float) -> None:
        problem = None if self._lock_step else self.watchdog.late(now)
        if problem is None and self._frames is not None:
            problem = self.watchdog.old(self._frames.frames_stamp(), now)
        if problem is not None:
            self.safety.fail(*problem)

    def _drop_plan(self) -> None:
        """Nothing that was planned or asked for fits any more."""
        self.executor.reset()
        if self.watchdog.asked:
            self.source.forget()
            self.watchdog.answered()

    def _settle(self) -> None:
        for outcome in self.executor.retired():
            self.sink.outcome(outcome)

    def _observe(self, cameras: bool) -> Observation:
        observation = self.robot.observe(cameras)
        if self._lock_step:
            return dataclasses.replace(observation, stamp=self.clock.now())
        return observation

    def _measure(self) -> Observation:
        """The measured state; where the robot cannot tell, the last one, which grows too old, and a fault."""
        try:
            self._newest_state = self._observe(cameras=False)
        except RatchetError as error:
            if self._newest_state is None:
                raise
            self.safety.fail("safety.observation_age", f"no state: {error.code}: {error.what}")
        return self._newest_state

    def _tell(self, event: SafetyEvent) -> None:
        self._events += 1
        self.sink.event(event)
