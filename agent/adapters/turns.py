"""Who may touch the running adapter when: forwards share it, a change waits for none to be running.

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


class NoGap(Exception):
    """A change could not happen: a forward is running and does not end."""


class Held(NamedTuple):
    """How long a change held forwards off, in seconds, and whether another process took the core meanwhile."""

    seconds: float
    preempted: bool


@dataclass(eq=False)
class _Change:
    action: Callable[[], None]
    done: bool = False
    error: BaseException | None = None
    held: Held = field(default_factory=lambda: Held(0.0, False))


class Turns:
    """Many forwards at once, or one change alone; a waiting change goes before new forwards."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._forwards = 0
        self._waiting: list[_Change] = []
        self._inside = threading.local()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Hold changes off while the block runs. May be nested within one thread."""
        depth = getattr(self._inside, "depth", 0)
        if depth == 0:
            with self._condition:
                while self._waiting and self._forwards:
                    self._condition.wait()
                self._run_waiting()
                self._forwards += 1
        self._inside.depth = depth + 1
        try:
            yield
        finally:
            self._inside.depth = depth
            if depth == 0:
                with self._condition:
                    self._forwards -= 1
                    if self._forwards == 0:
                        self._run_waiting()
                        self._condition.notify_all()

    def change(self, action: Callable[[], None], timeout: float) -> Held:
        """Run `action` while no forward runs.

        Raises:
            NoGap: none within `timeout` seconds, or asked from inside this thread's own forward; `action` was not run
                and will not be.
        """
        if getattr(self._inside, "depth", 0):
            raise NoGap("a change cannot happen inside this thread's own forward")
        change = _Change(action)
        with self._condition:
            self._waiting.append(change)
            if self._forwards == 0:
                self._run_waiting()
            elif not self._condition.wait_for(lambda: change.done, timeout):
                self._waiting.remove(change)
                self._condition.notify_all()
                raise NoGap(f"a forward has been running for {timeout} s")
        if change.error is not None:
            raise change.error
        return change.held

    def _run_waiting(self) -> None:
        """With the condition held and no forward running."""
        while self._waiting:
            change = self._waiting.pop(0)
            switches, start = _preemptions(), time.perf_counter()
            try:
                change.action()
            except BaseException as error:  # handed to the thread that asked for the change, not to the forward's
                change.error = error
            change.held = Held(time.perf_counter() - start, _preemptions() > switches)
            change.done = True


def _preemptions() -> int:
    """Involuntary context switches of this thread; waiting for a lock, the interpreter's included, is not one."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
