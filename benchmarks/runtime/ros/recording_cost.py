"""policy_node with a stopwatch on what recording costs its control loop: every second goal runs without recording.

Stands in policy_node's place (`--ros-args --params-file …`). What was measured of each goal is a line of JSON on
stdout. Of every control period: seconds inside the recorder's calls, and, with and without recording alike, seconds of
real time from the moment its wait for the deadline ended until the command was out and until its work was done.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from typing import Any

from ratchet_msgs import msg
from ratchet_msgs.action import RunTask

from ratchet_ros.nodes.base import spin
from ratchet_ros.policy.node import PolicyNode
from ratchet_ros.policy.servers.task_server import TaskServer
from ratchet_vla.records import ControlTick, UInt8
from ratchet_vla.runtime.control.loop import ControlLoop

HANDED_OVER = ("observation", "chunk", "tick", "event", "outcome")  # by the control loop, in its own thread


class Stopwatch:
    """Seconds inside some calls, per control period.

    preempted: for which periods the operating system gave the core to somebody else in the middle of such a call.
    waited: how many periods slept in one, for a lock or for the interpreter.
    """

    def __init__(self) -> None:
        self.inside: list[float] = []
        self.preempted: list[bool] = []
        self.waited = 0
        self.begin = 0.0  # seconds inside the call that begins an episode, before the first period
        self._sum, self._preempted, self._waited = 0.0, False, False

    def around(self, call: Callable[..., None], *, last: bool) -> Callable[..., None]:
        """last: this call is the last one of a period."""

        def timed(*arguments: Any) -> None:
            before = resource.getrusage(resource.RUSAGE_THREAD)
            began = time.perf_counter()
            call(*arguments)
            self._sum += time.perf_counter() - began
            after = resource.getrusage(resource.RUSAGE_THREAD)
            self._preempted |= after.ru_nivcsw != before.ru_nivcsw
            self._waited |= after.ru_nvcsw != before.ru_nvcsw
            if last:
                self.inside.append(self._sum)
                self.preempted.append(self._preempted)
                self.waited += self._waited
                self._sum, self._preempted, self._waited = 0.0, False, False

        return timed

    def first(self, call: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            began = time.perf_counter()
            call(*arguments)
            self.begin = time.perf_counter() - began

        return timed


class TimedLoop(ControlLoop):
    """A control loop that notes, per period and in seconds of real time, when its command was out and when it was done;
    both counted from the end of the wait for its deadline."""

    commanded: list[float]
    done: list[float]
    _woken = 0.0

    @classmethod
    def of(cls, loop: ControlLoop) -> TimedLoop:
        """The same loop, from now on timed."""
        loop.__class__ = cls
        assert isinstance(loop, TimedLoop)
        loop.commanded, loop.done = [], []
        loop.clock = Woken(loop.clock, loop._wake)
        return loop

    def _wake(self) -> None:
        self._woken = time.perf_counter()

    def _send(self, verdict: Any) -> bool:
        sent = super()._send(verdict)
        self.commanded.append(time.perf_counter() - self._woken)
        return sent

    def tick(self) -> ControlTick:
        tick = super().tick()
        self.done.append(time.perf_counter() - self._woken)
        return tick


class Woken:
    """A clock that tells when a wait has ended."""

    def __init__(self, clock: Any, told: Callable[[], None]) -> None:
        self._clock, self._told = clock, told
        self.now = clock.now

    def sleep_until(self, moment: float) -> bool:
        reached: bool = self._clock.sleep_until(moment)
        self._told()
        return reached


class TimedTaskServer(TaskServer):
    """See the module's words. Without its recording it hands nothing over."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._turn = 0

    def prepare(self, goal: Any) -> None:
        """The goal's loop, timed."""
        super().prepare(goal)
        assert self.loop is not None
        self.loop = TimedLoop.of(self.loop)

    async def run_task(self, handle: Any) -> RunTask.Result:
        """One goal; what was measured of it goes to stdout."""
        recording = self.recording
        watch = Stopwatch()
        assert recording is not None
        records = self._turn % 2 == 0
        if records:
            for name in HANDED_OVER:
                call = getattr(type(recording), name).__get__(recording)
                setattr(recording, name, watch.around(call, last=name == "tick"))
            recording.begin = watch.first(type(recording).begin.__get__(recording))  # type: ignore[method-assign]
        else:
            self.recording = None
        try:
            result = await super().run_task(handle)
        finally:
            self.recording = recording
        if result.termination != RunTask.Result.END_REFUSED and isinstance(self.loop, TimedLoop):
            self._turn += 1
            told = {"recorded": records, "inside": watch.inside, "preempted": watch.preempted, "waited": watch.waited}
            told |= {"begin": watch.begin, "missed": self.loop.timing.missed}
            print(json.dumps({**told, "commanded": self.loop.commanded, "done": self.loop.done}), flush=True)
        return result


class TimedPolicyNode(PolicyNode):
    """policy_node with the stopwatch in it."""

    TaskServer = TimedTaskServer

    def _on_frame(self, camera: str, image: UInt8, stamp: float) -> None:
        """A task without recording costs no frames either."""
        if self.tasks is None or self.tasks.recording is not None:
            super()._on_frame(camera, image, stamp)

    def _on_applied(self, message: msg.Applied) -> None:
        if self.tasks is None or self.tasks.recording is not None:
            super()._on_applied(message)


def main() -> int:
    return spin(TimedPolicyNode)


if __name__ == "__main__":
    raise SystemExit(main())
