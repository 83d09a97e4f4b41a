"""What a control loop hands to whoever records it.

Knows the protocol only. A sink must return at once (hand over to a thread or a queue): it is called from the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ratchet_vla.records import ActionChunk, ControlTick, Int64, Observation, SafetyEvent

__all__ = ["ChunkOutcome", "GuardedSink", "MemorySink", "NoSink", "Tee", "TickSink"]


@dataclass(frozen=True)
class ChunkOutcome:
    """What became of every action of one chunk, told once, when no more of them will be sent.

    sequence: `ActionChunk.observation_sequence`. marks: (K,) int64, `records.Mark` values; SKIPPED for actions
    that were never sent. `marks == 0` is `Step.executed`.
    """

    sequence: int
    adapter_id: str
    marks: Int64


@runtime_checkable
class TickSink(Protocol):
    """Receives an episode in the order of time. Every method must return at once and must not raise.

    Order: `begin`, then per decision `observation` and later `chunk`, per period `tick`, whenever they happen `event`
    and `outcome`, then `end`.
    """

    def begin(self, task: str, instruction: str, now: float) -> None:
        """An episode starts. now: seconds, robot's clock."""
        ...

    def observation(self, observation: Observation) -> None:
        """An observation that the policy was asked about; its `sequence` names the chunk that answers it."""
        ...

    def chunk(self, chunk: ActionChunk) -> None:
        """An answer that was admitted."""
        ...

    def tick(self, tick: ControlTick) -> None: ...

    def event(self, event: SafetyEvent) -> None: ...

    def outcome(self, outcome: ChunkOutcome) -> None: ...

    def end(self, reason: str, success: bool | None, source: str, now: float) -> None:
        """The episode ended. reason: a `loop.Termination` value.

        success, source: as in `Episode`; None if nobody labelled it.
        """
        ...


class NoSink:
    """Records nothing."""

    def begin(self, task: str, instruction: str, now: float) -> None:
        return

    def observation(self, observation: Observation) -> None:
        return

    def chunk(self, chunk: ActionChunk) -> None:
        return

    def tick(self, tick: ControlTick) -> None:
        return

    def event(self, event: SafetyEvent) -> None:
        return

    def outcome(self, outcome: ChunkOutcome) -> None:
        return

    def end(self, reason: str, success: bool | None, source: str, now: float) -> None:
        return


class MemorySink:
    """Keeps everything in lists: for tests and short looks. Not for long runs."""

    def __init__(self) -> None:
        self.observations: list[Observation] = []
        self.chunks: list[ActionChunk] = []
        self.ticks: list[ControlTick] = []
        self.events: list[SafetyEvent] = []
        self.outcomes: list[ChunkOutcome] = []
        self.episodes: list[tuple[str, ...]] = []

    def begin(self, task: str, instruction: str, now: float) -> None:
        self.episodes.append(("begin", task, instruction))

    def observation(self, observation: Observation) -> None:
        self.observations.append(observation)

    def chunk(self, chunk: ActionChunk) -> None:
        self.chunks.append(chunk)

    def tick(self, tick: ControlTick) -> None:
        self.ticks.append(tick)

    def event(self, event: SafetyEvent) -> None:
        self.events.append(event)

    def outcome(self, outcome: ChunkOutcome) -> None:
        self.outcomes.append(outcome)

    def end(self, reason: str, success: bool | None, source: str, now: float) -> None:
        self.episodes.append(("end", reason, str(success), source))


class GuardedSink:
    """Passes everything on until the sink fails once; then drops it, so that a broken recorder never stops an arm.

    error: what it failed with; None while it works. `wrapped` is the sink itself.
    """

    def __init__(self, wrapped: TickSink) -> None:
        self.wrapped = wrapped
        self.error: Exception | None = None

    def begin(self, task: str, instruction: str, now: float) -> None:
        self._pass(lambda: self.wrapped.begin(task, instruction, now))

    def observation(self, observation: Observation) -> None:
        self._pass(lambda: self.wrapped.observation(observation))

    def chunk(self, chunk: ActionChunk) -> None:
        self._pass(lambda: self.wrapped.chunk(chunk))

    def tick(self, tick: ControlTick) -> None:
        self._pass(lambda: self.wrapped.tick(tick))

    def event(self, event: SafetyEvent) -> None:
        self._pass(lambda: self.wrapped.event(event))

    def outcome(self, outcome: ChunkOutcome) -> None:
        self._pass(lambda: self.wrapped.outcome(outcome))

    def end(self, reason: str, success: bool | None, source: str, now: float) -> None:
        self._pass(lambda: self.wrapped.end(reason, success, source, now))

    def _pass(self, call: Callable[[], None]) -> None:
        if self.error is not None:
            return
        try:
            call()
        except Exception as error:  # whatever a recorder raises: told in `error`, the arm goes on
            self.error = error


class Tee:
    """Passes everything on to several sinks; one that fails is left out from then on, and the others go on."""

    def __init__(self, *sinks: TickSink) -> None:
        self.sinks = tuple(GuardedSink(sink) for sink in sinks)

    def begin(self, task: str, instruction: str, now: float) -> None:
        for sink in self.sinks:
            sink.begin(task, instruction, now)

    def observation(self, observation: Observation) -> None:
        for sink in self.sinks:
            sink.observation(observation)

    def chunk(self, chunk: ActionChunk) -> None:
        for sink in self.sinks:
            sink.chunk(chunk)

    def tick(self, tick: ControlTick) -> None:
        for sink in self.sinks:
            sink.tick(tick)

    def event(self, event: SafetyEvent) -> None:
        for sink in self.sinks:
            sink.event(event)

    def outcome(self, outcome: ChunkOutcome) -> None:
        for sink in self.sinks:
            sink.outcome(outcome)

    def end(self, reason: str, success: bool | None, source: str, now: float) -> None:
        for sink in self.sinks:
            sink.end(reason, success, source, now)
