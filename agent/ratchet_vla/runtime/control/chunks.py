"""Two ways to execute chunks. `collect`: synchronous, exactly what was sampled. `deploy`: inference overlaps motion.

Knows which action of which chunk comes next, and what became of the others. Knows no robot, no policy and no limits.
An action j of a chunk is meant for the observation's stamp + j periods. `collect` sends all K in order, however late
they are (the safety filter checks their age). `deploy` skips what is past, blends over a window and drops the rest of
the chunk before. A chunk that begins from standstill is never cut at its head: nothing has moved since its observation.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol, runtime_checkable

import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, Float32, Mark
from ratchet_vla.runtime.control.sink import ChunkOutcome
from ratchet_vla.runtime.inference.source import Ahead
from ratchet_vla.runtime.safety.types import Proposal

__all__ = ["ChunkExecutor", "CollectExecutor", "DeployExecutor"]


@runtime_checkable
class ChunkExecutor(Protocol):
    """Decides which action is next. `now` is always the tick's deadline: jitter of the loop must not skip actions."""

    @property
    def expecting(self) -> bool:
        """Whether having no action at this moment is part of the plan (the arm waits for the next chunk)."""
        ...

    def wants(self, now: float) -> bool:
        """Whether a new chunk should be asked for at this moment."""
        ...

    def asked(self, now: float) -> None:
        """A request went out."""
        ...

    def ahead(self, seen: float) -> Ahead | None:
        """What is planned from an observation's moment on, for a request about it that goes out now."""
        ...

    def offer(self, chunk: ActionChunk, now: float, resting: bool) -> None:
        """A chunk that the safety filter admitted. resting: the arm has stood still since its observation."""
        ...

    def next(self, now: float) -> Proposal | None:
        """The action for this tick; each call advances."""
        ...

    def sent(self, proposal: Proposal, marks: Mark) -> None:
        """What became of a proposal."""
        ...

    def retired(self) -> list[ChunkOutcome]:
        """Chunks of which no more actions will be sent, since the last call."""
        ...

    def reset(self) -> None:
        """Drop everything that is planned: after a hold, an intervention, at an episode's end."""
        ...


class _Plan:
    """One chunk under execution. t0: seconds, when its first action is due."""

    def __init__(self, chunk: ActionChunk, t0: float) -> None:
        self.chunk, self.t0 = chunk, t0
        self.marks = np.full(len(chunk.actions), int(Mark.SKIPPED), np.int64)

    def outcome(self) -> ChunkOutcome:
        return ChunkOutcome(self.chunk.observation_sequence, self.chunk.adapter_id, self.marks)


class _Executor:
    def __init__(self, contract: RobotContract, period: float | None = None) -> None:
        self.period = period or 1.0 / contract.control_hz
        self._contract = contract
        self._plan: _Plan | None = None
        self._done: list[ChunkOutcome] = []
        self._asked = False

    def asked(self, now: float) -> None:
        self._asked = True

    def retired(self) -> list[ChunkOutcome]:
        done, self._done = self._done, []
        return done

    def reset(self) -> None:
        self._retire()
        self._asked = False

    def sent(self, proposal: Proposal, marks: Mark) -> None:
        if self._plan is not None and self._plan.chunk.observation_sequence == proposal.chunk_sequence:
            self._plan.marks[proposal.chunk_offset] = int(marks)

    def _retire(self) -> None:
        if self._plan is not None:
            self._done.append(self._plan.outcome())
            self._plan = None

    def _propose(self, offset: int, action: Float32, due: float, marks: Mark = Mark.NONE) -> Proposal:
        assert self._plan is not None
        chunk = self._plan.chunk
        return Proposal(action, chunk.actions[offset], due, chunk.observation_sequence, offset, chunk.adapter_id, marks)


class CollectExecutor(_Executor):
    """Every action of a chunk, in order, unchanged; only then the next chunk is asked for.

    use: actions of each chunk to execute before asking again; all if absent.
    """

    def __init__(self, contract: RobotContract, *, use: int | None = None, period: float | None = None) -> None:
        super().__init__(contract, period)
        self._use, self._offset = use, 0

    @property
    def expecting(self) -> bool:
        return True

    def wants(self, now: float) -> bool:
        return not self._asked and self._exhausted()

    def ahead(self, seen: float) -> Ahead | None:
        return None

    def offer(self, chunk: ActionChunk, now: float, resting: bool) -> None:
        self._retire()
        self._plan, self._offset, self._asked = _Plan(chunk, chunk.observation_stamp), 0, False

    def next(self, now: float) -> Proposal | None:
        if self._exhausted():
            return None
        assert self._plan is not None
        offset, self._offset = self._offset, self._offset + 1
        return self._propose(offset, self._plan.chunk.actions[offset], self._plan.t0 + offset * self.period)

    def _exhausted(self) -> bool:
        if self._plan is None:
            return True
        return self._offset >= min(self._use or len(self._plan.chunk.actions), len(self._plan.chunk.actions))


