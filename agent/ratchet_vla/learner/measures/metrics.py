"""The success matrix S[stage, task] and the four measures of continual learning: AVG, NBT, FWT and zero-shot.

Knows counts of successes and trials per stage and task, and their file format. Knows no robot, no policy, no training.
Stage 0 is the base model; stage k is after learning the k-th task. T trained tasks in order, H held-out tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.intervals import Interval, mean, paired_difference, unpaired_difference, wilson
from ratchet_vla.storage.documents import write_json

__all__ = ["Measures", "SuccessMatrix", "measures"]

SCHEMA = 1
CellKey = tuple[int, str]
"""Stage and task."""


@dataclass(frozen=True)
class Cell:
    """One evaluation: successes in trials, and where known the outcome of each episode.

    episodes: success per episode key, such as "state-7/seed-0"; empty where only counts are known. The key must name
        the initial state and the seed, so that two evaluations with equal keys can be compared in pairs.
    """

    successes: int
    trials: int
    episodes: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (0 <= self.successes <= self.trials and self.trials >= 1):
            raise RatchetError("metrics.bad_counts", f"{self.successes} successes in {self.trials} trials")
        if self.episodes and (
            len(self.episodes) != self.trials or sum(map(bool, self.episodes.values())) != self.successes
        ):
            raise RatchetError(
                "metrics.bad_counts",
                f"{self.successes}/{self.trials} does not count the {len(self.episodes)} listed episodes",
            )

    @classmethod
    def of(cls, episodes: Mapping[str, bool]) -> Cell:
        """From outcomes per episode key."""
        return cls(sum(map(bool, episodes.values())), len(episodes), dict(episodes))

    @property
    def rate(self) -> Interval:
        """Success rate with its Wilson interval."""
        return wilson(self.successes, self.trials)


def difference(first: Cell, second: Cell) -> Interval:
    """First rate minus second: in pairs where both list the same episodes, otherwise as independent samples."""
    if first.episodes and first.episodes.keys() == second.episodes.keys():
        return paired_difference(first.episodes, second.episodes)
    return unpaired_difference(first.successes, first.trials, second.successes, second.trials)


@dataclass
class SuccessMatrix:
    """S[stage, task]: rows are stages 0..T, columns the trained tasks in order and then the held-out ones.

    tasks: trained tasks in the order they are learned. held_out: tasks never trained on.
    cells: (stage, task) -> evaluation; a missing key was not measured.
    """

    tasks: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    cells: dict[tuple[int, str], Cell] = field(default_factory=dict)

    def __post_init__(self) -> None:
        task_names = self.columns
        if not self.tasks or len(set(task_names)) != len(task_names):
            raise RatchetError(
                "metrics.bad_tasks", "task names must be unique, with at least one trained task", where="matrix"
            )
        for stage, task in self.cells:
            self._check(stage, task)

    @property
    def columns(self) -> tuple[str, ...]:
        """Trained tasks in order, then the held-out ones."""
        return (*self.tasks, *self.held_out)

    @property
    def stages(self) -> range:
        """0 for the base, then one per trained task."""
        return range(len(self.tasks) + 1)

    def record(self, stage: int, task: str, cell: Cell) -> None:
        """Put one evaluation in its place.

        Raises:
            RatchetError: metrics.unknown_cell; metrics.already_measured where another result is there.
        """
        self._check(stage, task)
        present = self.cells.get((stage, task))
        if present is not None and present != cell:
            raise RatchetError(
                "metrics.already_measured",
                f"stage {stage} holds {present.successes}/{present.trials}, not {cell.successes}/{cell.trials}",
                where=task,
                fix="an evaluation is never overwritten; start a new matrix",
            )
        self.cells[(stage, task)] = cell

    def get(self, stage: int, task: str) -> Cell | None:
        """The evaluation, None where it was not measured.

        Raises:
            RatchetError: metrics.unknown_cell.
        """
        self._check(stage, task)
        return self.cells.get((stage, task))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; cells in order of stage, then column."""
        cells = []
        for stage in self.stages:
            for task in self.columns:
                cell = self.cells.get((stage, task))
                if cell is not None:
                    counts = {"successes": cell.successes, "trials": cell.trials, "episodes": dict(cell.episodes)}
                    cells.append({"stage": stage, "task": task, **counts})
        return {"schema": SCHEMA, "tasks": list(self.tasks), "held_out": list(self.held_out), "cells": cells}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SuccessMatrix:
        """The inverse of `to_dict`.

        Raises:
            RatchetError: metrics.bad_file, metrics.bad_counts, metrics.unknown_cell, metrics.bad_tasks.
        """
        try:
            if data["schema"] != SCHEMA:
                raise RatchetError("metrics.bad_file", f"schema {data['schema']}", fix=f"this version reads {SCHEMA}")
            matrix = cls(tuple(data["tasks"]), tuple(data["held_out"]))
            for stored_cell in data["cells"]:
                episodes = {str(episode_key): bool(success) for episode_key, success in stored_cell["episodes"].items()}
                matrix.record(
                    int(stored_cell["stage"]),
                    stored_cell["task"],
                    Cell(int(stored_cell["successes"]), int(stored_cell["trials"]), episodes),
                )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RatchetError(
                "metrics.bad_file", f"not a success matrix: {error!r}", fix="write it with SuccessMatrix.save"
            ) from None
        return matrix

    def save(self, path: Path) -> None:
        """Write JSON; a reader sees the old file or the new one, never half of it."""
        write_json(path, self.to_dict(), indent=1, durable=False)

    @classmethod
    def load(cls, path: Path) -> SuccessMatrix:
        """Read what `save` wrote.

        Raises:
            RatchetError: metrics.bad_file and those of `from_dict`.
        """
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise RatchetError("metrics.bad_file", str(error), where=str(path), fix="name a matrix.json") from None
        return cls.from_dict(data)

    def _check(self, stage: int, task: str) -> None:
        if task not in self.columns or stage not in self.stages:
            raise RatchetError(
                "metrics.unknown_cell",
                f"no stage {stage}, task '{task}'",
                where="matrix",
                fix=f"stages 0..{len(self.tasks)}; tasks: {', '.join(self.columns)}",
            )


