"""Readers-writer lock: a change must never overlap a forward, and neither may starve the other.

Pinned: mutual exclusion, the change carried out by the forward that ends, nesting, time-outs that leave nothing behind.
Determinism: threads are stepped with events and joined; nothing sleeps.
"""

from __future__ import annotations

import threading

import pytest

from ratchet_vla.adapters.swap.rw_lock import RWLock, WriteTimeout


def test_a_change_without_forwards_happens_at_once() -> None:
    done: list[int] = []
    assert RWLock().write(lambda: done.append(1), timeout=0.0).seconds >= 0.0
    assert done == [1]


def test_the_forward_that_ends_carries_the_change_out() -> None:
    lock = RWLock()
    done = []
    with lock.read():
        asker = threading.Thread(target=lock.write, args=(lambda: done.append(threading.get_ident()), 60.0))
        asker.start()
        while not lock._waiting:  # the asker is on its way; it cannot get further than waiting
            pass
        assert done == []
    assert done == [threading.get_ident()]  # by this thread, before it could begin another forward
    asker.join()


def test_a_waiting_change_goes_before_new_forwards() -> None:
    lock = RWLock()
    order = []
    second_may_start = threading.Event()
    first_may_end = threading.Event()

    def first() -> None:
        with lock.read():
            second_may_start.set()
            first_may_end.wait()

    def second() -> None:
        with lock.read():
            order.append("forward")

    forward_thread = threading.Thread(target=first)
    forward_thread.start()
    second_may_start.wait()
    asker = threading.Thread(target=lock.write, args=(lambda: order.append("change"), 60.0))
    asker.start()
    while not lock._waiting:
        pass
    two = threading.Thread(target=second)
    two.start()
    first_may_end.set()
    for thread in (forward_thread, asker, two):
        thread.join()
    assert order == ["change", "forward"]


def test_forwards_overlap_each_other() -> None:
    lock = RWLock()
    both_inside = threading.Barrier(2, timeout=60.0)

    def forward() -> None:
        with lock.read():
            both_inside.wait()  # passes only if the other is inside as well

    threads = [threading.Thread(target=forward) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not both_inside.broken


def test_nesting_in_one_thread_is_one_forward() -> None:
    lock = RWLock()
    done = []
    with lock.read():
        with lock.read():
            asker = threading.Thread(target=lock.write, args=(lambda: done.append(1), 60.0))
            asker.start()
            while not lock._waiting:
                pass
            with lock.read():  # would wait for the change for ever if it counted as a new one
                pass
        assert done == []
    assert done == [1]
    asker.join()


def test_no_gap_in_time_changes_nothing_then_or_later() -> None:
    lock = RWLock()
    done = []
    inside = threading.Event()
    leave = threading.Event()

    def forward() -> None:
        with lock.read():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=forward)
    thread.start()
    inside.wait()
    with pytest.raises(WriteTimeout):
        lock.write(lambda: done.append(1), timeout=0.01)
    leave.set()
    thread.join()
    assert done == []
    lock.write(lambda: done.append(2), timeout=0.0)
    assert done == [2]


def test_a_change_inside_ones_own_forward_is_refused() -> None:
    lock = RWLock()
    with lock.read(), pytest.raises(WriteTimeout):
        lock.write(lambda: None, timeout=0.0)


def test_errors_go_to_whom_they_belong() -> None:
    lock = RWLock()
    with pytest.raises(ZeroDivisionError):
        lock.write(lambda: 1 / 0, timeout=0.0)  # type: ignore[arg-type]
    with pytest.raises(KeyError), lock.read():
        raise KeyError("x")
    lock.write(lambda: None, timeout=0.0)  # both left the gate open
