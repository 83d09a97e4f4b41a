"""A policy that cannot come up must not be started for ever, and one that died once must not use up a robot's week.

Pinned: the first start at once, the next ones after growing pauses, an end to a row of deaths, and that a process that
served for a while begins a new row. Deterministic: moments are arguments.
"""

from __future__ import annotations

from ratchet_vla.runtime.inference.restarts import STEADY_AFTER_S, Restarts


def test_a_row_of_deaths_has_growing_pauses_and_an_end() -> None:
    restarts = Restarts(7)
    assert [restarts.pause(0.0) for _ in range(8)] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, None]
    assert restarts.total == 7
    assert Restarts(0).pause(0.0) is None


def test_one_that_served_for_a_while_begins_a_new_row() -> None:
    restarts = Restarts(2)
    restarts.serving(0.0)
    for day in range(5):
        assert restarts.pause(100.0 * day + STEADY_AFTER_S) == 0.0
        assert restarts.pause(100.0 * day + STEADY_AFTER_S) == 0.5
        restarts.serving(100.0 * (day + 1))
    assert restarts.total == 10
    assert restarts.pause(500.0 + 0.9 * STEADY_AFTER_S) is None, "it did not serve for long enough"
