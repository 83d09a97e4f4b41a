"""A run folder as one self-contained HTML page, and the success matrix for the terminal.

Knows the run folder's files and how to sum them up. Knows no robot, no policy and no training.

The run folder (every file may be absent; the page then says so):

    run.json        what was run: {"title", "command", "seed", "method", "contract", "base_hash", "started", "finished",
                    "config": {...}, "host": {...}, "versions": {...}}; further keys are shown too
    matrix.json     `metrics.SuccessMatrix.save`
    updates.jsonl   one JSON object per update, in order: {"task", "update", "episodes", "successes", "loss",
                    "approx_kl", "entropy", "clip_fraction", "seconds_rollout", "seconds_update"}; further keys ignored
    videos/*.gif    named by `video_name`: NAME__before.gif and NAME__after.gif stand side by side
    adapters.json   list of {"stage", "task", "id", "parent", "tags"}, oldest first; further keys are shown too
    comparison.json of a stored adapter against its base, see report_comparison; most runs have none. The page is then
                    about it: a run that has it needs no matrix
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.intervals import Interval
from ratchet_vla.learner.measures.metrics import Measures, SuccessMatrix, measures
from ratchet_vla.learner.report import comparison as report_comparison
from ratchet_vla.learner.report.charts import diagnostic_curves, number, segments, success_curve
from ratchet_vla.learner.report.template import MACROS, TEMPLATE
from ratchet_vla.storage.documents import write_text

HEADER = ("command", "method", "seed", "contract", "base_hash", "started", "finished")
MOMENTS = (("before", "after"), ("base", "adapter"))  # what stands side by side
MEANING = {
    "avg": ("AVG", "mean success over the learned tasks"),
    "nbt": ("NBT", "negative backward transfer: loss on earlier tasks since they were learned; lower is better"),
    "fwt": ("FWT", "forward transfer: gain on a task before it was trained; higher is better"),
    "zs": ("Zero-shot", "mean success over tasks that were never trained"),
}


@dataclass(frozen=True)
class Run:
    """What a run folder holds. comparison: as `report_comparison.shown` tells it, {} for most runs. missing: one line
    per file or part that is absent or unreadable."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    matrix: SuccessMatrix | None = None
    updates: list[dict[str, Any]] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    adapters: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    comparison: dict[str, Any] = field(default_factory=dict)


