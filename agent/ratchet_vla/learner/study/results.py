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
        before, after = matrix.get(stage - 1, task), matrix.get(stage, task)
        if before is None or after is None:
            return None
        gains.append(difference(after, before))
    return mean(gains)


def over_seeds(values: Sequence[Interval], lowest: float = -1.0) -> Interval:
    """Mean over seeds: Student's t interval of the seeds' estimates, which holds the luck of training and of
    evaluation, but never a narrower one than the luck of evaluation alone gives: a few seeds may agree by chance.
    A single seed keeps its own interval, which holds the luck of evaluation alone. lowest: what the measure cannot be
    below, 0 for a rate; the interval is cut there and at 1.

    Raises:
        RatchetError: study.nothing_measured.
    """
    if not values:
        raise RatchetError("study.nothing_measured", "no seed has this measure")
    if len(values) == 1:
        return values[0]
    estimates = np.array([v.estimate for v in values])
    centre = float(estimates.mean())
    half = float(stats.t.ppf(0.975, len(values) - 1) * estimates.std(ddof=1) / math.sqrt(len(values)))
    luck = mean(values)
    low, high = min(centre - half, luck.low), max(centre + half, luck.high)
    return Interval(centre, max(low, lowest), min(high, 1.0), f"Student's t over {len(values)} seeds")


def summarise(trials: Sequence[Trial]) -> list[Summary]:
    """One line per method, in the order in which they first appear."""
    out = []
    for method in dict.fromkeys(t.method for t in trials):
        method_trials = [t for t in trials if t.method == method]
        found: dict[str, list[Interval | None]] = {name: [] for name in MEASURES}
        for trial in method_trials:
            scores = measures(trial.matrix)
            for name in ("AVG", "ZS", "NBT", "FWT"):
                known = trial.sequential or name in ("AVG", "ZS")
                found[name].append(getattr(scores, name.lower()) if known else None)
            found["plasticity"].append(plasticity(trial.matrix) if trial.sequential else None)
        values = {
            name: over_seeds([i for i in items if i is not None], 0.0 if name in ("AVG", "ZS") else -1.0)
            if all(i is not None for i in items)
            else None
            for name, items in found.items()
        }
        hours = sum(t.seconds for t in method_trials) / 3600
        out.append(
            Summary(method, tuple(t.seed for t in method_trials), values, hours, sum(t.episodes for t in method_trials))
        )
    return out


def as_dict(trials: Sequence[Trial], facts: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON: measures in points with their intervals, matrices in full, what was run."""
    methods: dict[str, Any] = {}
    for summary in summarise(trials):
        points = {
            name: None
            if value is None
            else {
                "points": round(100 * value.estimate, 2),
                "low": round(100 * value.low, 2),
                "high": round(100 * value.high, 2),
                "method": value.method,
            }
            for name, value in summary.values.items()
        }
        methods[summary.method] = {
            **points,
            "seeds": list(summary.seeds),
            "hours": round(summary.hours, 3),
            "episodes": summary.episodes,
            "matrices": {str(t.seed): t.matrix.to_dict() for t in trials if t.method == summary.method},
        }
    return {**facts, "methods": methods}


def load_trial(method: str, seed: int, folder: Path, sequential: bool = True) -> Trial | None:
    """A finished trial's folder, None where it is not finished. method: label of its row.

    Raises:
        RatchetError: metrics.bad_file for a damaged matrix.
    """
    if not (folder / "matrix.json").is_file() or not (folder / "run.json").is_file():
        return None
    facts = json.loads((folder / "run.json").read_text())
    if "finished" not in facts:
        return None
    lines = (folder / "updates.jsonl").read_text().splitlines() if (folder / "updates.jsonl").is_file() else []
    updates = tuple(json.loads(line) for line in lines)
    episodes = sum(int(u["episodes"]) for u in updates)
    matrix = SuccessMatrix.load(folder / "matrix.json")
    return Trial(method, seed, matrix, float(facts["seconds"]), episodes, updates, sequential)


def require_same(folder: Path, wanted: Mapping[str, Any]) -> None:
    """A trial that lies in `folder`, finished or not, must have been started as it would be started now.

    wanted: facts as they stand in run.json. What an older version did not write is not compared.

    Raises:
        RatchetError: study.changed naming what differs.
    """
    path = folder / "run.json"
    if not path.is_file():
        return
    stored = json.loads(path.read_text())
    changed = _differing({k: stored[k] for k in wanted if k in stored}, json.loads(json.dumps(wanted, default=str)), "")
    if changed:
        raise RatchetError(
            "study.changed",
            f"this trial was run with other settings: {', '.join(changed[:4])}",
            where=str(folder),
            fix="use a new study folder, or the settings as they were",
        )


def _differing(stored: Any, wanted: Any, name: str) -> list[str]:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        both = [k for k in stored if k in wanted]
        return [d for k in both for d in _differing(stored[k], wanted[k], f"{name}.{k}" if name else k)]
    return [] if stored == wanted else [f"{name} {stored!r}, now {wanted!r}"]


def markdown(trials: Sequence[Trial]) -> str:
    """The table in points with 95 % intervals, as Markdown."""
    rows = [f"| method | seeds | {' | '.join(MEASURES)} | hours | episodes |", "|---" * (len(MEASURES) + 4) + "|"]
    for s in summarise(trials):
        cells = [v.percent() if (v := s.values[name]) else "-" for name in MEASURES]
        rows.append(f"| {s.method} | {len(s.seeds)} | {' | '.join(cells)} | {s.hours:.1f} | {s.episodes} |")
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