class DeployExecutor(_Executor):
    """The newest chunk, aligned in time; the next one is asked for early enough to arrive before this one is used up.

    use: actions of each chunk meant to be sent before the next chunk takes over; 1..K. The rest is the reserve that
        covers a late answer.
    blend: ticks over which the new chunk is mixed with the old one where it takes over; 0 for none. The gripper is
    never mixed.
    window: answers whose latency is remembered for asking early enough; the first after a start is not one of them.
    """

    def __init__(
        self, contract: RobotContract, *, use: int, blend: int = 2, window: int = 20, period: float | None = None
    ) -> None:
        super().__init__(contract, period)
        if use < 1 or blend < 0 or window < 1:
            raise RatchetError("runtime.bad_executor", f"use {use}, blend {blend}, window {window} make no executor")
        self._use, self._blend = use, blend
        self._latencies: deque[float] = deque(maxlen=window)
        self._asked_at = 0.0
        self._first, self._moved = True, False  # moved: a chunk has been in force since the last reset
        self._last = -1  # offset sent last, in the running plan
        self._blend_from: _Plan | None = None  # the chunk before, while the blend window lasts
        self._blended = 0
        gripper = contract.action.gripper
        names = [d.name for d in contract.action.dims]
        self._mixed = np.array([gripper is None or n != gripper.dim for n in names])
        self._quaternion = contract.action.rotation == "quaternion_xyzw"

    @property
    def expecting(self) -> bool:
        return not self._moved

    @property
    def latency(self) -> float:
        """Seconds to reckon with from request to answer: the longest of the last ones, 0 before any."""
        return max(self._latencies, default=0.0)

    def wants(self, now: float) -> bool:
        if self._asked:
            return False
        if self._plan is None:
            return True
        steps = int(np.ceil(self.latency / self.period - 1e-9)) + 1
        return self._last + 1 >= self._use - steps

    def asked(self, now: float) -> None:
        super().asked(now)
        self._asked_at = now

    def ahead(self, seen: float) -> Ahead | None:
        if self._plan is None:
            return None
        start = self._offset(seen)  # as `_offset` will count the answer's actions from the same moment
        planned = self._plan.chunk.actions[max(start, 0) :]
        if start < 0 or not len(planned):
            return None
        # The request goes out after this tick's command; the tick that finds the answer sends it already.
        waiting = max(int(np.ceil(self.latency / self.period - 1e-9)) - 1, 0)
        return Ahead(planned, min(max(self._last + 1 - start, 0) + waiting, len(planned)))

    def offer(self, chunk: ActionChunk, now: float, resting: bool) -> None:
        if self._asked:
            if not self._first:
                self._latencies.append(now - self._asked_at)
            self._first = self._asked = False
        t0 = now if resting else chunk.observation_stamp
        if round((now - t0) / self.period) >= len(chunk.actions):
            return  # all of it is past; the running plan goes on
        old = self._plan
        if old is not None:
            self._done.append(old.outcome())
        self._plan, self._last, self._moved = _Plan(chunk, t0), -1, True
        self._blend_from, self._blended = (old if self._blend and not resting else None), 0

    def next(self, now: float) -> Proposal | None:
        if self._plan is None:
            return None
        offset = max(self._offset(now), self._last + 1)
        if offset >= len(self._plan.chunk.actions):
            self._retire()
            self._blend_from = None
            return None
        self._last = offset
        action, marks = self._plan.chunk.actions[offset], Mark.NONE
        if self._blend_from is not None:
            action, marks = self._mix(action, now)
        return self._propose(offset, action, self._plan.chunk.observation_stamp + offset * self.period, marks)

    def reset(self) -> None:
        super().reset()
        self._blend_from, self._last, self._moved = None, -1, False

    def _offset(self, now: float) -> int:
        assert self._plan is not None
        return round((now - self._plan.t0) / self.period)

    def _mix(self, action: Float32, now: float) -> tuple[Float32, Mark]:
        """Weight 1/(B+1), 2/(B+1), … for the new chunk over B ticks, against what the old one planned for now."""
        assert self._blend_from is not None
        self._blended += 1
        before = round((now - self._blend_from.t0) / self.period)
        if self._blended > self._blend or before >= len(self._blend_from.chunk.actions):
            self._blend_from = None
            return action, Mark.NONE
        weight = self._blended / (self._blend + 1.0)
        old = self._blend_from.chunk.actions[before]
        mixed = np.where(self._mixed, weight * action + (1.0 - weight) * old, action).astype(np.float32)
        if self._quaternion:
            start = 3  # x, y, z, then the quaternion
            near = old[start : start + 4] * np.sign(old[start : start + 4] @ action[start : start + 4] or 1.0)
            turn = weight * action[start : start + 4] + (1.0 - weight) * near
            mixed[start : start + 4] = turn / np.linalg.norm(turn)
        return mixed, (Mark.BLENDED if not np.array_equal(mixed, action) else Mark.NONE)
