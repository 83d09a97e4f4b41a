"""The gate: candidate against active on the same episodes, and a decision with its reasons. Nothing passes unmeasured.

Knows comparisons of two adapters on tasks, exact tests and what they can detect. Knows no simulator, no store and no
wire; `keeper.py` runs the episodes and keeps the decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import stats

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.intervals import Interval
from ratchet_vla.learner.measures.metrics import Cell, difference

Role = Literal["new", "earlier", "held_out"]
Decision = Literal["promote", "hold", "reject"]
CANNOT = "gate.cannot_evaluate"


@dataclass(frozen=True)
class GateConfig:
    """What a candidate must show."""

    episodes: int = 50
    """Initial states per task, the same ones for both; tasks with fewer evaluation states use all they have."""
    draws: int = 1
    """Episodes per initial state, each with noise of its own; more than one needs a temperature. The intervals then
    hold for these states: episodes from one state are more alike than from two."""
    min_episodes: int = 20
    """With fewer episodes on any task the gate holds: a drop could not be seen."""
    allowed_drop: float = 0.05
    """Largest drop on an earlier task, as a share of episodes, at the point estimate."""
    significance: float = 0.05
    """Level of the exact one-sided paired tests. They are not corrected for the number of tasks: the gate errs towards
    blocking."""
    new_task: Literal["better", "not_worse"] = "better"
    """Whether the new task must have improved significantly, or only not fallen."""
    held_out: Literal["report", "hold"] = "hold"
    """What a significant drop on a held-out task does."""
    temperature: float = 0.0
    """Sampling temperature of the evaluation; 0 acts greedily."""
    horizon: int = 0
    """Longest episode in control steps; 0 takes each task's own."""
    seed: int = 0
    """Root of the seeds of sampled actions."""

    def __post_init__(self) -> None:
        for setting, low, high in (
            ("allowed_drop", 0.0, 1.0),
            ("significance", 0.0, 0.5),
            ("temperature", 0.0, math.inf),
        ):
            if not low <= getattr(self, setting) <= high:
                raise RatchetError("gate.bad_config", f"{setting} {getattr(self, setting)} is not in [{low}, {high}]")
        if self.horizon < 0:
            raise RatchetError("gate.bad_config", f"horizon {self.horizon} is negative", fix="0 takes each task's own")
        if self.episodes < 1 or self.min_episodes < 1 or self.draws < 1:
            raise RatchetError("gate.bad_config", "episodes, draws and min_episodes must be at least 1")
        if self.draws > 1 and self.temperature == 0:
            raise RatchetError(
                "gate.bad_config",
                f"{self.draws} draws of greedy episodes are the same episode {self.draws} times",
                fix="set a temperature, or draws to 1",
            )


@dataclass(frozen=True)
class Comparison:
    """Both adapters on one task, on the same initial states and seeds."""

    task: str
    role: Role
    active: Cell
    candidate: Cell

    def __post_init__(self) -> None:
        if not self.active.episodes or self.active.episodes.keys() != self.candidate.episodes.keys():
            raise RatchetError(
                "gate.not_paired",
                "candidate and active were not run on the same episodes",
                where=self.task,
                fix="evaluate both anew with one configuration",
            )

    @property
    def losses(self) -> int:
        """Episodes that the active adapter solved and the candidate did not."""
        return _only_first(self.active.episodes, self.candidate.episodes)

    @property
    def gains(self) -> int:
        """Episodes that the candidate solved and the active adapter did not."""
        return _only_first(self.candidate.episodes, self.active.episodes)

    @property
    def change(self) -> Interval:
        """Candidate's success minus active's, with its paired 95 % interval."""
        return difference(self.candidate, self.active)

    @property
    def p_worse(self) -> float:
        """Exact one-sided McNemar test against "no worse": chance of so many losses among the differing episodes."""
        return sign_test(self.losses, self.gains)

    @property
    def p_better(self) -> float:
        """The same against "no better"."""
        return sign_test(self.gains, self.losses)


def _only_first(first: Mapping[str, bool], second: Mapping[str, bool]) -> int:
    return sum(solved and not second[episode_key] for episode_key, solved in first.items())


def sign_test(more: int, fewer: int) -> float:
    """P(X >= more) for X ~ Binomial(more + fewer, 1/2); 1 where nothing differs. Source: McNemar 1947, exact form."""
    total = more + fewer
    return 1.0 if total == 0 else float(stats.binom.sf(more - 1, total, 0.5))


