"""95 % intervals for success rates, their differences, and means of either; closed forms, no random numbers.

Knows successes and trials. Knows no task, no stage and no robot.
What the intervals cover is the luck of the evaluation episodes. They say nothing of how another training seed would do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ratchet_vla.errors import RatchetError

__all__ = ["Interval", "mean", "paired_difference", "unpaired_difference", "wilson"]

Z95 = 1.959963984540054
"""Two-sided 95 % point of the standard normal distribution."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval.

    estimate, low, high: rates in [0, 1], differences in [-1, 1]; low <= estimate <= high.
    method: how the interval was computed, in words.
    """

    estimate: float
    low: float
    high: float
    method: str

    def percent(self) -> str:
        """`81.2 [78.0, 84.1]`, in %."""
        # Adding zero turns -0.0 into 0.0, which would print a minus sign.
        estimate, low, high = (round(100 * bound, 1) + 0.0 for bound in (self.estimate, self.low, self.high))
        return f"{estimate:.1f} [{low:.1f}, {high:.1f}]"

    def __neg__(self) -> Interval:
        return Interval(-self.estimate, -self.high, -self.low, self.method)


def wilson(successes: int, trials: int) -> Interval:
    """Score interval of one rate.

        (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Source: Wilson 1927, JASA 22:209-212.

    Raises:
        RatchetError: metrics.bad_counts unless 0 <= successes <= trials and trials >= 1.
    """
    if not (0 <= successes <= trials and trials >= 1):
        raise RatchetError("metrics.bad_counts", f"{successes} successes in {trials} trials", where="interval")
    n = trials
    p = successes / trials
    z2 = Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # Exact at the ends, where rounding could leave the estimate outside its own interval.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(p, low, high, "Wilson score")


def unpaired_difference(successes_1: int, trials_1: int, successes_2: int, trials_2: int) -> Interval:
    """First rate minus second, from different episodes: Newcombe's hybrid score interval.

        p1 - p2 - sqrt((p1 - l1)^2 + (u2 - p2)^2)    to    p1 - p2 + sqrt((u1 - p1)^2 + (p2 - l2)^2)

    with Wilson bounds l, u of each rate. Source: Newcombe 1998, Statistics in Medicine 17:873-890, method 10.
    On episodes that share initial states it is valid but wider than need be.

    Raises:
        RatchetError: metrics.bad_counts.
    """
    return _difference(wilson(successes_1, trials_1), wilson(successes_2, trials_2), 0.0, "Newcombe, unpaired")


def paired_difference(first: Mapping[str, bool], second: Mapping[str, bool]) -> Interval:
    """First rate minus second where both were measured on the same initial states: Newcombe's paired score interval.

    With counts a (both succeed), b (only the first), c (only the second), d (neither), n = a + b + c + d:

        B = ad - bc;  C = B - n/2 if B > n/2, 0 if 0 <= B <= n/2, B if B < 0
        phi = C / sqrt((a+b)(c+d)(a+c)(b+d)), 0 where that product is 0
        low  = p1 - p2 - sqrt((p1-l1)^2 - 2 phi (p1-l1)(u2-p2) + (u2-p2)^2)
        high = p1 - p2 + sqrt((u1-p1)^2 - 2 phi (u1-p1)(p2-l2) + (p2-l2)^2)

    Source: Newcombe 1998, Statistics in Medicine 17:2635-2650, method 10.

    Args:
        first, second: success per episode key; a key names the initial state and seed, and both have the same keys.

    Raises:
        RatchetError: metrics.not_paired where the keys differ or there are none.
    """
    if not first or first.keys() != second.keys():
        raise RatchetError(
            "metrics.not_paired",
            f"{len(first)} and {len(second)} episodes do not share their keys",
            where="paired difference",
            fix="evaluate both on the same initial states and seeds",
        )
    a = sum(first[episode_key] and second[episode_key] for episode_key in first)
    b = sum(first[episode_key] and not second[episode_key] for episode_key in first)
    c = sum(second[episode_key] and not first[episode_key] for episode_key in first)
    n = len(first)
    d = n - a - b - c
    # phi: correlation of the two outcomes, with the paper's continuity correction where it is positive.
    product = (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    corrected = cross if cross < 0 else max(cross - n / 2, 0.0)
    phi = corrected / math.sqrt(product) if product else 0.0
    return _difference(wilson(a + b, n), wilson(a + c, n), phi, "Newcombe, paired")


def mean(terms: Sequence[Interval]) -> Interval:
    """Mean of independent estimates, such as rates or differences on different tasks (MOVER).

        m - sqrt(sum (e_i - l_i)^2) / T    to    m + sqrt(sum (u_i - e_i)^2) / T

    Source: Zou and Donner 2008, Statistics in Medicine 27:1693-1702; for linear functions of proportions Zou, Huang and
    Zhang 2009, Computational Statistics and Data Analysis 53:1080-1085. For one term it is that term's interval.

    Raises:
        RatchetError: metrics.nothing_to_average.
    """
    if not terms:
        raise RatchetError("metrics.nothing_to_average", "a mean needs at least one term", where="interval")
    count = len(terms)
    centre = math.fsum(term.estimate for term in terms) / count
    distance_below = math.sqrt(math.fsum((term.estimate - term.low) ** 2 for term in terms)) / count
    distance_above = math.sqrt(math.fsum((term.high - term.estimate) ** 2 for term in terms)) / count
    methods = " and ".join(sorted({term.method for term in terms}))
    method = methods if count == 1 else f"MOVER over {methods}"
    return Interval(centre, centre - distance_below, centre + distance_above, method)


def _difference(first: Interval, second: Interval, phi: float, method: str) -> Interval:
    first_below = first.estimate - first.low  # p1 - l1
    first_above = first.high - first.estimate  # u1 - p1
    second_below = second.estimate - second.low  # p2 - l2
    second_above = second.high - second.estimate  # u2 - p2
    estimate = first.estimate - second.estimate
    # The radicand is a positive semidefinite form; rounding may put it a hair below zero.
    squared_below = first_below * first_below - 2 * phi * first_below * second_above + second_above * second_above
    squared_above = first_above * first_above - 2 * phi * first_above * second_below + second_below * second_below
    low = estimate - math.sqrt(max(squared_below, 0.0))
    high = estimate + math.sqrt(max(squared_above, 0.0))
    return Interval(estimate, max(low, -1.0), min(high, 1.0), method)
