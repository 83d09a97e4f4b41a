"""Every claim and every promotion rests on these intervals; one that is too narrow calls luck progress.

Pinned: published worked examples (Newcombe 1998, both papers; Fagerland et al. 2017, chapters 4 and 8), behaviour at 0
and 100 %, symmetry, and coverage near 95 % by simulation. Determinism: fixed seeds.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.intervals import Interval, mean, paired_difference, unpaired_difference, wilson


def table(a: int, b: int, c: int, d: int) -> tuple[dict[str, bool], dict[str, bool]]:
    """Paired outcomes with a both, b first only, c second only, d neither."""
    outcomes = [(True, True)] * a + [(True, False)] * b + [(False, True)] * c + [(False, False)] * d
    return {str(i): x for i, (x, _) in enumerate(outcomes)}, {str(i): y for i, (_, y) in enumerate(outcomes)}


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]
)
def test_wilson_published_examples(successes: int, trials: int, low: float, high: float) -> None:
    interval = wilson(successes, trials)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("counts", "low", "high"), [((56, 70, 48, 80), 0.0524, 0.3339), ((7, 34, 1, 34), 0.0189, 0.3404)]
)
def test_unpaired_published_examples(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    interval = unpaired_difference(*counts)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [((59, 6, 16, 80), -0.1186, -0.0046), ((36, 12, 2, 0), 0.0569, 0.3404), ((1, 1, 7, 12), -0.5069, -0.0256)],
)
def test_paired_published_examples(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    interval = paired_difference(*table(*counts))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


counts = st.integers(0, 30)


@given(counts, counts, counts, counts)
def test_paired_intervals_are_ordered_bounded_and_symmetric(a: int, b: int, c: int, d: int) -> None:
    if a + b + c + d == 0:
        return
    first, second = table(a, b, c, d)
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert -1 <= one.low <= one.estimate <= one.high <= 1
    assert one.estimate == pytest.approx((b - c) / (a + b + c + d))
    negated = -other
    assert (one.estimate, one.low, one.high) == pytest.approx((negated.estimate, negated.low, negated.high), abs=1e-9)


@given(st.integers(0, 40), st.integers(1, 40))
def test_wilson_stays_inside_and_never_collapses(successes: int, trials: int) -> None:
    interval = wilson(min(successes, trials), trials)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.high - interval.low > 0.01


def test_agreement_in_pairs_narrows_the_interval() -> None:
    agreeing, disagreeing = table(20, 2, 2, 16), table(12, 10, 10, 8)
    widths = [i.high - i.low for i in (paired_difference(*agreeing), paired_difference(*disagreeing))]
    unpaired = unpaired_difference(22, 40, 22, 40)
    assert widths[0] < 0.75 * (unpaired.high - unpaired.low)
    assert widths[1] > 0.95 * (unpaired.high - unpaired.low)


def test_mean_by_hand() -> None:
    # Centre 0.6; below sqrt(0.3^2 + 0.4^2) / 2 = 0.25; above sqrt(0.06^2 + 0.08^2) / 2 = 0.05.
    combined = mean([Interval(0.5, 0.2, 0.56, "a"), Interval(0.7, 0.3, 0.78, "a")])
    assert (combined.estimate, combined.low, combined.high) == pytest.approx((0.6, 0.35, 0.65))
    single = wilson(3, 7)
    assert mean([single]) == single


def test_percent_has_no_negative_zero() -> None:
    assert Interval(-1e-9, -0.0202, 0.021, "").percent() == "0.0 [-2.0, 2.1]"


def test_refusals_name_their_reason() -> None:
    for code, call in (
        ("metrics.bad_counts", lambda: wilson(3, 2)),
        ("metrics.bad_counts", lambda: wilson(0, 0)),
        ("metrics.not_paired", lambda: paired_difference({"a": True}, {"b": True})),
        ("metrics.not_paired", lambda: paired_difference({}, {})),
        ("metrics.nothing_to_average", lambda: mean([])),
    ):
        with pytest.raises(RatchetError) as caught:
            call()
        assert caught.value.code == code


@pytest.mark.parametrize(("p", "n"), [(0.15, 40), (0.5, 40), (0.9, 40), (0.98, 40)])
def test_wilson_coverage(p: float, n: int) -> None:
    rng = np.random.default_rng(1)
    intervals = [wilson(int(k), n) for k in rng.binomial(n, p, 2000)]
    assert 0.915 <= np.mean([i.low <= p <= i.high for i in intervals]) <= 0.995


@pytest.mark.parametrize(
    ("both", "first", "second", "neither"), [(0.5, 0.1, 0.1, 0.3), (0.8, 0.12, 0.03, 0.05), (0.2, 0.25, 0.2, 0.35)]
)
def test_paired_coverage(both: float, first: float, second: float, neither: float) -> None:
    rng = np.random.default_rng(2)
    draws = rng.multinomial(40, [both, first, second, neither], 1500)
    intervals = [paired_difference(*table(*map(int, draw))) for draw in draws]
    assert 0.92 <= np.mean([i.low <= first - second <= i.high for i in intervals]) <= 0.995


def test_mean_of_rates_coverage_also_near_one() -> None:
    rng = np.random.default_rng(3)
    truth = [0.98, 0.9, 0.7, 0.4]
    draws = rng.binomial(40, truth, (2000, 4))
    intervals = [mean([wilson(int(k), 40) for k in row]) for row in draws]
    assert 0.92 <= np.mean([i.low <= np.mean(truth) <= i.high for i in intervals]) <= 0.99
