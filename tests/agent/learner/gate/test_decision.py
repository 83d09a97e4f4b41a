"""The gate decides what a robot runs tomorrow: one wrong comparison promotes an adapter that forgot something.

Pinned: exact tests against numbers worked out by hand and by enumeration of all outcomes, each reason for reject,
hold and promote, refusal of unpaired results; whatever the outcomes, a promoted candidate has no earlier task that
dropped by more than is allowed. Determinism: no random numbers but hypothesis's own.
"""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.gate.decision import (
    Comparison,
    GateConfig,
    GateDecision,
    Role,
    cannot_evaluate,
    decide,
    decision_of,
    detectable_drop,
    power,
    sign_test,
)
from ratchet_vla.learner.measures.metrics import Cell


def pair(role: Role, both: int, lost: int, gained: int, neither: int, task: str = "") -> Comparison:
    """A comparison with these counts of episodes."""
    active = [True] * (both + lost) + [False] * (gained + neither)
    candidate = [True] * both + [False] * lost + [True] * gained + [False] * neither
    cells = [Cell.of({f"state-{i}": ok for i, ok in enumerate(side)}) for side in (active, candidate)]
    return Comparison(task or role, role, *cells)


NEW = pair("new", 20, 0, 20, 10)


def codes(decided: GateDecision) -> set[str]:
    return {r.code for r in decided.reasons if r.blocks}


def test_sign_test_by_hand() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == pytest.approx(1 / 32)
    assert sign_test(4, 1) == pytest.approx((5 + 1) / 32)
    assert sign_test(0, 5) == 1.0


@pytest.mark.parametrize(("drop", "churn"), [(0.0, 0.1), (0.3, 0.0), (0.2, 0.15)])
def test_power_is_the_sum_over_all_outcomes(drop: float, churn: float) -> None:
    n, level = 12, 0.05
    lost, gained = drop + churn, churn
    expected = 0.0
    for b, c in itertools.product(range(n + 1), repeat=2):
        if b + c <= n and sign_test(b, c) <= level and b + c > 0:
            rest = n - b - c
            ways = math.factorial(n) // (math.factorial(b) * math.factorial(c) * math.factorial(rest))
            expected += ways * lost**b * gained**c * (1 - lost - gained) ** rest
    assert power(drop, n, churn, level) == pytest.approx(expected, abs=1e-9)


def test_what_can_be_seen_grows_with_the_episodes() -> None:
    drops = [detectable_drop(n, 0.05, 0.05) for n in (20, 50, 200)]
    assert drops == sorted(drops, reverse=True)
    assert drops[0] > drops[2]
    assert power(0.0, 50, 0.1, 0.05) <= 0.05  # an equal candidate is called worse no more often than the level says


def test_promote() -> None:
    decided = decide("c", "a", [NEW, pair("earlier", 40, 1, 1, 8), pair("held_out", 5, 1, 3, 41)], GateConfig())
    assert decided.decision == "promote"
    assert [r.code for r in decided.reasons] == ["gate.passed"]


@pytest.mark.parametrize(
    ("comparisons", "decision", "code"),
    [
        ([NEW, pair("earlier", 30, 10, 1, 9)], "reject", "gate.earlier_worse"),
        ([pair("new", 20, 9, 0, 21)], "reject", "gate.new_worse"),
        ([NEW, pair("earlier", 40, 4, 1, 5)], "hold", "gate.earlier_drop"),  # -6 points, not significant
        ([pair("new", 20, 3, 6, 21)], "hold", "gate.new_not_better"),
        ([NEW, pair("held_out", 20, 12, 0, 18)], "hold", "gate.held_out_worse"),
        ([NEW, pair("earlier", 9, 0, 0, 1)], "hold", "gate.too_few"),
    ],
)
def test_every_reason_to_block(comparisons: list[Comparison], decision: str, code: str) -> None:
    decided = decide("c", "a", comparisons, GateConfig())
    assert decided.decision == decision
    assert code in codes(decided)


