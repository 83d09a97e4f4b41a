"""A study: several methods, several seeds, one success matrix each; what they say together.

Knows matrices by method and seed, and intervals over seeds. Knows no simulator, no training and no page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.intervals import Interval, mean
from ratchet_vla.learner.measures.metrics import SuccessMatrix, difference, measures

MEASURES = ("AVG", "NBT", "FWT", "ZS", "plasticity")
RATES = ("AVG", "ZS")  # the others are differences
MEANING = {
    "AVG": "mean success over the learned tasks after the last stage",
    "NBT": "loss on earlier tasks since they were learned; lower is better",
    "FWT": "gain on a task before it was trained",
    "ZS": "mean success on held-out tasks after the last stage",
    "plasticity": "mean gain on a task by its own training",
}


@dataclass(frozen=True)
class Trial:
    """One method with one seed, finished.

    seconds: wall clock, of the last start where it was stopped and resumed. episodes: those that were learned from.
    updates: what was logged of each update. sequential: False where all tasks were learned at once, so that transfer,
    forgetting and a task's own gain mean nothing.
    """

    method: str
    seed: int
    matrix: SuccessMatrix
    seconds: float
    episodes: int
    updates: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    sequential: bool = True


@dataclass(frozen=True)
class Summary:
    """One method over its seeds. values: measure -> interval, None where it was not measured. Rates in [0, 1]."""

    method: str
    seeds: tuple[int, ...]
    values: Mapping[str, Interval | None]
    hours: float
    episodes: int


def plasticity(matrix: SuccessMatrix) -> Interval | None:
    """mean_k (S[k, k] - S[k-1, k]): what each task gained by being trained."""
    gains = []
    for stage, task in enumerate(matrix.tasks, 1):
        cell_before = matrix.get(stage - 1, task)
        cell_after = matrix.get(stage, task)
        if cell_before is None or cell_after is None:
            return None
        gains.append(difference(cell_after, cell_before))
    return mean(gains)


def over_seeds(values: Sequence[Interval], lowest: float = -1.0) -> Interval:
    """Mean over seeds with Student's t interval of the seeds' estimates.

    The interval holds the luck of training and of evaluation, and is never narrower than the luck of evaluation alone
    makes it: a few seeds may agree by chance. A single seed keeps its own interval, which holds the luck of evaluation
    alone. lowest: what the measure cannot be below, 0 for a rate; the interval is cut there and at 1.

    Raises:
        RatchetError: study.nothing_measured.
    """
    if not values:
        raise RatchetError("study.nothing_measured", "no seed has this measure")
    if len(values) == 1:
        return values[0]
    estimates = np.array([interval.estimate for interval in values])
    centre = float(estimates.mean())
    half_width = float(stats.t.ppf(0.975, len(values) - 1) * estimates.std(ddof=1) / math.sqrt(len(values)))
    evaluation_luck = mean(values)
    low = min(centre - half_width, evaluation_luck.low)
    high = max(centre + half_width, evaluation_luck.high)
    return Interval(centre, max(low, lowest), min(high, 1.0), f"Student's t over {len(values)} seeds")


def summarise(trials: Sequence[Trial]) -> list[Summary]:
    """One line per method, in the order in which they first appear."""
    summaries = []
    for method in dict.fromkeys(trial.method for trial in trials):
        method_trials = [trial for trial in trials if trial.method == method]
        scores = [_scores(trial) for trial in method_trials]
        seeds = tuple(trial.seed for trial in method_trials)
        values = {name: _over_all_seeds(name, [seed_scores[name] for seed_scores in scores]) for name in MEASURES}
        hours = sum(trial.seconds for trial in method_trials) / 3600
        episodes = sum(trial.episodes for trial in method_trials)
        summaries.append(Summary(method, seeds, values, hours, episodes))
    return summaries


def _scores(trial: Trial) -> dict[str, Interval | None]:
    """The measures of one trial, None for those that mean nothing for it or were not measured."""
    scores = measures(trial.matrix)
    if not trial.sequential:
        return {"AVG": scores.avg, "NBT": None, "FWT": None, "ZS": scores.zs, "plasticity": None}
    gain = plasticity(trial.matrix)
    return {"AVG": scores.avg, "NBT": scores.nbt, "FWT": scores.fwt, "ZS": scores.zs, "plasticity": gain}


def _over_all_seeds(name: str, values: Sequence[Interval | None]) -> Interval | None:
    """A measure over the seeds; None unless each of them has it, because methods are compared on the same seeds."""
    measured = [value for value in values if value is not None]
    if len(measured) < len(values):
        return None
    return over_seeds(measured, 0.0 if name in RATES else -1.0)


def cells_of(summary: Summary, missing: str) -> list[str]:
    """A summary's measures in points with their intervals, as text, in the order of `MEASURES`."""
    values = [summary.values[name] for name in MEASURES]
    return [missing if value is None else value.percent() for value in values]


