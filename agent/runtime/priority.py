"""Asking the operating system to wake the control loop on time.

Knows Linux scheduling and Python's interpreter lock. Changes the calling thread and one interpreter-wide setting.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH = 5e-4  # s: how long another thread may keep the interpreter once the loop wants it (Python's default is 5 ms)


def real_time(level: int = 20) -> str:
    """Put the calling thread under SCHED_FIFO (1..99; children do not inherit it) and shorten lock waits.

    Returns what was achieved, in words; without the permission the thread stays where it was.
    """
    sys.setswitchinterval(SWITCH)
    if not hasattr(os, "sched_setscheduler"):
        return "normal scheduling: this system has no SCHED_FIFO"
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(level))
    except PermissionError:
        return "normal scheduling: no permission for SCHED_FIFO (grant rtprio to the user)"
    return f"SCHED_FIFO {level}"


def normal() -> None:
    """Back to the ordinary scheduler."""
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


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