def test_what_the_configuration_changes() -> None:
    held_out = [NEW, pair("held_out", 20, 12, 0, 18)]
    assert decide("c", "a", held_out, GateConfig(held_out="report")).decision == "promote"
    equal = [pair("new", 20, 3, 3, 24)]
    assert decide("c", "a", equal, GateConfig(new_task="not_worse")).decision == "promote"
    allowed = [NEW, pair("earlier", 40, 4, 1, 5)]
    assert decide("c", "a", allowed, GateConfig(allowed_drop=0.06)).decision == "promote"


def test_a_drop_of_exactly_what_is_allowed_passes() -> None:
    twenty = [pair("new", 5, 0, 10, 5), pair("earlier", 15, 1, 0, 4)]  # -1 of 20 = -5 points
    assert decide("c", "a", twenty, GateConfig()).decision == "promote"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 25)] * 4).filter(lambda c: sum(c) >= 1), min_size=1, max_size=4))
def test_nothing_promoted_has_dropped(counts: list[tuple[int, int, int, int]]) -> None:
    config = GateConfig()
    earlier = [pair("earlier", *c, task=f"t{i}") for i, c in enumerate(counts)]
    decided = decide("c", "a", [NEW, *earlier], config)
    if decided.decision == "promote":
        for c in earlier:
            assert c.active.trials >= config.min_episodes
            assert c.candidate.rate.estimate >= c.active.rate.estimate - config.allowed_drop - 1e-9
            assert c.p_worse > config.significance
    else:
        assert codes(decided)


def test_unpaired_results_are_refused() -> None:
    with pytest.raises(RatchetError) as refused:
        Comparison("t", "new", Cell.of({"state-1": True}), Cell.of({"state-2": True}))
    assert refused.value.code == "gate.not_paired"
    with pytest.raises(RatchetError) as refused:
        decide("c", "a", [pair("earlier", 1, 0, 0, 0)], GateConfig())
    assert refused.value.code == "gate.no_new_task"
    with pytest.raises(RatchetError) as refused:
        GateConfig(allowed_drop=-0.1)
    assert refused.value.code == "gate.bad_config"
    with pytest.raises(RatchetError, match="the same episode 3 times") as refused:
        GateConfig(draws=3)
    assert refused.value.code == "gate.bad_config"


def test_a_stored_verdict_counts_only_against_the_adapter_it_was_reached_against() -> None:
    stored = decide("c", "a", [NEW], GateConfig()).as_dict()
    assert decision_of(stored, "a") == "promote"
    assert decision_of(stored, "other") is None
    assert decision_of({}, "a") is None


def test_a_stored_verdict_counts_only_for_the_question_that_is_asked() -> None:
    stored = decide("c", "a", [NEW, pair("held_out", 20, 0, 0, 30, task="h")], GateConfig()).as_dict()
    assert decision_of(stored, "a", GateConfig(), ["h"]) == "promote"
    assert decision_of(stored, "a", GateConfig(), ["another"]) is None
    assert decision_of(stored, "a", GateConfig(allowed_drop=0.0)) is None
    assert decision_of(stored, "a", GateConfig(horizon=200)) is None
    assert decision_of(stored, "a", GateConfig(draws=2, temperature=1.0)) is None
    # Cards written before the gate knew horizons and draws mean each task's own, and one.
    old = {**stored, "config": {k: v for k, v in stored["config"].items() if k not in ("horizon", "draws")}}
    assert decision_of(old, "a", GateConfig()) == "promote"
    assert decision_of(old, "a", GateConfig(horizon=200)) is None
    # What was missing may be there by now: a hold for that reason is measured again.
    missing = cannot_evaluate("c", "a", "no simulator", GateConfig())
    assert missing.decision == "hold"
    assert decision_of(missing.as_dict(), "a", GateConfig()) is None
