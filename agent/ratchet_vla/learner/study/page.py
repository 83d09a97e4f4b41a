"""A study as one self-contained page: a table with intervals, success matrices as heat maps, and curves.

Knows trials and how to draw them. Knows nothing of how they were run.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ratchet_vla.learner.study.claims import claims
from ratchet_vla.learner.study.results import MEANING, MEASURES, Trial, cells_of, forgetting, summarise
from ratchet_vla.storage.documents import write_text

TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;margin:2rem auto;max-width:1080px;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{border-bottom:1px solid #d5dce2;padding:.3rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}
.numbers td,.numbers th{white-space:nowrap;padding:.3rem .5rem}
img{max-width:100%}small{color:#66727f}figure{margin:1rem 0}
</style><h1>{{ title }}</h1>
<p>Points with 95 % intervals. With several seeds the interval is Student's t over seeds, with one it covers the
evaluation episodes alone.</p>
<table class="numbers"><tr><th>method</th><th>seeds</th>
{% for m in measures %}<th title="{{ meaning[m] }}">{{ m }}</th>{% endfor %}
<th>hours</th><th>episodes</th></tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<ul>{% for m in measures %}<li><b>{{ m }}</b>: {{ meaning[m] }}</li>{% endfor %}</ul>
<h2>Success after each stage</h2><p>Rows are stages, columns tasks in the order of learning, then held-out ones; mean
over seeds, in %. Framed: the task that was learned in this stage.</p>
{% for name, image in heat %}<figure><figcaption>{{ name }}</figcaption><img alt="success matrix of {{ name }}"
src="{{ image }}"></figure>{% endfor %}
<h2>What learned tasks lose</h2><p>Change of a task's success since it was learned, mean over tasks and seeds.</p>
<img alt="forgetting curves" src="{{ curves }}">
{% if learning %}<h2>Success while learning</h2><p>Share of training episodes that succeeded, by update; mean over
seeds. Lines between tasks. Methods that run no episodes are left out.</p>
<img alt="learning curves" src="{{ learning }}">
{% endif %}<h2>What this says about the claims</h2><p>Each is a loss in points that should be at most its bound. The
verdict is the interval's: yes where all of it is within the bound, no where none of it is.</p>
<table><tr><th>method</th><th style="text-align:left">claim</th><th>loss</th><th>bound</th><th>verdict</th></tr>
{% for row in claims %}<tr><td>{{ row[0] }}</td><td style="text-align:left">{{ row[1] }}</td>{% for cell in row[2:] %}
<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<h2>What was run</h2><table>{% for key, value in facts %}<tr><td>{{ key }}</td>
<td style="text-align:left">{{ value }}</td></tr>{% endfor %}</table></html>
"""


def write_study(trials: Sequence[Trial], facts: Mapping[str, Any], output: Path) -> Path:
    """Write the page; returns its path."""
    table_rows = []
    for summary in summarise(trials):
        cells = cells_of(summary, missing="not measured")
        hours = f"{summary.hours:.2f}"
        table_rows.append([summary.method, len(summary.seeds), *cells, hours, summary.episodes])
    heat_maps = []
    for method in dict.fromkeys(trial.method for trial in trials):
        heat_maps.append((method, _uri(heat_map([trial for trial in trials if trial.method == method]))))
    claim_rows = []
    for claim in claims(trials):
        loss = claim.value.percent() if claim.value else "-"
        claim_rows.append((claim.method, claim.text, loss, f"{100 * claim.bound:.0f}", claim.verdict))
    learning_png = learning_curves(trials)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE).render(
        title=str(facts.get("title", "Study")),
        measures=MEASURES,
        meaning=MEANING,
        rows=table_rows,
        heat=heat_maps,
        curves=_uri(forgetting_curves(trials)),
        learning=_uri(learning_png) if learning_png else "",
        claims=claim_rows,
        facts=[(key, _plain(value)) for key, value in facts.items() if key != "methods"],
    )
    write_text(output, page, durable=False)
    return output


