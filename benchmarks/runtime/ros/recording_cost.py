"""policy_node with a stopwatch on what recording costs its control loop: every second goal runs without recording.

Stands in policy_node's place (`--ros-args --params-file …`). What was measured of each goal is a line of JSON on
stdout: seconds per tick inside the recorder's calls, how late commands went out, how long a period's work took.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from typing import Any

from ratchet_msgs.action import RunTask

from ratchet_ros.nodes.base import spin
from ratchet_ros.policy.node import PolicyNode

HANDED_OVER = ("observation", "chunk", "tick", "event", "outcome")  # by the control loop, in its own thread


class Stopwatch:
    """Seconds inside some calls, per control period, and whether the core was taken away meanwhile."""

    def __init__(self) -> None:
        self.inside: list[float] = []
        self.preempted = 0
        self.begin = 0.0  # seconds inside the call that begins an episode, before the first period
        self._sum, self._switched = 0.0, False

    def around(self, call: Callable[..., None], *, last: bool) -> Callable[..., None]:
        """last: this call is the last one of a period."""

        def timed(*arguments: Any) -> None:
            switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
            began = time.perf_counter()
            call(*arguments)
            self._sum += time.perf_counter() - began
            self._switched |= resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw != switches
            if last:
                if self._switched:
                    self.preempted += 1  # tells of the machine's load, not of the recorder
                else:
                    self.inside.append(self._sum)
                self._sum, self._switched = 0.0, False

        return timed

    def first(self, call: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            began = time.perf_counter()
            call(*arguments)
            self.begin = time.perf_counter() - began

        return timed


class TimedPolicyNode(PolicyNode):
    """See the module's words."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._turn = 0

    async def _run_task(self, handle: Any) -> RunTask.Result:
        recording, watch = self.recording, Stopwatch()
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
            result = await super()._run_task(handle)
        finally:
            self.recording = recording
        if result.termination != RunTask.Result.END_REFUSED and self.loop is not None:
            self._turn += 1
            timing = self.loop.timing
            told = {"recorded": records, "inside": watch.inside, "preempted": watch.preempted, "missed": timing.missed}
            told["begin"] = watch.begin
            print(json.dumps({**told, "jitter": list(timing.jitter), "work": list(timing.work)}), flush=True)
        return result


def main() -> int:
    return spin(TimedPolicyNode)


if __name__ == "__main__":
    raise SystemExit(main())
