"""Asking the operating system to wake the control loop on time, and keeping Python out of its way.

Knows Linux scheduling, Python's interpreter lock and its garbage collector. Changes this process's threads only.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SWITCH = 5e-4  # s: how long another thread may keep the interpreter once the loop wants it (Python's default is 5 ms)


def real_time(level: int = 20) -> str:
    """Put the calling thread under SCHED_FIFO, the process's other threads one level below; shorten lock waits.

    The others too, because a thread that holds the interpreter lock and gets no core on a busy machine would hold the
    loop. Call it when they have been started; threads and processes started later are ordinary again.

    level: 2..99. Returns what was achieved, in words; without the permission everything stays where it was.
    """
    sys.setswitchinterval(SWITCH)
    if not hasattr(os, "sched_setscheduler"):
        return "normal scheduling: this system has no SCHED_FIFO"
    try:
        _schedule(os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, level, level - 1)
    except PermissionError:
        return "normal scheduling: no permission for SCHED_FIFO (grant rtprio to the user)"
    return f"SCHED_FIFO {level}"


def normal() -> None:
    """Back to the ordinary scheduler, all threads."""
    if hasattr(os, "sched_setscheduler"):
        _schedule(os.SCHED_OTHER, 0, 0)


def offer_interpreter() -> None:
    """Let go of the interpreter once: a thread that waits for it gets it, or begins to wait anew.

    Python takes the interpreter from a thread that held it for SWITCH while another waited, wherever it is then. A loop
    that offers it at a moment of its own choosing is not interrupted for as long afterwards. Costs microseconds where
    nobody waits.
    """
    time.sleep(0.0)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection while the block runs: in mid-motion one is a late command. References still free memory."""
    running = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _schedule(policy: int, mine: int, others: int) -> None:
    me = threading.get_native_id()
    os.sched_setscheduler(me, policy, os.sched_param(mine))
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != me:
            with suppress(ProcessLookupError):  # a thread that has just ended
                os.sched_setscheduler(int(task.name), policy, os.sched_param(others))