def video_name(task: str, moment: str) -> str:
    """File name for a rollout's GIF. moment: one of `MOMENTS`, such as "before" or "after"."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', task)}__{moment}.gif"


def load_run(folder: Path) -> Run:
    """Read whatever the folder has.

    Raises:
        RatchetError: report.no_run where there is no such folder.
    """
    if not folder.is_dir():
        raise RatchetError("report.no_run", "no such run folder", where=str(folder), fix="name the folder of a run")
    missing: list[str] = []

    facts = _read_json(folder / "run.json", dict, missing)
    adapters = [a for a in _read_json(folder / "adapters.json", list, missing) if isinstance(a, dict)]
    comparison: dict[str, Any] = {}
    if (folder / "comparison.json").is_file():
        try:
            comparison = report_comparison.shown(_read_json(folder / "comparison.json", dict, missing))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            missing.append(f"comparison.json: not one of ours ({error!r})")
    matrix = None
    if (folder / "matrix.json").is_file():
        try:
            matrix = SuccessMatrix.load(folder / "matrix.json")
        except RatchetError as error:
            missing.append(f"matrix.json: {error}")
    elif not comparison:
        missing.append("matrix.json: not there")

    updates: list[dict[str, Any]] = []
    path = folder / "updates.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for count, line in enumerate(lines, start=1):
        try:
            update = json.loads(line)
        except ValueError:
            update = None
        if isinstance(update, dict):
            updates.append(update)
        elif line.strip():
            missing.append(f"updates.jsonl: line {count} is unreadable")
    if not lines:
        missing.append("updates.jsonl: empty" if path.is_file() else "updates.jsonl: not there")

    videos = sorted((folder / "videos").glob("*.gif"))
    if not videos:
        missing.append("videos: no GIF there")
    return Run(folder, facts, matrix, updates, videos, adapters, missing, comparison)


def render(run: Run) -> str:
    """The page as HTML text; images embedded, no script, nothing loaded from anywhere."""
    result = _latest_measures(run.matrix) if run.matrix else None
    cards, methods = _cards(result)
    known = {*HEADER, "title", "config", "host", "versions"}
    rest = {k: v for k, v in run.facts.items() if k not in known}
    header = [(k.replace("_", " "), _text(run.facts[k])) for k in HEADER if run.facts.get(k) not in (None, "", {}, [])]
    parts = (("Configuration", "config"), ("Host", "host"), ("Versions", "versions"))
    details = [(name, _flat(run.facts[key])) for name, key in parts if isinstance(run.facts.get(key), dict)]
    keys = list(dict.fromkeys(key for adapter in run.adapters for key in adapter))
    charts = (success_curve(run.updates), diagnostic_curves(run.updates)) if run.updates else ()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(MACROS + TEMPLATE).render(
        comparison=run.comparison,
        title=str(run.facts.get("title", run.folder.resolve().name)),
        missing=run.missing,
        header=header + _flat(rest),
        measures=result,
        cards=cards,
        methods=methods,
        stages=len(run.matrix.stages) if run.matrix else 0,
        rows=_rows(run.matrix) if run.matrix else [],
        curves=[_data_uri(png, "image/png") for png in charts],
        curve_tasks=list(dict.fromkeys(task for task, _, _ in segments(run.updates))),
        videos=_videos(run),
        times=_times(run.updates),
        adapter_keys=keys,
        adapters=[[_text(adapter.get(key, "")) for key in keys] for adapter in run.adapters],
        details=details,
    )


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Render the run in `folder` to `output`, by default report.html inside it; returns the path written.

    Raises:
        RatchetError: report.no_run.
    """
    page = render(load_run(folder))
    output = folder / "report.html" if output is None else output
    write_text(output, page, durable=False)
    return output


