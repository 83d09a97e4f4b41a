"""What a study says about the claims it was made for: each as a number with its interval, and yes, no or undecided.

Knows trials and the three claims about sequential fine-tuning (arXiv 2603.11653): it hardly forgets, it comes close to
learning all tasks at once, and it keeps what the base could do on tasks that nobody trained. Knows no run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ratchet_vla.learner.measures.intervals import Interval, mean
from ratchet_vla.learner.measures.metrics import Cell, difference
from ratchet_vla.learner.study.results import Trial, over_seeds, summarise

FORGETTING = 0.02
"""Largest loss on earlier tasks that counts as hardly forgetting."""
GAP = 0.05
"""Largest distance to the oracle that counts as close."""
KEEPING = 0.0
"""Largest loss on held-out tasks."""
ROUNDING = 1e-9  # a loss of exactly the bound meets it


@dataclass(frozen=True)
class Claim:
    """value: the loss in question, so that it should be at most `bound`; rates. None where it was not measured.

    verdict: yes where all of the interval meets the bound, no where none of it does.
    """

    method: str
    text: str
    value: Interval | None
    bound: float

    @property
    def met(self) -> bool | None:
        """What the point estimate says."""
        return None if self.value is None else self.value.estimate <= self.bound + ROUNDING

    @property
    def verdict(self) -> Literal["yes", "no", "undecided", "not measured"]:
        """What the interval says."""
        if self.value is None:
            return "not measured"
        if self.value.high <= self.bound + ROUNDING:
            return "yes"
        return "no" if self.value.low > self.bound + ROUNDING else "undecided"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: points."""
        figures: dict[str, float | None] = dict.fromkeys(("points", "low", "high"))
        if self.value is not None:
            figures["points"] = round(100 * self.value.estimate, 2)
            figures["low"] = round(100 * self.value.low, 2)
            figures["high"] = round(100 * self.value.high, 2)
        return {
            "method": self.method,
            "claim": self.text,
            **figures,
            "bound": 100 * self.bound,
            "met": self.met,
            "verdict": self.verdict,
        }


def claims(trials: Sequence[Trial], oracle: str = "oracle") -> list[Claim]:
    """The three claims for every method that learns one task after the other."""
    results = []
    for summary in summarise([trial for trial in trials if trial.sequential]):
        method_trials = [trial for trial in trials if trial.method == summary.method]
        oracle_trials = {trial.seed: trial for trial in trials if trial.method == oracle}
        same_seed = [(trial, oracle_trials[trial.seed]) for trial in method_trials if trial.seed in oracle_trials]
        oracle_gap = _over_all(method_trials, [_last(best, trial) for trial, best in same_seed])
        held_out_loss = _over_all(method_trials, [_held_out_loss(trial) for trial in method_trials])
        results += [
            Claim(summary.method, "loss on earlier tasks (NBT)", summary.values["NBT"], FORGETTING),
            Claim(summary.method, "AVG below the oracle's", oracle_gap, GAP),
            Claim(summary.method, "loss on held-out tasks against the base", held_out_loss, KEEPING),
        ]
    return results


def _over_all(trials: Sequence[Trial], losses: Sequence[Interval | None]) -> Interval | None:
    """Mean of one loss per trial; None where one is missing."""
    measured = [loss for loss in losses if loss is not None]
    # A mean over some of the seeds would not be comparable with the other methods'.
    if not measured or len(measured) < len(trials):
        return None
    return over_seeds(measured)


def _last(first: Trial, second: Trial) -> Interval | None:
    """Mean over tasks of first minus second after the last stage, on the same episodes where both list them."""
    task_names = first.matrix.tasks
    if {*task_names} != {*second.matrix.tasks}:
        return None
    last_cells = [
        (first.matrix.get(len(task_names), task_name), second.matrix.get(len(second.matrix.tasks), task_name))
        for task_name in task_names
    ]
    return _mean(last_cells)


def _held_out_loss(trial: Trial) -> Interval | None:
    matrix = trial.matrix
    return _mean([(matrix.get(0, name), matrix.get(len(matrix.tasks), name)) for name in matrix.held_out])


def _mean(pairs: Sequence[tuple[Cell | None, Cell | None]]) -> Interval | None:
    differences = [difference(first, second) for first, second in pairs if first is not None and second is not None]
    return mean(differences) if differences and len(differences) == len(pairs) else None
