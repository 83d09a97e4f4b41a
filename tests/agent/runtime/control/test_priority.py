"""A loop that is woken late is a late command; a priority that leaks into the policy process starves the machine.

Pinned: what `real_time` changes (this thread, its siblings one level below, nothing started later) and that `normal`
undoes it; garbage collection is off inside `undisturbed` and as before after it. Without the permission for SCHED_FIFO
the words say so and nothing changes.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

from ratchet_vla.runtime.control.priority import normal, real_time, undisturbed

ASK = "import os; print(os.sched_getscheduler(0))"


def test_the_thread_its_siblings_and_nothing_else() -> None:
    interval = sys.getswitchinterval()
    done = threading.Event()
    sibling = threading.Thread(target=done.wait)
    sibling.start()
    assert sibling.native_id is not None
    try:
        words = real_time(20)
        allowed = words == "SCHED_FIFO 20"
        assert allowed or words.startswith("normal scheduling")
        fifo = os.SCHED_FIFO if allowed else os.SCHED_OTHER
        assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == fifo
        assert os.sched_getparam(0).sched_priority == (20 if allowed else 0)
        assert os.sched_getparam(sibling.native_id).sched_priority == (19 if allowed else 0)
        child = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
        assert int(child.stdout) == os.SCHED_OTHER
    finally:
        normal()
        done.set()
        sibling.join()
        sys.setswitchinterval(interval)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_no_collection_while_undisturbed() -> None:
    assert gc.isenabled()
    with undisturbed():
        assert not gc.isenabled()
        with undisturbed():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