def as_dict(trials: Sequence[Trial], facts: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON: measures in points with their intervals, matrices in full, what was run."""
    methods: dict[str, Any] = {}
    for summary in summarise(trials):
        matrices = {str(trial.seed): trial.matrix.to_dict() for trial in trials if trial.method == summary.method}
        methods[summary.method] = {
            **{name: _points(interval) for name, interval in summary.values.items()},
            "seeds": list(summary.seeds),
            "hours": round(summary.hours, 3),
            "episodes": summary.episodes,
            "matrices": matrices,
        }
    return {**facts, "methods": methods}


def _points(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {
        "points": round(100 * interval.estimate, 2),
        "low": round(100 * interval.low, 2),
        "high": round(100 * interval.high, 2),
        "method": interval.method,
    }


def load_trial(method: str, seed: int, folder: Path, sequential: bool = True) -> Trial | None:
    """A finished trial's folder, None where it is not finished. method: label of its row.

    Raises:
        RatchetError: metrics.bad_file for a damaged matrix.
    """
    if not (folder / "matrix.json").is_file() or not (folder / "run.json").is_file():
        return None
    run_facts = json.loads((folder / "run.json").read_text())
    if "finished" not in run_facts:
        return None
    log_path = folder / "updates.jsonl"
    lines = log_path.read_text().splitlines() if log_path.is_file() else []
    updates = tuple(json.loads(line) for line in lines)
    episodes = sum(int(update["episodes"]) for update in updates)
    matrix = SuccessMatrix.load(folder / "matrix.json")
    return Trial(method, seed, matrix, float(run_facts["seconds"]), episodes, updates, sequential)


def require_same(folder: Path, expected: Mapping[str, Any]) -> None:
    """Refuse to go on with a trial in `folder`, finished or not, that was started with other settings.

    expected: facts as they stand in run.json. What an older version did not write is not compared.

    Raises:
        RatchetError: study.changed naming what differs.
    """
    path = folder / "run.json"
    if not path.is_file():
        return
    stored = json.loads(path.read_text())
    as_stored = json.loads(json.dumps(expected, default=str))
    differences = _differing({key: stored[key] for key in expected if key in stored}, as_stored, "")
    if differences:
        raise RatchetError(
            "study.changed",
            f"this trial was run with other settings: {', '.join(differences[:4])}",
            where=str(folder),
            fix="use a new study folder, or the settings as they were",
        )


def _differing(stored: Any, expected: Any, name: str) -> list[str]:
    if isinstance(stored, dict) and isinstance(expected, dict):
        differences = []
        for key in stored:
            if key in expected:
                differences += _differing(stored[key], expected[key], f"{name}.{key}" if name else key)
        return differences
    return [] if stored == expected else [f"{name} {stored!r}, now {expected!r}"]


def markdown(trials: Sequence[Trial]) -> str:
    """The table in points with 95 % intervals, as Markdown."""
    rows = [f"| method | seeds | {' | '.join(MEASURES)} | hours | episodes |", "|---" * (len(MEASURES) + 4) + "|"]
    for summary in summarise(trials):
        cells = " | ".join(cells_of(summary, missing="-"))
        rows.append(f"| {summary.method} | {len(summary.seeds)} | {cells} | {summary.hours:.1f} | {summary.episodes} |")
    return "\n".join(rows) + "\n"


def forgetting(matrix: SuccessMatrix, task: str) -> list[tuple[int, float]]:
    """(stages since the task was learned, success) for one learned task."""
    learned = matrix.tasks.index(task) + 1
    points = []
    for stage in range(learned, len(matrix.tasks) + 1):
        cell = matrix.get(stage, task)
        if cell is not None:
            points.append((stage - learned, cell.rate.estimate))
    return points