def power(drop: float, episodes: int, churn: float, significance: float) -> float:
    """Chance that the paired test sees a true drop.

    drop: true loss of success in [0, 1]. churn: chance that an episode turns from failure to success, in [0, 1]; the
    chance of the reverse is drop + churn. Exact: sums over all outcomes of losses and gains.
    """
    chance_of_loss = min(drop + churn, 1.0)
    differing_counts = np.arange(episodes + 1)
    chance_of_count = stats.binom.pmf(differing_counts, episodes, min(chance_of_loss + churn, 1.0))
    share_of_losses = chance_of_loss / (chance_of_loss + churn) if chance_of_loss + churn else 0.0
    detection = 0.0
    # Counts below this chance add less than the digits that are shown.
    for differing in differing_counts[chance_of_count > 1e-12]:
        possible_losses = np.arange(differing + 1)
        is_significant = stats.binom.sf(possible_losses - 1, differing, 0.5) <= significance
        if differing and is_significant.any():
            fewest_losses = possible_losses[is_significant][0]
            detection += float(
                chance_of_count[differing] * stats.binom.sf(fewest_losses - 1, differing, share_of_losses)
            )
    return detection


def detectable_drop(episodes: int, churn: float, significance: float, target_power: float = 0.8) -> float:
    """Smallest drop, in whole points, that the test sees with a chance of `target_power`; 1.0 where none is."""
    for points in range(1, 101):
        if power(points / 100, episodes, churn, significance) >= target_power:
            return points / 100
    return 1.0


@dataclass(frozen=True)
class Reason:
    """One reason of a decision. code: stable; blocks: False where it is only worth knowing."""

    code: str
    text: str
    task: str = ""
    blocks: bool = True


@dataclass(frozen=True)
class GateDecision:
    """promote: measured and fit. hold: not shown to be fit; more episodes or a person decide. reject: shown unfit."""

    decision: Decision
    reasons: tuple[Reason, ...]
    candidate: str
    active: str
    comparisons: tuple[Comparison, ...] = ()
    config: GateConfig = field(default_factory=GateConfig)

    def rows(self) -> list[dict[str, Any]]:
        """One row per task for a table: rates, change with interval, differing episodes, p, detectable drop."""
        rows = []
        for comparison in self.comparisons:
            churn = min(comparison.gains, comparison.losses) / comparison.active.trials
            rows.append(
                {
                    "task": comparison.task,
                    "role": comparison.role,
                    "episodes": comparison.active.trials,
                    "active": comparison.active.rate.estimate,
                    "candidate": comparison.candidate.rate.estimate,
                    "change": comparison.change.estimate,
                    "low": comparison.change.low,
                    "high": comparison.change.high,
                    "losses": comparison.losses,
                    "gains": comparison.gains,
                    "p_worse": comparison.p_worse,
                    "p_better": comparison.p_better,
                    "detectable_drop": detectable_drop(comparison.active.trials, churn, self.config.significance),
                }
            )
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the adapter's card and `--json`."""
        return {
            "decision": self.decision,
            "reasons": [asdict(reason) for reason in self.reasons],
            "candidate": self.candidate,
            "active": self.active,
            "tasks": self.rows(),
            "config": asdict(self.config),
        }


def decide(candidate: str, active: str, comparisons: Sequence[Comparison], config: GateConfig) -> GateDecision:
    """Decide on measured comparisons.

    reject: an earlier task or the new one is significantly worse. hold: an earlier task dropped by more than is allowed
    at the point estimate, a held-out one significantly (as configured), the new task did not improve significantly (as
    configured), or there are too few episodes. promote: none of these.

    Raises:
        RatchetError: gate.no_new_task unless exactly one comparison has the role "new".
    """
    if sum(comparison.role == "new" for comparison in comparisons) != 1:
        raise RatchetError(
            "gate.no_new_task", "a gate decides on exactly one new task", fix="name the task just learned"
        )
    reasons = _Reasons()
    for comparison in comparisons:
        reasons.add(comparison, config)
    decision = reasons.decision
    if decision == "promote":
        new = next(comparison for comparison in comparisons if comparison.role == "new")
        earlier = sum(comparison.role == "earlier" for comparison in comparisons)
        text = f"{new.task} {100 * new.change.estimate:+.0f} points, earlier tasks kept: {earlier}"
        reasons.notes.insert(0, Reason("gate.passed", text, new.task, blocks=False))
    return GateDecision(decision, reasons.in_order(), candidate, active, tuple(comparisons), config)


