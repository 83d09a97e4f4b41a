"""Learning curves as PNG bytes.

Knows update records and how to draw them. Knows no run folder and no page.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ratchet_vla.learner.measures.intervals import wilson

INK = "#1f2933"
LINE = "#0b6e8f"
BAND = ("#ffffff", "#eef2f5")
DIAGNOSTICS = (
    ("loss", "loss"),
    ("approx_kl", "KL (nats/token)"),
    ("entropy", "entropy (nats/token)"),
    ("clip_fraction", "clip fraction"),
)

Update = Mapping[str, Any]


def number(update: Update, key: str) -> float:
    """The value as a float, NaN (a gap in the curve) where the record does not have it."""
    value = update.get(key)
    # bool is an int for Python, and no figure for a curve.
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def segments(updates: Sequence[Update]) -> list[tuple[str, int, int]]:
    """Consecutive updates on one task: (task, first, last + 1), positions in `updates`."""
    stretches: list[tuple[str, int, int]] = []
    for position, update in enumerate(updates):
        task = str(update.get("task", "?"))
        if stretches and stretches[-1][0] == task:
            stretches[-1] = (task, stretches[-1][1], position + 1)
        else:
            stretches.append((task, position, position + 1))
    return stretches


def success_curve(updates: Sequence[Update]) -> bytes:
    """PNG: training success rate of each update with its 95 % Wilson interval; one shade per task, tasks numbered."""
    figure = _figure(9.0, 3.2)
    axes = figure.subplots()
    for _, first, last in _shade(axes, updates, numbered=True):
        positions = []
        rates = []
        below = []
        above = []
        for position in range(first, last):
            episodes = number(updates[position], "episodes")
            successes = number(updates[position], "successes")
            # False for NaN too: a record without counts leaves a gap.
            if not (episodes >= 1 and 0 <= successes <= episodes):
                continue
            rate = wilson(int(successes), int(episodes))
            positions.append(position + 1)
            rates.append(100 * rate.estimate)
            below.append(100 * (rate.estimate - rate.low))
            above.append(100 * (rate.high - rate.estimate))
        axes.errorbar(positions, rates, yerr=[below, above], color=LINE, marker="o", markersize=4, capsize=3, lw=1.4)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("success while training (%)")
    _finish(axes)
    return _png(figure)


def diagnostic_curves(updates: Sequence[Update]) -> bytes:
    """PNG: loss, KL, entropy and clip fraction per update, one panel each."""
    figure = _figure(9.0, 4.6)
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, DIAGNOSTICS, strict=True):
        for _, first, last in _shade(axes, updates, numbered=False):
            values = [number(updates[position], key) for position in range(first, last)]
            axes.plot(range(first + 1, last + 1), values, color=LINE, marker="o", markersize=3, lw=1.4)
        axes.set_ylabel(label)
        if key in ("approx_kl", "clip_fraction"):
            axes.set_ylim(bottom=0)
        _finish(axes)
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    # The object interface, not pyplot: no global state, and no display is looked for.
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _shade(axes: Any, updates: Sequence[Update], *, numbered: bool) -> list[tuple[str, int, int]]:
    stretches = segments(updates)
    task_order = list(dict.fromkeys(task for task, _, _ in stretches))
    for stretch_number, (task, first, last) in enumerate(stretches):
        axes.axvspan(first + 0.5, last + 0.5, color=BAND[stretch_number % 2], zorder=0, lw=0)
        if numbered:
            middle = (first + last + 1) / 2
            label = f"task {task_order.index(task) + 1}"
            coordinates = ("data", "axes fraction")
            axes.annotate(label, (middle, 1.02), xycoords=coordinates, ha="center", fontsize=9, color=INK)
    axes.set_xlim(0.5, len(updates) + 0.5)
    return stretches


def _finish(axes: Any) -> None:
    axes.set_xlabel("update")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#d5dce2", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # No software version or date inside, so that equal runs give equal files.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
