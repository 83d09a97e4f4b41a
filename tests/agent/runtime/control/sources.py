"""FakeSource: a chunk source in this process, with a delay in ticks, for tests of executors and loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ratchet_vla.records import ActionChunk, Observation
from ratchet_vla.runtime.clock import Clock
from ratchet_vla.runtime.inference.source import Ahead, PolicyFault, Reply


class FakeSource:
    """Answers after `delay` seconds of the clock it is given; `answer` makes the actions (K, D) for an observation."""

    def __init__(
        self, clock: Clock, answer: Callable[[Observation], np.ndarray], delay: float = 0.0, adapter_id: str = "fake"
    ) -> None:
        self.clock, self.answer, self.delay, self.adapter_id = clock, answer, delay, adapter_id
        self.seen: list[Observation] = []
        self.aheads: list[Ahead | None] = []
        self.silent = False
        self.faults: list[PolicyFault] = []
        self.extra: list[ActionChunk] = []
        self._out: tuple[float, ActionChunk] | None = None
        self._wanted = True

    @property
    def ready(self) -> bool:
        return self._out is None

    def request(self, observation: Observation, ahead: Ahead | None = None) -> None:
        self.seen.append(observation)
        self.aheads.append(ahead)
        actions = np.asarray(self.answer(observation), np.float32)
        chunk = ActionChunk(actions, None, None, self.adapter_id, 0.0, observation.stamp, observation.sequence)
        self._out, self._wanted = (self.clock.now() + self.delay, chunk), True

    def poll(self) -> list[Reply]:
        replies: list[Reply] = [*self.faults, *self.extra]
        self.faults, self.extra = [], []
        if self._out is not None and not self.silent and self.clock.now() >= self._out[0] - 1e-9:
            if self._wanted:
                replies.append(self._out[1])
            self._out = None
        return replies

    def wait(self, timeout: float) -> list[Reply]:
        return self.poll()

    def forget(self) -> None:
        self._wanted = False
