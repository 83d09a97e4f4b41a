"""Time lag between two signals by cross-correlation: commands and motion, a light and its image.

Knows samples with times. Knows neither robot nor camera.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ratchet_vla.errors import RatchetError


@dataclass(frozen=True)
class Lag:
    """Delay between two signals.

    Attributes:
        seconds: how much later the second signal is.
        correlation: at that lag, in [-1, 1]; its sign is the signal's.
    """

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
    """
    first_times = np.asarray(times, float)
    second_times = np.asarray(later_times, float)
    first_values = np.asarray(signal, float)
    second_values = np.asarray(later, float)
    if min(len(first_values), len(second_values)) < 8 or np.ptp(first_values) == 0 or np.ptp(second_values) == 0:
        raise RatchetError("check.no_signal", "one of the signals does not change", fix="repeat with a clear motion")
    # An eighth of the shorter sampling interval; the parabola below places the peak between grid points.
    step_s = min(float(np.median(np.diff(first_times))), float(np.median(np.diff(second_times)))) / 8
    start_s = max(first_times[0], second_times[0] - longest)
    end_s = min(first_times[-1], second_times[-1])
    grid_s = np.arange(start_s, end_s, step_s)
    first_sampled = np.interp(grid_s, first_times, first_values)
    first_sampled = (first_sampled - first_sampled.mean()) / (first_sampled.std() + 1e-12)
    lags = np.arange(0, int(longest / step_s) + 1)
    scores = np.empty(len(lags))
    for index, shift in enumerate(lags):
        second_sampled = np.interp(grid_s + shift * step_s, second_times, second_values)
        second_std = second_sampled.std()
        scores[index] = 0.0
        if second_std > 0:
            covariance = (first_sampled * (second_sampled - second_sampled.mean())).mean()
            scores[index] = float(covariance / (second_std + 1e-12))
    # The absolute value: a sign error of the robot must not hide its latency.
    best_index = int(np.abs(scores).argmax())
    peak_index = float(best_index)
    if 0 < best_index < len(lags) - 1:
        score_before, score_at_peak, score_after = np.abs(scores[best_index - 1 : best_index + 2])
        curvature = score_before - 2 * score_at_peak + score_after
        if curvature != 0:
            peak_index += float(0.5 * (score_before - score_after) / curvature)
    if abs(scores[best_index]) < 0.5:
        raise RatchetError(
            "check.no_lag",
            f"the signals resemble each other by {abs(scores[best_index]):.2f} only",
            fix="repeat with a larger motion and nothing else moving",
        )
    return Lag(max(peak_index, 0.0) * step_s, float(scores[best_index]))
