"""Somebody who waits wants to know for how long; an estimate that never corrects itself is worse than none.

Pinned: a slower machine takes longer in proportion, the time left goes to zero, and what is seen outweighs what was
expected. No clock is read: elapsed seconds are given.
"""

from __future__ import annotations

import pytest

from ratchet_vla.cli import estimate


def test_a_machine_of_half_the_speed_takes_twice_as_long() -> None:
    same = estimate.Speed(estimate.REFERENCE_PRODUCTS, estimate.REFERENCE_STEPS, 2, "float32")
    half = estimate.Speed(estimate.REFERENCE_PRODUCTS / 2, estimate.REFERENCE_STEPS / 2, 2, "float32")
    alone = estimate.Speed(estimate.REFERENCE_PRODUCTS, estimate.REFERENCE_STEPS, 1, "float32")
    assert same.factor == pytest.approx(1.0)
    assert half.factor == pytest.approx(2.0)
    assert alone.factor > same.factor


def test_what_is_seen_outweighs_what_was_expected() -> None:
    left = estimate.Remaining(total=100.0, expected=60.0)
    assert left.seconds(elapsed=0.0) == pytest.approx(60.0)
    left.advance(50.0)
    assert left.seconds(elapsed=30.0) == pytest.approx(30.0)  # as expected
    assert 150.0 < left.seconds(elapsed=200.0) < 200.0  # nearly as slow as it was
    left.advance(500.0)
    assert left.seconds(elapsed=400.0) == 0.0


def test_without_an_expectation_the_pace_alone_counts() -> None:
    left = estimate.Remaining(total=10.0, expected=0.0)
    left.advance(5.0)
    assert left.seconds(elapsed=60.0) == pytest.approx(50.0)


def test_the_measurement_is_one() -> None:
    speed = estimate.measure()
    assert speed.products > 0
    assert speed.steps > 0
    assert speed.dtype in speed.sentence()


@pytest.mark.parametrize(("seconds", "words"), [(12.4, "12 s"), (89.0, "89 s"), (95.0, "2 min"), (600.0, "10 min")])
def test_durations_in_words(seconds: float, words: str) -> None:
    assert estimate.minutes(seconds) == words