def heat_map(trials: Sequence[Trial]) -> bytes:
    """PNG of the mean success matrix over seeds of one method; stages and cells that no seed measured are blank."""
    matrix = trials[0].matrix  # all trials of a study have its tasks and stages
    columns = matrix.columns
    percent_by_stage: dict[int, list[float]] = {}
    for stage in matrix.stages:
        percents = [_mean_percent(trials, stage, task) for task in columns]
        if not np.isnan(percents).all():
            percent_by_stage[stage] = percents
    grid = np.array(list(percent_by_stage.values()))  # (stages measured, tasks), %
    figure, axes = _axes(1.6 + 0.95 * len(columns), 1.3 + 0.42 * len(percent_by_stage))
    axes.imshow(grid, vmin=0, vmax=100, cmap="YlGnBu", aspect="auto")
    for row, column in np.ndindex(grid.shape):
        percent = grid[row, column]
        if np.isfinite(percent):
            ink = "w" if percent > 60 else "k"  # the colour map is dark above
            axes.text(column, row, f"{percent:.0f}", ha="center", va="center", color=ink)
    for row, stage in enumerate(percent_by_stage):
        if stage and trials[0].sequential:
            column = columns.index(matrix.tasks[stage - 1])
            corner = (column - 0.47, row - 0.44)
            axes.add_patch(Rectangle(corner, 0.94, 0.88, fill=False, edgecolor="#d64545", linewidth=1.8))
    axes.set_xticks(range(len(columns)), [task[:22] for task in columns], rotation=25, ha="right", fontsize=7)
    labels = ["base" if stage == 0 else f"stage {stage}" for stage in percent_by_stage]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    figure.tight_layout()
    return _png(figure)


def _mean_percent(trials: Sequence[Trial], stage: int, task: str) -> float:
    """Mean success over the trials that measured the cell, in %; NaN where none did."""
    cells = [trial.matrix.get(stage, task) for trial in trials]
    rates = [cell.rate.estimate for cell in cells if cell is not None]
    return 100 * float(np.mean(rates)) if rates else math.nan


def losses(trials: Sequence[Trial]) -> list[tuple[int, float]]:
    """(tasks learned since, change of success since the task was learned in points), mean over tasks and trials.

    A change and not the success itself: fewer tasks are old than young, so a mean of their success would move though
    nothing is forgotten.
    """
    changes_by_age: dict[int, list[float]] = {}
    for trial in trials:
        for task in trial.matrix.tasks:
            points = forgetting(trial.matrix, task)
            if points and points[0][0] == 0:
                for age, rate in points:
                    changes_by_age.setdefault(age, []).append(100 * (rate - points[0][1]))
    return [(age, float(np.mean(changes_by_age[age]))) for age in sorted(changes_by_age)]


def forgetting_curves(trials: Sequence[Trial]) -> bytes:
    """PNG of `losses` per method."""
    figure, axes = _axes(9.0, 3.4)
    sequential_trials = [trial for trial in trials if trial.sequential]
    for method in dict.fromkeys(trial.method for trial in sequential_trials):
        curve = losses([trial for trial in sequential_trials if trial.method == method])
        ages = [age for age, _ in curve]
        changes = [change for _, change in curve]
        axes.plot(ages, changes, marker="o", label=method)
    axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    axes.set_xlabel("tasks learned since")
    axes.set_ylabel("change of success, points")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if sequential_trials:
        axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    return _png(figure)


def learning_curves(trials: Sequence[Trial]) -> bytes:
    """PNG: success of the training episodes by update, one curve per method; empty where no trial ran episodes.

    Stages stand beside each other. A point is the mean over those seeds that made the update.
    """
    # method -> (stage, number of the update in it) -> success of each seed in %
    curves: dict[str, dict[tuple[int, int], list[float]]] = {}
    longest: dict[int, int] = {}  # stage -> updates of the trial that made most
    for trial in trials:
        made_by_stage: Counter[int] = Counter()
        for update in trial.updates:
            if not update["episodes"]:
                continue
            stage = int(update["stage"])
            made_by_stage[stage] += 1
            longest[stage] = max(longest.get(stage, 0), made_by_stage[stage])
            rates = curves.setdefault(trial.method, {}).setdefault((stage, made_by_stage[stage]), [])
            rates.append(100 * update["successes"] / update["episodes"])
    if not curves:
        return b""
    start_of_stage: dict[int, int] = {}
    updates_before = 0
    for stage in sorted(longest):
        start_of_stage[stage] = updates_before
        updates_before += longest[stage]
    figure, axes = _axes(9.0, 3.4)
    for method, rates_by_update in curves.items():
        in_order = sorted(rates_by_update)
        positions = [start_of_stage[stage] + number for stage, number in in_order]
        means = [float(np.mean(rates_by_update[key])) for key in in_order]
        axes.plot(positions, means, label=method, linewidth=1.3)
    for border in start_of_stage.values():
        if border:
            axes.axvline(border + 0.5, color="#9aa5b1", linewidth=0.8)
    axes.set_xlabel("updates")
    axes.set_ylabel("success in %")
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    return _png(figure)


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of one plot, size in inches. No pyplot: it keeps global state and looks for a display."""
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _plain(value: Any) -> str:
    """A fact as a person would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()
