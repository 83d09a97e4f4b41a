"""Two threads on busy cores are forty times slower than one, and nothing says so; here somebody does.

Pinned: one thread is never measured; a warning where more are slower, silence where they are not; the number asked for
stays in force either way, since numbers that a policy gives may depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ratchet_vla.policy import threads


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def clocked(monkeypatch: pytest.MonkeyPatch, rates: dict[int, float]) -> list[int]:
    """Stands in for the clock; the list tells what was measured."""
    measured: list[int] = []

    def rate(count: int) -> float:
        torch.set_num_threads(count)
        measured.append(count)
        return rates[count]

    monkeypatch.setattr(threads, "products_per_second", rate)
    return measured


@pytest.mark.parametrize("asked", [1, 0, -3])
def test_one_thread_is_not_measured(monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    measured = clocked(monkeypatch, {})
    assert threads.use(asked) == ""
    assert torch.get_num_threads() == 1
    assert measured == []


@pytest.mark.parametrize(("two", "warned"), [(1500.0, False), (1000.0, False), (25.0, True)])
def test_more_that_are_slower_are_told_and_stay(monkeypatch: pytest.MonkeyPatch, two: float, warned: bool) -> None:
    clocked(monkeypatch, {1: 1000.0, 2: two})
    told = threads.use(2)
    assert bool(told) == warned
    assert ("0.03 times as fast as one" in told) == warned
    assert torch.get_num_threads() == 2


def test_the_clock_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MEASURED_FOR", 0.01)
    assert threads.products_per_second(1) > 1
