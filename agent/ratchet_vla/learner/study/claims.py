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


@dataclass(frozen=True)
class Claim:
    """value: the loss in question, so that it should be at most `bound`; rates. None where it was not measured.

    met: what the point estimate says. verdict: what the interval says: yes where all of it meets the bound, no where
    none of it does.
    """

    method: str
    text: str
    value: Interval | None
    bound: float

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value.estimate <= self.bound + 1e-9

    @property
    def verdict(self) -> Literal["yes", "no", "undecided", "not measured"]:
        if self.value is None:
            return "not measured"
        if self.value.high <= self.bound + 1e-9:
            return "yes"
        return "no" if self.value.low > self.bound + 1e-9 else "undecided"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: points."""
        value = self.value
        return {
            "method": self.method,
            "claim": self.text,
            "points": None if value is None else round(100 * value.estimate, 2),
            "low": None if value is None else round(100 * value.low, 2),
            "high": None if value is None else round(100 * value.high, 2),
            "bound": 100 * self.bound,
            "met": self.met,
            "verdict": self.verdict,
        }


def claims(trials: Sequence[Trial], oracle: str = "oracle") -> list[Claim]:
    """The three claims for every method that learns one task after the other."""
    out = []
    for summary in summarise([t for t in trials if t.sequential]):
        method_trials = [t for t in trials if t.method == summary.method]
        oracle_trials = {t.seed: t for t in trials if t.method == oracle}
        same_seed = [(t, oracle_trials[t.seed]) for t in method_trials if t.seed in oracle_trials]
        oracle_gaps = [gap for trial, best in same_seed if (gap := _last(best, trial)) is not None]
        held_out_losses = [loss for t in method_trials if (loss := _held_out_loss(t)) is not None]
        # A mean over some of the seeds would not be comparable with the other methods'.
        all_gaps_known = bool(method_trials) and len(oracle_gaps) == len(method_trials)
        all_losses_known = bool(held_out_losses) and len(held_out_losses) == len(method_trials)
        out += [
            Claim(summary.method, "loss on earlier tasks (NBT)", summary.values["NBT"], FORGETTING),
            Claim(summary.method, "AVG below the oracle's", over_seeds(oracle_gaps) if all_gaps_known else None, GAP),
            Claim(
                summary.method,
                "loss on held-out tasks against the base",
                over_seeds(held_out_losses) if all_losses_known else None,
                KEEPING,
            ),
        ]
    return out


def _last(first: Trial, second: Trial) -> Interval | None:
    """Mean over tasks of first minus second after the last stage, on the same episodes where both list them."""
    names = first.matrix.tasks
    if {*names} != {*second.matrix.tasks}:
        return None
    ends = [(first.matrix.get(len(names), name), second.matrix.get(len(second.matrix.tasks), name)) for name in names]
    return _mean(ends)


def _held_out_loss(trial: Trial) -> Interval | None:
    matrix = trial.matrix
    return _mean([(matrix.get(0, name), matrix.get(len(matrix.tasks), name)) for name in matrix.held_out])


def _mean(pairs: Sequence[tuple[Cell | None, Cell | None]]) -> Interval | None:
    differences = [difference(one, two) for one, two in pairs if one is not None and two is not None]
    return mean(differences) if differences and len(differences) == len(pairs) else None
