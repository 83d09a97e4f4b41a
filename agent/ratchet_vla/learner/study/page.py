"""A study as one self-contained page: table with intervals, success matrices as heat maps, learning and forgetting
curves.

Knows trials and how to draw them. Knows nothing of how they were run.
"""

from __future__ import annotations

import base64
import io
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
from ratchet_vla.learner.study.results import MEANING, MEASURES, Trial, forgetting, summarise
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
    rows = []
    for s in summarise(trials):
        cells = [v.percent() if (v := s.values[name]) else "not measured" for name in MEASURES]
        rows.append([s.method, len(s.seeds), *cells, f"{s.hours:.2f}", s.episodes])
    methods = list(dict.fromkeys(t.method for t in trials))
    page = (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        .from_string(TEMPLATE)
        .render(
            title=str(facts.get("title", "Study")),
            measures=MEASURES,
            meaning=MEANING,
            rows=rows,
            heat=[(m, _uri(heat_map([t for t in trials if t.method == m]))) for m in methods],
            curves=_uri(forgetting_curves(trials)),
            learning=_uri(drawn) if (drawn := learning_curves(trials)) else "",
            claims=[
                (c.method, c.text, c.value.percent() if c.value else "-", f"{100 * c.bound:.0f}", c.verdict)
                for c in claims(trials)
            ],
            facts=[(k, _plain(v)) for k, v in facts.items() if k != "methods"],
        )
    )
    write_text(output, page, durable=False)
    return output


def heat_map(trials: Sequence[Trial]) -> bytes:
    """PNG of the mean success matrix over seeds of one method; stages and cells that no seed measured are blank."""
    columns, tasks = trials[0].matrix.columns, trials[0].matrix.tasks
    rows = []
    for stage in trials[0].matrix.stages:
        cells = [[c for t in trials if (c := t.matrix.get(stage, task)) is not None] for task in columns]
        if any(cells):
            rows.append(
                (stage, [100 * float(np.mean([c.rate.estimate for c in seen])) if seen else np.nan for seen in cells])
            )
    grid = np.array([row for _, row in rows])
    figure = Figure(figsize=(1.6 + 0.95 * len(columns), 1.3 + 0.42 * len(rows)), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(grid, vmin=0, vmax=100, cmap="YlGnBu", aspect="auto")
    for i, j in np.ndindex(grid.shape):
        if np.isfinite(grid[i, j]):
            axes.text(j, i, f"{grid[i, j]:.0f}", ha="center", va="center", color="w" if grid[i, j] > 60 else "k")
    for i, (stage, _) in enumerate(rows):
        if stage and trials[0].sequential:
            j = columns.index(tasks[stage - 1])
            axes.add_patch(Rectangle((j - 0.47, i - 0.44), 0.94, 0.88, fill=False, edgecolor="#d64545", linewidth=1.8))
    axes.set_xticks(range(len(columns)), [c[:22] for c in columns], rotation=25, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), ["base" if s == 0 else f"stage {s}" for s, _ in rows], fontsize=8)
    figure.tight_layout()
    return _png(figure)


def losses(trials: Sequence[Trial]) -> list[tuple[int, float]]:
    """(tasks learned since, change of success since the task was learned in points), mean over tasks and trials.

    A change and not the success itself: fewer tasks are old than young, so a mean of their success would move though
    nothing is forgotten.
    """
    found: dict[int, list[float]] = {}
    for trial in trials:
        for task in trial.matrix.tasks:
            points = forgetting(trial.matrix, task)
            if points and points[0][0] == 0:
                for since, rate in points:
                    found.setdefault(since, []).append(100 * (rate - points[0][1]))
    return [(since, float(np.mean(found[since]))) for since in sorted(found)]


def forgetting_curves(trials: Sequence[Trial]) -> bytes:
    """PNG of `losses` per method."""
    figure = Figure(figsize=(9.0, 3.4), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = [t for t in trials if t.sequential]
    for method in dict.fromkeys(t.method for t in shown):
        curve = losses([t for t in shown if t.method == method])
        axes.plot([since for since, _ in curve], [points for _, points in curve], marker="o", label=method)
    axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    axes.set_xlabel("tasks learned since")
    axes.set_ylabel("change of success, points")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if shown:
        axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    return _png(figure)


def learning_curves(trials: Sequence[Trial]) -> bytes:
    """PNG: success of the training episodes by update, stage beside stage, mean over those seeds that made the update,
    per method; empty where no trial ran episodes."""
    curves: dict[str, dict[tuple[int, int], list[float]]] = {}
    length: dict[int, int] = {}
    for trial in trials:
        made: dict[int, int] = {}
        for update in trial.updates:
            if update["episodes"]:
                stage = int(update["stage"])
                made[stage] = made.get(stage, 0) + 1
                length[stage] = max(length.get(stage, 0), made[stage])
                place = curves.setdefault(trial.method, {}).setdefault((stage, made[stage]), [])
                place.append(100 * update["successes"] / update["episodes"])
    if not curves:
        return b""
    start = {stage: sum(n for s, n in length.items() if s < stage) for stage in length}
    figure = Figure(figsize=(9.0, 3.4), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method, seen in curves.items():
        places = sorted(seen)
        means = [float(np.mean(seen[p])) for p in places]
        axes.plot([start[stage] + k for stage, k in places], means, label=method, linewidth=1.3)
    for border in start.values():
        if border:
            axes.axvline(border + 0.5, color="#9aa5b1", linewidth=0.8)
    axes.set_xlabel("updates")
    axes.set_ylabel("success in %")
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    return _png(figure)


def _plain(value: Any) -> str:
    """A fact as a person would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()
