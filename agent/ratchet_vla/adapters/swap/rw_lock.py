"""Readers-writer lock for the running adapter: forwards share it, a change waits until none is running.

Knows threads and waiting. Knows nothing of adapters or models. A change that arrives during a forward is carried out by
the thread that ends it, at that very moment: nobody is woken up first, and a busy loop of forwards cannot starve it.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple


class WriteTimeout(Exception):
    """A change could not happen: a forward is running and does not end."""


class Interruption(NamedTuple):
    """How long a change held forwards off, in seconds, and whether another process took the core meanwhile."""

    seconds: float
    preempted: bool


@dataclass(eq=False)
class _Write:
    action: Callable[[], None]
    done: bool = False
    error: BaseException | None = None
    interruption: Interruption = field(default_factory=lambda: Interruption(0.0, False))


class RWLock:
    """Readers are forwards, many at once; a writer is one change, alone. A waiting change goes before new forwards."""

    def __init__(self) -> None:
        # Guards _readers and _waiting, and is held while a change runs: that is what keeps new forwards out.
        self._condition = threading.Condition()
        self._readers = 0
        self._waiting: list[_Write] = []
        # Depth of nested reads per thread: only the outermost one takes part in the count.
        self._inside = threading.local()

    @contextmanager
    def read(self) -> Iterator[None]:
        """Hold changes off while the block runs. May be nested within one thread."""
        outer_depth = getattr(self._inside, "depth", 0)
        if outer_depth == 0:
            with self._condition:
                # A waiting change goes first, otherwise a steady stream of forwards would starve it.
                while self._waiting and self._readers:
                    self._condition.wait()
                self._run_waiting()
                self._readers += 1
        self._inside.depth = outer_depth + 1
        try:
            yield
        finally:
            self._inside.depth = outer_depth
            if outer_depth == 0:
                with self._condition:
                    self._readers -= 1
                    # The last forward to end runs what waits, in this thread: no wake-up lies between the forward
                    # and the flip.
                    if self._readers == 0:
                        self._run_waiting()
                        self._condition.notify_all()

    def write(self, action: Callable[[], None], timeout: float) -> Interruption:
        """Run `action` while no forward runs.

        Raises:
            WriteTimeout: forwards ran for all of `timeout` seconds, or the call came from inside this thread's
                own forward; `action` was not run and will not be.
        """
        if getattr(self._inside, "depth", 0):
            raise WriteTimeout("a change cannot happen inside this thread's own forward")
        pending = _Write(action)
        with self._condition:
            self._waiting.append(pending)
            if self._readers == 0:
                self._run_waiting()
            elif not self._condition.wait_for(lambda: pending.done, timeout):
                self._waiting.remove(pending)
                self._condition.notify_all()
                raise WriteTimeout(f"a forward has been running for {timeout} s")
        if pending.error is not None:
            raise pending.error
        return pending.interruption

    def _run_waiting(self) -> None:
        """With the condition held and no forward running."""
        while self._waiting:
            pending = self._waiting.pop(0)
            preemptions_before = _preemptions()
            started_s = time.perf_counter()
            try:
                pending.action()
            except BaseException as error:  # noqa: BLE001 - handed to the thread that asked for the change
                pending.error = error
            pending.interruption = Interruption(time.perf_counter() - started_s, _preemptions() > preemptions_before)
            pending.done = True


def _preemptions() -> int:
    """Involuntary context switches of this thread; waiting for a lock, the interpreter's included, is not one."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