@dataclass(frozen=True)
class Measures:
    """The four measures after stage `after`, rates and differences in [0, 1] and [-1, 1]; None where not measured.

    avg: mean over learned tasks of their success now. nbt: negative backward transfer, how much learned tasks lost
    since they were learned; lower is better, negative means that they improved. fwt: forward transfer, what earlier
    tasks gave each task before it was trained. zs: zero-shot success on held-out tasks now.
    missing: per measure that is None, why.
    """

    after: int
    avg: Interval | None
    nbt: Interval | None
    fwt: Interval | None
    zs: Interval | None
    missing: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: {"after": k, "avg": {"estimate", "low", "high", "method"} or null, ..., "missing": {...}}."""
        plain: dict[str, Any] = {"after": self.after, "missing": dict(self.missing)}
        for measure_name in ("avg", "nbt", "fwt", "zs"):
            interval: Interval | None = getattr(self, measure_name)
            plain[measure_name] = None if interval is None else vars(interval).copy()
        return plain


def measures(matrix: SuccessMatrix, after: int | None = None) -> Measures:
    """AVG, NBT, FWT and ZS as arXiv 2603.11653 defines them, with 95 % intervals.

        AVG = mean_j S[T, j]                     NBT = mean_{j<T} (S[j, j] - S[T, j])
        FWT = mean_{j>=2} (S[j-1, j] - S[0, j])  ZS  = mean over held-out tasks of S[T, j]

    Rates have Wilson intervals, differences Newcombe's (paired where both evaluations list the same episodes), and
    their means over tasks MOVER intervals; see `intervals`. Tasks are fixed: the intervals cover the luck of the
    evaluation episodes on these tasks, not other tasks and not other training seeds.

    Args:
        after: T, the stage to measure after, 1..len(tasks); by default the last one. Only the first T tasks count.

    Raises:
        RatchetError: metrics.unknown_cell for a stage that does not exist.
    """
    last_stage = len(matrix.tasks) if after is None else after
    if not 1 <= last_stage <= len(matrix.tasks):
        raise RatchetError(
            "metrics.unknown_cell", f"no measures after stage {last_stage}", fix=f"give 1..{len(matrix.tasks)}"
        )
    learned = tuple(enumerate(matrix.tasks[:last_stage], start=1))
    # Each term is the key of a rate, or the keys of two rates whose difference counts.
    terms_by_measure: dict[str, list[tuple[CellKey, ...]]] = {
        "avg": [((last_stage, task),) for _, task in learned],
        "nbt": [((stage, task), (last_stage, task)) for stage, task in learned[:-1]],
        "fwt": [((stage - 1, task), (0, task)) for stage, task in learned[1:]],
        "zs": [((last_stage, task),) for task in matrix.held_out],
    }
    intervals: dict[str, Interval | None] = {}
    missing: dict[str, str] = {}
    for measure_name, terms in terms_by_measure.items():
        why_none = _why_not_measured(matrix, measure_name, terms)
        if why_none:
            missing[measure_name] = why_none
        intervals[measure_name] = None if why_none else mean([_term(matrix, keys) for keys in terms])
    return Measures(after=last_stage, missing=missing, **intervals)


def _why_not_measured(matrix: SuccessMatrix, measure_name: str, terms: Sequence[tuple[CellKey, ...]]) -> str:
    """Why a measure has no value; empty where it has one."""
    if not terms:
        return "no held-out tasks" if measure_name == "zs" else "needs at least two learned tasks"
    absent_keys = sorted({key for keys in terms for key in keys} - matrix.cells.keys())
    if not absent_keys:
        return ""
    return "not measured: " + ", ".join(f"stage {stage} on {task}" for stage, task in absent_keys)


def _term(matrix: SuccessMatrix, keys: tuple[CellKey, ...]) -> Interval:
    cells = [matrix.cells[key] for key in keys]
    return cells[0].rate if len(cells) == 1 else difference(cells[0], cells[1])
