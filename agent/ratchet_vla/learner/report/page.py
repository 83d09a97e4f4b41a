"""A run folder as one self-contained HTML page, and the success matrix for the terminal.

Knows how to sum up what `run_folder` read. Knows no robot, no policy and no training.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ratchet_vla.learner.measures.intervals import Interval
from ratchet_vla.learner.measures.metrics import Measures, SuccessMatrix, measures
from ratchet_vla.learner.report.charts import diagnostic_curves, number, segments, success_curve
from ratchet_vla.learner.report.run_folder import MOMENTS, Run, load_run, video_name
from ratchet_vla.learner.report.template import MACROS, TEMPLATE
from ratchet_vla.storage.documents import write_text

HEADER = ("command", "method", "seed", "contract", "base_hash", "started", "finished")
MEANING = {
    "avg": ("AVG", "mean success over the learned tasks"),
    "nbt": ("NBT", "negative backward transfer: loss on earlier tasks since they were learned; lower is better"),
    "fwt": ("FWT", "forward transfer: gain on a task before it was trained; higher is better"),
    "zs": ("Zero-shot", "mean success over tasks that were never trained"),
}


def render(run: Run) -> str:
    """The page as HTML text; images embedded, no script, nothing loaded from anywhere."""
    result = _latest_measures(run.matrix) if run.matrix else None
    cards, methods = _cards(result)
    shown_keys = {*HEADER, "title", "config", "host", "versions"}
    more_facts = {key: value for key, value in run.facts.items() if key not in shown_keys}
    adapter_keys = list(dict.fromkeys(key for adapter in run.adapters for key in adapter))
    charts = (success_curve(run.updates), diagnostic_curves(run.updates)) if run.updates else ()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(MACROS + TEMPLATE).render(
        comparison=run.comparison,
        title=str(run.facts.get("title", run.folder.resolve().name)),
        missing=run.missing,
        header=_header(run.facts) + _flat(more_facts),
        measures=result,
        cards=cards,
        methods=methods,
        stages=len(run.matrix.stages) if run.matrix else 0,
        rows=_rows(run.matrix) if run.matrix else [],
        curves=[_data_uri(png, "image/png") for png in charts],
        curve_tasks=list(dict.fromkeys(task for task, _, _ in segments(run.updates))),
        videos=_videos(run),
        times=_times(run.updates),
        adapter_keys=adapter_keys,
        adapters=[[_text(adapter.get(key, "")) for key in adapter_keys] for adapter in run.adapters],
        details=_details(run.facts),
    )


def _header(run_facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key in HEADER:
        value = run_facts.get(key)
        if value not in (None, "", {}, []):
            rows.append((key.replace("_", " "), _text(value)))
    return rows


def _details(run_facts: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    tables = []
    for title, key in (("Configuration", "config"), ("Host", "host"), ("Versions", "versions")):
        if isinstance(run_facts.get(key), dict):
            tables.append((title, _flat(run_facts[key])))
    return tables


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
    numbers = [*map(str, matrix.stages[1:]), *(f"H{position + 1}" for position in range(len(matrix.held_out)))]
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
            rates = [_short(cell.rate) if cell else "-" for cell in cells]
            # Text, because a task's name may look like markup.
            table.add_row(label, Text(task), *map(Text, rates), end_section=task == matrix.tasks[-1])
        console.print(table)
    result = _latest_measures(matrix)
    if result is None:
        console.print("AVG, NBT, FWT, ZS: no stage has been measured on every task learned by then", markup=False)
        return
    for measure_name in ("avg", "nbt", "fwt", "zs"):
        interval: Interval | None = getattr(result, measure_name)
        text = interval.percent() if interval else result.missing[measure_name]
        console.print(f"{measure_name.upper():4} after stage {result.after}: {text}", markup=False, highlight=False)


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
    cards = []
    methods = []
    for measure_name, (label, meaning) in MEANING.items():
        interval: Interval | None = getattr(result, measure_name)
        if interval is None:
            cards.append({"name": label, "value": "–", "detail": result.missing[measure_name], "meaning": meaning})
            continue
        figure, bounds = interval.percent().split(" ", 1)
        cards.append({"name": label, "value": figure, "detail": bounds, "meaning": meaning})
        methods.append(f"{label}: {interval.method}.")
    return cards, " ".join(methods)


def _rows(matrix: SuccessMatrix) -> list[dict[str, Any]]:
    rows = []
    for column, task in enumerate(matrix.columns):
        # Columns are numbered from 1, as the stages are: a task is trained in the stage of its own number.
        trained = column + 1 if task in matrix.tasks else None
        label = f"{trained} {task}" if trained else f"H{column + 1 - len(matrix.tasks)} {task}"
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
    pale = (232, 244, 246)
    deep = (8, 84, 110)
    channels = zip(pale, deep, strict=True)
    mixed = tuple(round(pale_channel + (deep_channel - pale_channel) * rate) for pale_channel, deep_channel in channels)
    ink = "#ffffff" if rate > 0.55 else "#1f2933"
    return "#{:02x}{:02x}{:02x}".format(*mixed), ink


def _videos(run: Run) -> list[dict[str, Any]]:
    by_name: dict[str, dict[str, Path]] = {}
    for path in run.videos:
        name, _, moment = path.stem.rpartition("__")
        if not name:
            name = path.stem
            moment = ""
        by_name.setdefault(name, {})[moment] = path
    tasks = run.matrix.columns if run.matrix else ()
    # A file's name is the task's with some characters replaced; the page shows the task's own.
    task_of_name: dict[str, str] = {}
    for task in tasks:
        task_of_name.setdefault(video_name(task, "").removesuffix("__.gif"), task)
    in_order = [name for name in task_of_name if name in by_name]
    in_order += sorted(by_name.keys() - task_of_name.keys())
    return [{"name": task_of_name.get(name, name), "sides": _sides(by_name[name])} for name in in_order]


def _sides(path_of_moment: Mapping[str, Path]) -> list[dict[str, str]]:
    """Images that stand beside each other; one without a source where only its counterpart was recorded."""
    moments: list[str] = []
    for pair in MOMENTS:
        if {*pair} & path_of_moment.keys():
            moments += pair
    moments += sorted(path_of_moment.keys() - {*moments})
    sides = []
    for moment in moments:
        path = path_of_moment.get(moment)
        source = "" if path is None else _data_uri(path.read_bytes(), "image/gif")
        sides.append({"label": moment or "rollout", "source": source})
    return sides


def _times(updates: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One row per stretch of updates on one task, then the total."""
    if not updates:
        return []
    rows = []
    stretches = segments(updates)
    if len(stretches) > 1:
        stretches.append(("all", 0, len(updates)))
    for task, first, last in stretches:
        stretch = updates[first:last]
        rollout_s = _sum(stretch, "seconds_rollout")
        update_s = _sum(stretch, "seconds_update")
        rows.append(
            {
                "task": task,
                "updates": str(last - first),
                "episodes": f"{_sum(stretch, 'episodes'):,.0f}",
                "rollout": _duration(rollout_s),
                "optimisation": _duration(update_s),
                "total": _duration(rollout_s + update_s),
            }
        )
    return rows


def _sum(updates: list[dict[str, Any]], key: str) -> float:
    """Sum over the updates that have the figure."""
    values = [number(update, key) for update in updates]
    return math.fsum(value for value in values if not math.isnan(value))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest_s = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest_s // 60:02d} min"
    return f"{rest_s // 60} min {rest_s % 60:02d} s"


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
        return " ".join(str(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    return str(value)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
