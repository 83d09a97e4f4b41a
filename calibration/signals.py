"""How far one signal lags behind another: commands and motion, a light and its picture.

Knows samples with times. Knows neither robot nor camera.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agent.errors import RatchetError


@dataclass(frozen=True)
class Lag:
    """seconds: how much later the second signal is. correlation: at that lag, in [-1, 1]; its sign is the signal's."""

    seconds: float
    correlation: float


def lag(
    times: Sequence[float],
    signal: Sequence[float],
    later_times: Sequence[float],
    later: Sequence[float],
    longest: float = 1.0,
) -> Lag:
    """Cross-correlation of two signals that were sampled at times of their own, peak placed by a parabola.

    Args:
        times, later_times: s on one clock, ascending. longest: s, the largest lag that is looked for.

    Raises:
        RatchetError: check.no_signal where either does not change; check.no_lag where they do not resemble each other.
    """  # fmt: skip
    a_times = np.asarray(times, float)
    b_times = np.asarray(later_times, float)
    a = np.asarray(signal, float)
    b = np.asarray(later, float)
    if min(len(a), len(b)) < 8 or np.ptp(a) == 0 or np.ptp(b) == 0:
        raise RatchetError("check.no_signal", "one of the signals does not change", fix="repeat with a clear motion")
    step = min(float(np.median(np.diff(a_times))), float(np.median(np.diff(b_times)))) / 8
    start = max(a_times[0], b_times[0] - longest)
    end = min(a_times[-1], b_times[-1])
    grid = np.arange(start, end, step)
    first = np.interp(grid, a_times, a)
    first = (first - first.mean()) / (first.std() + 1e-12)
    lags = np.arange(0, int(longest / step) + 1)
    scores = np.empty(len(lags))
    for i, k in enumerate(lags):
        second = np.interp(grid + k * step, b_times, b)
        spread = second.std()
        scores[i] = float((first * (second - second.mean())).mean() / (spread + 1e-12)) if spread > 0 else 0.0
    best = int(np.abs(scores).argmax())
    place = float(best)
    if 0 < best < len(lags) - 1:
        left, middle, right = np.abs(scores[best - 1 : best + 2])
        curve = left - 2 * middle + right
        place += 0.0 if curve == 0 else float(0.5 * (left - right) / curve)
    if abs(scores[best]) < 0.5:
        raise RatchetError(
            "check.no_lag",
            f"the signals resemble each other by {abs(scores[best]):.2f} only",
            fix="repeat with a larger motion and nothing else moving",
        )
    return Lag(max(place, 0.0) * step, float(scores[best]))
