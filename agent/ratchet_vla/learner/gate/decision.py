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
        for name, low, high in (("allowed_drop", 0.0, 1.0), ("significance", 0.0, 0.5), ("temperature", 0.0, math.inf)):
            if not low <= getattr(self, name) <= high:
                raise RatchetError("gate.bad_config", f"{name} {getattr(self, name)} is not in [{low}, {high}]")
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
        return sum(ok and not self.candidate.episodes[k] for k, ok in self.active.episodes.items())

    @property
    def gains(self) -> int:
        """Episodes that the candidate solved and the active adapter did not."""
        return sum(ok and not self.active.episodes[k] for k, ok in self.candidate.episodes.items())

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


def sign_test(more: int, fewer: int) -> float:
    """P(X >= more) for X ~ Binomial(more + fewer, 1/2); 1 where nothing differs. Source: McNemar 1947, exact form."""
    total = more + fewer
    return 1.0 if total == 0 else float(stats.binom.sf(more - 1, total, 0.5))


def power(drop: float, episodes: int, churn: float, significance: float) -> float:
    """Chance that the paired test sees a true drop.

    drop: true loss of success in [0, 1]. churn: chance that an episode turns from failure to success, in [0, 1]; the
    chance of the reverse is drop + churn. Exact: sums over all outcomes of losses and gains.
    """
    worse = min(drop + churn, 1.0)
    total = np.arange(episodes + 1)
    differing = stats.binom.pmf(total, episodes, min(worse + churn, 1.0))
    share = worse / (worse + churn) if worse + churn else 0.0
    seen = 0.0
    for n in total[differing > 1e-12]:
        # Fewest losses among n differing episodes that the test calls significant.
        losses = np.arange(n + 1)
        flagged = stats.binom.sf(losses - 1, n, 0.5) <= significance
        if n and flagged.any():
            seen += float(differing[n] * stats.binom.sf(losses[flagged][0] - 1, n, share))
    return seen


def detectable_drop(episodes: int, churn: float, significance: float, wanted: float = 0.8) -> float:
    """Smallest drop, in whole points, that the test sees with the wanted chance; 1.0 where none is."""
    for points in range(1, 101):
        if power(points / 100, episodes, churn, significance) >= wanted:
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
        for c in self.comparisons:
            churn = min(c.gains, c.losses) / c.active.trials
            rows.append(
                {
                    "task": c.task,
                    "role": c.role,
                    "episodes": c.active.trials,
                    "active": c.active.rate.estimate,
                    "candidate": c.candidate.rate.estimate,
                    "change": c.change.estimate,
                    "low": c.change.low,
                    "high": c.change.high,
                    "losses": c.losses,
                    "gains": c.gains,
                    "p_worse": c.p_worse,
                    "p_better": c.p_better,
                    "detectable_drop": detectable_drop(c.active.trials, churn, self.config.significance),
                }
            )
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the adapter's card and `--json`."""
        return {
            "decision": self.decision,
            "reasons": [asdict(r) for r in self.reasons],
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
    if sum(c.role == "new" for c in comparisons) != 1:
        raise RatchetError(
            "gate.no_new_task", "a gate decides on exactly one new task", fix="name the task just learned"
        )
    worse: list[Reason] = []
    doubts: list[Reason] = []
    notes: list[Reason] = []
    for c in comparisons:
        change = f"{100 * c.change.estimate:+.0f} points [{100 * c.change.low:+.0f}, {100 * c.change.high:+.0f}]"
        counts = f"{change}, {c.losses} lost, {c.gains} gained of {c.active.trials}"
        significant = c.p_worse <= config.significance
        if c.active.trials < config.min_episodes:
            text = f"{c.active.trials} episodes, at least {config.min_episodes} are needed"
            doubts.append(Reason("gate.too_few", text, c.task))
        if c.role == "held_out":
            if significant:
                text = f"held-out task significantly worse: {counts}, p {c.p_worse:.3f}"
                reason = Reason("gate.held_out_worse", text, c.task, blocks=config.held_out == "hold")
                (doubts if reason.blocks else notes).append(reason)
            continue
        if significant:
            worse.append(Reason(f"gate.{c.role}_worse", f"significantly worse: {counts}, p {c.p_worse:.3f}", c.task))
        elif c.role == "earlier" and -c.change.estimate > config.allowed_drop + 1e-9:
            text = (
                f"dropped by more than {100 * config.allowed_drop:.0f} points: {counts}; not significant, measure more"
            )
            doubts.append(Reason("gate.earlier_drop", text, c.task))
        elif c.role == "new" and config.new_task == "better" and c.p_better > config.significance:
            doubts.append(
                Reason("gate.new_not_better", f"not shown to be better: {counts}, p {c.p_better:.3f}", c.task)
            )
    decision: Decision = "reject" if worse else "hold" if doubts else "promote"
    if decision == "promote":
        new = next(c for c in comparisons if c.role == "new")
        earlier = sum(c.role == "earlier" for c in comparisons)
        text = f"{new.task} {100 * new.change.estimate:+.0f} points, earlier tasks kept: {earlier}"
        notes.insert(0, Reason("gate.passed", text, new.task, blocks=False))
    return GateDecision(decision, (*worse, *doubts, *notes), candidate, active, tuple(comparisons), config)


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