@dataclass
class _Reasons:
    """Reasons collected task by task. worse: reject. doubts: hold. notes: change nothing."""

    worse: list[Reason] = field(default_factory=list)
    doubts: list[Reason] = field(default_factory=list)
    notes: list[Reason] = field(default_factory=list)

    @property
    def decision(self) -> Decision:
        if self.worse:
            return "reject"
        return "hold" if self.doubts else "promote"

    def in_order(self) -> tuple[Reason, ...]:
        """All reasons, the most serious first."""
        return (*self.worse, *self.doubts, *self.notes)

    def add(self, comparison: Comparison, config: GateConfig) -> None:
        """Collect what one task's comparison has to say."""
        if comparison.active.trials < config.min_episodes:
            text = f"{comparison.active.trials} episodes, at least {config.min_episodes} are needed"
            self.doubts.append(Reason("gate.too_few", text, comparison.task))
        if comparison.role == "held_out":
            self._add_held_out(comparison, config)
        else:
            self._add_learned(comparison, config)

    def _add_held_out(self, comparison: Comparison, config: GateConfig) -> None:
        if comparison.p_worse > config.significance:
            return
        text = f"held-out task significantly worse: {_counts(comparison)}, p {comparison.p_worse:.3f}"
        blocks = config.held_out == "hold"
        reason = Reason("gate.held_out_worse", text, comparison.task, blocks=blocks)
        if blocks:
            self.doubts.append(reason)
        else:
            self.notes.append(reason)

    def _add_learned(self, comparison: Comparison, config: GateConfig) -> None:
        counts = _counts(comparison)
        if comparison.p_worse <= config.significance:
            text = f"significantly worse: {counts}, p {comparison.p_worse:.3f}"
            self.worse.append(Reason(f"gate.{comparison.role}_worse", text, comparison.task))
        # Rounding must not turn a drop of exactly the allowed size into a larger one.
        elif comparison.role == "earlier" and -comparison.change.estimate > config.allowed_drop + 1e-9:
            allowed = f"{100 * config.allowed_drop:.0f} points"
            text = f"dropped by more than {allowed}: {counts}; not significant, measure more"
            self.doubts.append(Reason("gate.earlier_drop", text, comparison.task))
        elif comparison.role == "new" and config.new_task == "better" and comparison.p_better > config.significance:
            text = f"not shown to be better: {counts}, p {comparison.p_better:.3f}"
            self.doubts.append(Reason("gate.new_not_better", text, comparison.task))


def _counts(comparison: Comparison) -> str:
    change = comparison.change
    points = f"{100 * change.estimate:+.0f} points [{100 * change.low:+.0f}, {100 * change.high:+.0f}]"
    return f"{points}, {comparison.losses} lost, {comparison.gains} gained of {comparison.active.trials}"


def cannot_evaluate(candidate: str, active: str, why: str, config: GateConfig) -> GateDecision:
    """Hold, because the comparison could not be made."""
    return GateDecision("hold", (Reason(CANNOT, why),), candidate, active, (), config)


def decision_of(
    stored: Mapping[str, Any], active: str, config: GateConfig | None = None, held_out: Sequence[str] = ()
) -> Decision | None:
    """What a stored decision says about promotion over `active`; None where it does not answer today's question.

    It does not where it was reached against another adapter, under other demands than `config` (not compared if None),
    without one of the `held_out` tasks, or where nothing could be evaluated: what was missing may be there by now.
    """
    decision = stored.get("decision")
    if decision not in ("promote", "hold", "reject") or stored.get("active") != active:
        return None
    if any(reason["code"] == CANNOT for reason in stored.get("reasons", ())):
        return None
    # Cards from before there was a horizon stand for 0, those from before there were draws for 1.
    if config is not None and {"horizon": 0, "draws": 1, **stored.get("config", {})} != asdict(config):
        return None
    if not {*held_out} <= {row["task"] for row in stored.get("tasks", ())}:
        return None
    return decision  # type: ignore[no-any-return]
