"""Advantages decide the sign and size of every gradient; a wrong sign trains the robot to fail and nothing else shows.

Pinned: values computed by hand, agreement with a float64 reference written with loops, that groups without a contrast
get exactly zero, the bootstrapping rules of GAE at an episode's end, and that padding never leaks into an advantage.
Determinism: seeded generators; no clock, no environment.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.update.advantages import GroupAdvantage, gae, group_normalised, leave_one_out
from tests.agent.learner.update import reference


def test_group_normalised_by_hand() -> None:
    # Scores 5, 0, 0, 0: mean 1.25, unbiased variance (3.75^2 + 3 * 1.25^2) / 3 = 6.25, deviation 2.5.
    result = group_normalised(torch.tensor([5.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(result.advantage, torch.tensor([1.5, -0.5, -0.5, -0.5]))
    assert result.keep.all()
    assert (result.groups, result.masked_groups) == (1, 0)


def test_leave_one_out_by_hand() -> None:
    # 5 against the mean of (0, 0, 5) = 5/3; 0 against the mean of (5, 0, 5) = 10/3.
    result = leave_one_out(torch.tensor([5.0, 0, 0, 5]), torch.full((4,), 7))
    torch.testing.assert_close(result.advantage, torch.tensor([10 / 3, -10 / 3, -10 / 3, 10 / 3]))


@pytest.mark.parametrize("estimator", [group_normalised, leave_one_out])
def test_groups_without_contrast_are_masked_exactly(
    estimator: Callable[[torch.Tensor, torch.Tensor], GroupAdvantage],
) -> None:
    score = torch.tensor([0.0, 0, 0, 0.1, 0.1, 0.1, 0, 5, 0, 3])
    group = torch.tensor([0, 0, 0, 4, 4, 4, 9, 9, 9, 2])  # all failure, all equal, mixed, alone
    result = estimator(score, group)
    assert result.keep.tolist() == [False] * 6 + [True] * 3 + [False]
    assert (result.advantage[~result.keep] == 0).all()
    assert (result.groups, result.masked_groups) == (4, 3)


scores_and_groups = st.lists(st.tuples(st.sampled_from([0.0, 1.0, 5.0]), st.integers(0, 4)), min_size=1, max_size=24)


@given(scores_and_groups)
@settings(max_examples=150, deadline=None)
def test_group_estimators_match_the_reference(pairs: list[tuple[float, int]]) -> None:
    scores, groups = [p[0] for p in pairs], [p[1] for p in pairs]
    score, group = torch.tensor(scores, dtype=torch.float64), torch.tensor(groups)
    for result, expected in (
        (group_normalised(score, group, 1e-6), reference.group_advantages(scores, groups, 1e-6)),
        (leave_one_out(score, group), reference.leave_one_out(scores, groups)),
    ):
        assert result.keep.tolist() == [x is not None for x in expected]
        assert result.advantage.tolist() == pytest.approx([x or 0.0 for x in expected], abs=1e-12)


def test_order_of_episodes_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    score = torch.rand(24, generator=generator, dtype=torch.float64)
    group = torch.arange(24) % 3
    order = torch.randperm(24, generator=generator)
    whole, shuffled = group_normalised(score, group), group_normalised(score[order], group[order])
    torch.testing.assert_close(shuffled.advantage, whole.advantage[order])


def test_gae_by_hand() -> None:
    # Two chunks, success in the second: delta_1 = 5 - 2 = 3; delta_0 = 0 + 0.5 * 2 - 1 = 0; A_0 = 0 + 0.25 * 3.
    advantage, returns = gae(
        torch.tensor([[0.0, 5]]), torch.tensor([[1.0, 2]]), torch.ones(1, 2, dtype=torch.bool),
        torch.tensor([100.0]), torch.tensor([True]), gamma=0.5, lam=0.5,
    )  # fmt: skip
    torch.testing.assert_close(advantage, torch.tensor([[0.75, 3.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.75, 5.0]]))


def test_gae_bootstraps_only_where_cut_off() -> None:
    reward, value = torch.zeros(2, 1), torch.full((2, 1), 0.5)
    present = torch.ones(2, 1, dtype=torch.bool)
    advantage, _ = gae(reward, value, present, torch.tensor([2.0, 2.0]), torch.tensor([False, True]), gamma=0.9)
    torch.testing.assert_close(advantage, torch.tensor([[0.9 * 2 - 0.5], [-0.5]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae_matches_the_reference_and_ignores_padding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    lengths = [1, 4, 9, 6]
    chunks = max(lengths)
    reward = torch.rand(4, chunks, generator=generator, dtype=torch.float64)
    value = torch.randn(4, chunks, generator=generator, dtype=torch.float64)
    final = torch.randn(4, generator=generator, dtype=torch.float64)
    terminated = torch.tensor([True, False, False, True])
    present = torch.arange(chunks)[None] < torch.tensor(lengths)[:, None]
    dirty_reward, dirty_value = reward.clone(), value.clone()
    dirty_reward[~present], dirty_value[~present] = math.nan, math.inf
    dirty_final = torch.where(terminated, math.nan, final)
    advantage, returns = gae(
        dirty_reward.to(dtype), dirty_value.to(dtype), present, dirty_final.to(dtype), terminated, gamma=0.99, lam=0.95
    )
    assert (advantage[~present] == 0).all()
    assert (returns[~present] == 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for e, length in enumerate(lengths):
        after = 0.0 if terminated[e] else float(final[e])
        want_a, want_r = reference.gae_explicit(
            reward[e, :length].tolist(), value[e, :length].tolist(), after, 0.99, 0.95
        )
        assert advantage[e, :length].tolist() == pytest.approx(want_a, rel=tolerance, abs=tolerance)
        assert returns[e, :length].tolist() == pytest.approx(want_r, rel=tolerance, abs=tolerance)


def test_gae_with_lambda_one_is_the_return_and_with_zero_the_one_step_error() -> None:
    generator = torch.Generator().manual_seed(5)
    reward = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    value = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    present, ended = torch.ones(3, 5, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    _, returns = gae(reward, value, present, torch.zeros(3).double(), ended, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, reward.flip(1).cumsum(1).flip(1))
    advantage, _ = gae(reward, value, present, torch.zeros(3).double(), ended, gamma=1.0, lam=0.0)
    torch.testing.assert_close(advantage[:, :-1], (reward + value.roll(-1, 1) - value)[:, :-1])


def test_refusals_name_their_reason() -> None:
    ok = torch.ones(1, 3, dtype=torch.bool)
    zeros, end = torch.zeros(1, 3), torch.tensor([True])
    gap = torch.tensor([[True, False, True]])
    for code, call in (
        ("learner.bad_mask", lambda: gae(zeros, zeros, gap, torch.zeros(1), end)),
        ("learner.bad_mask", lambda: gae(zeros, zeros, ~ok, torch.zeros(1), end)),
        ("learner.bad_mask", lambda: gae(zeros, zeros, ok.float(), torch.zeros(1), end)),
        ("learner.bad_shape", lambda: gae(zeros, torch.zeros(1, 2), ok, torch.zeros(1), end)),
        ("learner.bad_shape", lambda: gae(torch.zeros(3), zeros, ok, torch.zeros(1), end)),
        ("learner.not_finite", lambda: gae(zeros * math.nan, zeros, ok, torch.zeros(1), end)),
        ("learner.not_finite", lambda: group_normalised(torch.tensor([math.nan, 1]), torch.zeros(2).long())),
        ("learner.bad_shape", lambda: leave_one_out(torch.zeros(3), torch.zeros(2).long())),
    ):
        with pytest.raises(RatchetError) as caught:
            call()
        assert caught.value.code == code