def print_matrix(matrix: SuccessMatrix, console: Console | None = None) -> None:
    """Success per task and stage with 95 % intervals, then the measures; fits 100 columns, nothing is cut off.

    Where the stages do not fit side by side the table is printed in parts.
    """
    console = Console(width=100) if console is None else console
    numbers = [*map(str, matrix.stages[1:]), *(f"H{i + 1}" for i in range(len(matrix.held_out)))]
    widest = max((len(_short(cell.rate)) for cell in matrix.cells.values()), default=7)
    # 3 characters of padding and border for each stage; 30 stay for the task's number and name.
    fitting = max((min(console.width, 100) - 30) // (max(widest, 7) + 3), 1)
    for start in range(0, len(matrix.stages), fitting):
        stages = matrix.stages[start : start + fitting]
        table = Table(title="success in %, with 95 % intervals")
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("task", overflow="fold", min_width=12)
        for stage in stages:
            table.add_column("base" if stage == 0 else f"stage {stage}", justify="right", no_wrap=True)
        for label, task in zip(numbers, matrix.columns, strict=True):
            cells = [matrix.get(stage, task) for stage in stages]
            shown = [_short(cell.rate) if cell else "-" for cell in cells]
            # Text, because a task's name may look like markup.
            table.add_row(label, Text(task), *map(Text, shown), end_section=task == matrix.tasks[-1])
        console.print(table)
    result = _latest_measures(matrix)
    if result is None:
        console.print("AVG, NBT, FWT, ZS: no stage has been measured on every task learned by then", markup=False)
        return
    for name in ("avg", "nbt", "fwt", "zs"):
        value: Interval | None = getattr(result, name)
        text = value.percent() if value else result.missing[name]
        console.print(f"{name.upper():4} after stage {result.after}: {text}", markup=False, highlight=False)


def _latest_measures(matrix: SuccessMatrix) -> Measures | None:
    """Measures after the last stage whose learned tasks were all evaluated; None before the first."""
    for stage in reversed(matrix.stages[1:]):
        result = measures(matrix, stage)
        if result.avg is not None:
            return result
    return None


def _cards(result: Measures | None) -> tuple[list[dict[str, str]], str]:
    if result is None:
        return [], ""
    cards, methods = [], []
    for key, (name, meaning) in MEANING.items():
        value: Interval | None = getattr(result, key)
        if value is None:
            cards.append({"name": name, "value": "–", "detail": result.missing[key], "meaning": meaning})
            continue
        figure, bounds = value.percent().split(" ", 1)
        cards.append({"name": name, "value": figure, "detail": bounds, "meaning": meaning})
        methods.append(f"{name}: {value.method}.")
    return cards, " ".join(methods)


def _rows(matrix: SuccessMatrix) -> list[dict[str, Any]]:
    rows = []
    for i, task in enumerate(matrix.columns):
        trained = i + 1 if task in matrix.tasks else None
        label = f"{trained} {task}" if trained else f"H{i + 1 - len(matrix.tasks)} {task}"
        cells: list[dict[str, Any] | None] = []
        for stage in matrix.stages:
            cell = matrix.get(stage, task)
            if cell is None:
                cells.append(None)
                continue
            rate = cell.rate
            background, ink = _colour(rate.estimate)
            figure, bounds = rate.percent().split(" ", 1)
            counts = f"{cell.successes}/{cell.trials}"
            cells.append(
                {"rate": figure, "interval": bounds, "counts": counts, "trained": stage == trained,
                 "background": background, "ink": ink}
            )  # fmt: skip
        rows.append({"label": label, "cells": cells})
    return rows


def _colour(rate: float) -> tuple[str, str]:
    """Background from pale to deep teal, and the ink that stays readable on it."""
    pale, deep = (232, 244, 246), (8, 84, 110)
    mixed = tuple(round(a + (b - a) * rate) for a, b in zip(pale, deep, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed), "#ffffff" if rate > 0.55 else "#1f2933"


def _videos(run: Run) -> list[dict[str, Any]]:
    by_name: dict[str, dict[str, Path]] = {}
    for path in run.videos:
        name, _, moment = path.stem.rpartition("__")
        by_name.setdefault(name or path.stem, {})[moment if name else ""] = path
    tasks = run.matrix.columns if run.matrix else ()
    order = [video_name(task, "").removesuffix("__.gif") for task in tasks]
    names = sorted(by_name, key=lambda name: (order.index(name) if name in order else len(order), name))
    shown = []
    for name in names:
        found = by_name[name]
        moments = [m for pair in MOMENTS if {*pair} & found.keys() for m in pair]
        moments += sorted(found.keys() - {*moments})
        sides = [
            {
                "label": moment or "rollout",
                "source": _data_uri(found[moment].read_bytes(), "image/gif") if moment in found else "",
            }
            for moment in moments
        ]
        title = tasks[order.index(name)] if name in order else name
        shown.append({"name": title, "sides": sides})
    return shown


def _times(updates: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One row per stretch of updates on one task, then the total."""
    if not updates:
        return []
    rows = []
    stretches = segments(updates)
    if len(stretches) > 1:
        stretches.append(("all", 0, len(updates)))
    for task, first, last in stretches:
        sums = {
            key: math.fsum(x for u in updates[first:last] if not math.isnan(x := number(u, key)))
            for key in ("episodes", "seconds_rollout", "seconds_update")
        }
        rollout, update = sums["seconds_rollout"], sums["seconds_update"]
        rows.append(
            {
                "task": task,
                "updates": str(last - first),
                "episodes": f"{sums['episodes']:,.0f}",
                "rollout": _duration(rollout),
                "optimisation": _duration(update),
                "total": _duration(rollout + update),
            }
        )
    return rows


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def _short(rate: Interval) -> str:
    """`81 [74-87]`, in %."""
    return f"{100 * rate.estimate:.0f} [{100 * rate.low:.0f}-{100 * rate.high:.0f}]"


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _text(value)))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(str(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return str(value)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _read_json(path: Path, kind: type, missing: list[str]) -> Any:
    """The file's content where it is of `kind`; otherwise an empty one, and a line in `missing`."""
    if not path.is_file():
        missing.append(f"{path.name}: not there")
        return kind()
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        missing.append(f"{path.name}: unreadable ({error})")
        return kind()
    if not isinstance(data, kind):
        missing.append(f"{path.name}: holds a {type(data).__name__}, expected a {kind.__name__}")
        return kind()
    return data
