"""A study as one self-contained page: table with intervals, success matrices as heat maps, learning and forgetting
curves.

Knows trials and how to draw them. Knows nothing of how they were run.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agent.learner.metrics import SuccessMatrix
from agent.learner.study import MEANING, MEASURES, Trial, forgetting, summarise

TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;margin:2rem auto;max-width:1080px;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{border-bottom:1px solid #d5dce2;padding:.3rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}small{color:#66727f}figure{margin:1rem 0}
</style><h1>{{ title }}</h1>
<p>Points with 95 % intervals. With several seeds the interval is Student's t over seeds, with one it covers the
evaluation episodes alone.</p>
<table><tr><th>method</th><th>seeds</th>{% for m in measures %}<th title="{{ meaning[m] }}">{{ m }}</th>{% endfor %}
<th>hours</th><th>episodes</th></tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<ul>{% for m in measures %}<li><b>{{ m }}</b>: {{ meaning[m] }}</li>{% endfor %}</ul>
<h2>Success after each stage</h2><p>Rows are stages, columns tasks in the order of learning, then held-out ones; mean
over seeds, in %.</p>
{% for name, image in heat %}<figure><figcaption>{{ name }}</figcaption><img alt="success matrix of {{ name }}"
src="{{ image }}"></figure>{% endfor %}
<h2>What learned tasks lose</h2><img alt="forgetting curves" src="{{ curves }}">
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
            heat=[(m, _uri(heat_map([t.matrix for t in trials if t.method == m]))) for m in methods],
            curves=_uri(forgetting_curves(trials)),
            facts=[(k, str(v)) for k, v in facts.items() if k != "methods"],
        )
    )
    beside = output.with_name(output.name + ".partial")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, output)
    return output


def heat_map(matrices: Sequence[SuccessMatrix]) -> bytes:
    """PNG of the mean success matrix over seeds; cells that no seed measured are blank."""
    columns, stages = matrices[0].columns, matrices[0].stages
    grid = np.full((len(stages), len(columns)), np.nan)
    for i, stage in enumerate(stages):
        for j, task in enumerate(columns):
            cells = [c for m in matrices if (c := m.get(stage, task)) is not None]
            if cells:
                grid[i, j] = np.mean([c.rate.estimate for c in cells])
    figure = Figure(figsize=(1.6 + 0.95 * len(columns), 1.3 + 0.42 * len(stages)), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(100 * grid, vmin=0, vmax=100, cmap="YlGnBu", aspect="auto")
    for i, j in np.ndindex(grid.shape):
        if np.isfinite(grid[i, j]):
            axes.text(j, i, f"{100 * grid[i, j]:.0f}", ha="center", va="center", color="w" if grid[i, j] > 0.6 else "k")
    axes.set_xticks(range(len(columns)), [c[:22] for c in columns], rotation=25, ha="right", fontsize=7)
    axes.set_yticks(range(len(stages)), ["base" if s == 0 else f"stage {s}" for s in stages], fontsize=8)
    figure.tight_layout()
    return _png(figure)


def forgetting_curves(trials: Sequence[Trial]) -> bytes:
    """PNG: success on learned tasks against the number of tasks learned since, mean over tasks and seeds, per
    method."""
    figure = Figure(figsize=(9.0, 3.4), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method in dict.fromkeys(t.method for t in trials):
        found: dict[int, list[float]] = {}
        for trial in (t for t in trials if t.method == method):
            for task in trial.matrix.tasks:
                for since, rate in forgetting(trial.matrix, task):
                    found.setdefault(since, []).append(rate)
        stages = sorted(found)
        axes.plot(stages, [100 * float(np.mean(found[k])) for k in stages], marker="o", label=method)
    axes.set_xlabel("tasks learned since")
    axes.set_ylabel("success in %")
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    return _png(figure)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()
