"""PPO is the recipe's actor-critic variant; its value loss and chunk ratios are easy to get subtly wrong.

Pinned: policy and value terms by hand, agreement with an independent float64 reference for both ratio granularities,
gradient parts that sum to the whole, advantage normalisation, the value head and its own learning rate.
Determinism: seeded generators, no environment.
"""

from __future__ import annotations

import math

import pytest
import torch

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.update import grpo, ppo
from ratchet_vla.learner.update.minibatch import Minibatch, flatten
from tests.agent.learner.update import reference


def samples(
    seed: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Minibatch]:
    """7 chunk samples of 4 steps with 3 dimensions; the third has no valid step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    old = -normal(7, 4, 3).abs()
    new = old + 0.2 * normal(7, 4, 3)
    valid = torch.rand(7, 4, generator=generator) > 0.3
    valid[0, 0], valid[2] = True, False
    old_value = 3 * normal(7)
    batch = Minibatch(
        old_log_prob=old, advantage=normal(7), valid=valid, weight=torch.ones(7, dtype=dtype),
        slots=float(valid.any(dim=1).sum()), index=torch.zeros(7, 2, dtype=torch.int64), old_value=old_value,
        returns=old_value + 9 * normal(7),
    )  # fmt: skip
    return new, normal(7, 4, 3).abs(), old_value + 0.4 * normal(7), batch


def single(
    log_ratio: list[list[float]], advantage: float, old_value: float, target: float
) -> tuple[torch.Tensor, Minibatch]:
    old = torch.full((1, len(log_ratio), len(log_ratio[0])), -1.0, dtype=torch.float64)
    batch = Minibatch(
        old_log_prob=old, advantage=torch.tensor([advantage]).double(),
        valid=torch.ones(1, len(log_ratio), dtype=torch.bool), weight=torch.ones(1).double(), slots=1.0,
        index=torch.zeros(1, 2, dtype=torch.int64), old_value=torch.tensor([old_value]).double(),
        returns=torch.tensor([target]).double(),
    )  # fmt: skip
    return (old + torch.tensor([log_ratio]).double()).requires_grad_(), batch


def test_token_and_chunk_ratios_by_hand() -> None:
    # Ratios 1.2 and 1.25: each is inside the clip, their product 1.5 is not.
    new, batch = single([[math.log(1.2)], [math.log(1.25)]], 1.0, 0.0, 0.0)
    value, entropy = torch.zeros(1).double(), torch.zeros_like(new)
    token, figures = ppo.loss(new, entropy, value, batch, ppo.PpoConfig())
    assert token.item() == pytest.approx(-(1.2 + 1.25) / 2)
    assert (figures.terms, figures.clipped) == (2, 0)
    chunk, figures = ppo.loss(new, entropy, value, batch, ppo.PpoConfig(granularity="chunk"))
    assert chunk.item() == pytest.approx(-1.28)
    assert (figures.tokens, figures.terms, figures.clipped) == (2, 1, 1)
    assert figures.ratio_max == pytest.approx(1.5)
    chunk.backward()
    assert new.grad is not None
    assert (new.grad == 0).all()


def test_value_loss_by_hand() -> None:
    # Value moved from 0 to 1, target 3: error -2 gives 2; clipped to 0.2 the error is -2.8, giving 3.92, which counts.
    new, batch = single([[0.0]], 0.0, 0.0, 3.0)
    value = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    loss, figures = ppo.loss(new, torch.zeros_like(new), value, batch, ppo.PpoConfig())
    assert loss.item() == pytest.approx(3.92)
    assert figures.value_loss == pytest.approx(3.92)
    # Target 30: the error is beyond the Huber delta; 10 * (29.8 - 5).
    new, batch = single([[0.0]], 0.0, 0.0, 30.0)
    assert ppo.loss(new, torch.zeros_like(new), value, batch, ppo.PpoConfig())[0].item() == pytest.approx(248.0)
    # Moving away from the target beyond the clip keeps its gradient, moving towards it does not.
    new, batch = single([[0.0]], 0.0, 0.0, -3.0)
    loss, _ = ppo.loss(new, torch.zeros_like(new), value, batch, ppo.PpoConfig())
    (gradient,) = torch.autograd.grad(loss, value)
    assert (loss.item(), gradient.item()) == pytest.approx((8.0, 4.0))


def test_huber_is_continuous_and_linear_beyond_delta() -> None:
    error = torch.tensor([-11.0, -10.0, 0.0, 3.0, 10.0, 20.0], dtype=torch.float64)
    assert ppo.huber(error, 10.0).tolist() == [60.0, 50.0, 0.0, 4.5, 50.0, 150.0]


@pytest.mark.parametrize("granularity", ["token", "chunk"])
@pytest.mark.parametrize("bonus", [0.0, 0.03])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_match_the_reference(granularity: str, bonus: float, seed: int) -> None:
    new, entropy, value, batch = samples(seed)
    config = ppo.PpoConfig(granularity=granularity, entropy_coefficient=bonus, value_coefficient=0.7)  # type: ignore[arg-type]
    variables = [new.requires_grad_(), entropy.requires_grad_(), value.requires_grad_()]
    loss, _ = ppo.loss(new, entropy, value, batch, config)
    gradients = torch.autograd.grad(loss, variables, allow_unused=True, materialize_grads=True)

    def expected(flat: list[float]) -> float:
        x = torch.tensor(flat, dtype=torch.float64)
        n, e, v = x[:84].view(7, 4, 3), x[84:168].view(7, 4, 3), x[168:]
        assert batch.old_value is not None
        assert batch.returns is not None
        return reference.ppo_loss(
            n.tolist(), batch.old_log_prob.tolist(), batch.valid.tolist(), batch.advantage.tolist(), v.tolist(),
            batch.old_value.tolist(), batch.returns.tolist(), e.tolist(), low=0.2, high=0.28,
            per_chunk=granularity == "chunk", value_clip=0.2, delta=10.0, value_coefficient=0.7,
            entropy_coefficient=bonus,
        )  # fmt: skip

    flat = torch.cat([v.detach().flatten() for v in variables]).tolist()
    assert loss.item() == pytest.approx(expected(flat), rel=1e-12)
    numeric = reference.numerical_gradient(expected, flat)
    assert torch.cat([g.flatten() for g in gradients]).tolist() == pytest.approx(numeric, abs=1e-7)


def test_micro_batches_sum_to_the_whole() -> None:
    new, entropy, value, batch = samples(8)
    config = ppo.PpoConfig(entropy_coefficient=0.01)
    whole, _ = ppo.loss(new, entropy, value, batch, config)
    total, start = 0.0, 0
    for part in batch.micro(2):
        rows = slice(start, start + len(part))
        total += ppo.loss(new[rows], entropy[rows], value[rows], part, config)[0].item()
        start += len(part)
    assert total == pytest.approx(whole.item(), rel=1e-12)


def test_targets_normalise_over_the_chunks_that_count() -> None:
    generator = torch.Generator().manual_seed(1)
    present = torch.tensor([[True, True, True], [True, False, False]])
    valid = present[..., None].expand(2, 3, 4).clone()
    valid[0, 1] = False  # a chunk that ran, but not as sampled
    arguments = (
        torch.rand(2, 3, generator=generator, dtype=torch.float64),
        torch.rand(2, 3, generator=generator, dtype=torch.float64),
        present,
        torch.zeros(2).double(),
        torch.tensor([True, True]),
        valid,
    )
    plain = ppo.targets(*arguments, ppo.PpoConfig(normalise_advantage=False))
    scaled = ppo.targets(*arguments, ppo.PpoConfig())
    counted = valid.any(dim=2)
    chosen = plain.advantage[counted]
    torch.testing.assert_close(scaled.advantage[counted], (chosen - chosen.mean()) / (chosen.std() + 1e-8))
    assert scaled.slots == 3
    assert scaled.returns is not None
    assert plain.returns is not None
    torch.testing.assert_close(scaled.returns, plain.returns)
    batch = flatten(scaled, torch.zeros(2, 3, 4, 7), valid, old_value=arguments[1])
    assert batch.index.tolist() == [[0, 0], [0, 2], [1, 0]]
    assert batch.old_value is not None
    assert batch.old_value.tolist() == arguments[1][counted].tolist()


def test_value_head_starts_at_zero_and_learns_at_its_own_rate() -> None:
    torch.manual_seed(0)
    head = ppo.ValueHead(16)
    feature = torch.randn(8, 16, dtype=torch.bfloat16)
    value = head(feature)
    assert value.shape == (8,)
    assert value.dtype == torch.float32
    assert (value == 0).all()
    adapter = torch.nn.Parameter(torch.zeros(3))
    groups = ppo.parameter_groups([adapter], head, 2e-5, ppo.PpoConfig())
    assert [g["lr"] for g in groups] == [2e-5, 3e-3]
    assert sum(len(g["params"]) for g in groups) == 1 + len(list(head.parameters()))

    optimiser = torch.optim.AdamW(groups)
    target = feature.float().sum(dim=1)
    first = torch.nn.functional.mse_loss(head(feature), target).item()
    for _ in range(50):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(head(feature), target).backward()
        optimiser.step()
    assert torch.nn.functional.mse_loss(head(feature), target).item() < 0.2 * first


def test_refusals_name_their_reason() -> None:
    new, entropy, value, batch = samples(0)
    without = Minibatch(batch.old_log_prob, batch.advantage, batch.valid, batch.weight, 1.0, batch.index)
    with pytest.raises(RatchetError) as caught:
        ppo.loss(new, entropy, value, without, ppo.PpoConfig())
    assert caught.value.code == "learner.no_value"
    with pytest.raises(RatchetError) as caught:
        ppo.loss(new, entropy, value[:3], batch, ppo.PpoConfig())
    assert caught.value.code == "learner.bad_shape"
    with pytest.raises(RatchetError) as caught:
        ppo.targets(
            torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[True, False]]), torch.zeros(1), torch.tensor([True]),
            torch.ones(1, 2, 4, dtype=torch.bool), ppo.PpoConfig(),
        )  # fmt: skip
    assert caught.value.code == "learner.bad_mask"
    for name, bad in (
        ("clip_low", 0.0), ("clip_high", 0.0), ("gamma", 1.5), ("lam", -0.1), ("value_clip", 0.0),
        ("huber_delta", 0.0), ("value_coefficient", -1.0), ("value_learning_rate", 0.0),
        ("entropy_coefficient", -1.0), ("granularity", "episode"),
    ):  # fmt: skip
        with pytest.raises(RatchetError) as caught:
            ppo.PpoConfig(**{name: bad})  # type: ignore[arg-type]
        assert caught.value.code == "learner.bad_config"
        assert name in caught.value.what


@pytest.mark.parametrize("estimator", ["grpo", "ppo"])
def test_ascent_makes_the_better_action_likelier(estimator: str) -> None:
    """A two-armed bandit: after a few real sampling rounds the rewarded arm dominates."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(30):
        log_p = torch.log_softmax(logits, 0).detach()
        arm = torch.multinomial(log_p.exp(), 32, replacement=True, generator=generator)
        score, old = (arm == 1).float(), log_p[arm].view(32, 1, 1, 1)
        valid = torch.ones(32, 1, 1, dtype=torch.bool)
        if estimator == "grpo":
            config = grpo.GrpoConfig(horizon=1)
            targets = grpo.targets(score, torch.arange(32) // 8, valid, config)
            if targets.masked_share == 1:
                continue
            batch = flatten(targets, old, valid)
        else:
            zero = torch.zeros(32, 1)
            present, ended = torch.ones(32, 1).bool(), torch.ones(32).bool()
            targets = ppo.targets(score[:, None], zero, present, zero[:, 0], ended, valid, ppo.PpoConfig())
            batch = flatten(targets, old, valid, old_value=zero)
        new = torch.log_softmax(logits, 0)[arm][batch.index[:, 0]].view(-1, 1, 1)
        if estimator == "grpo":
            loss, _ = grpo.loss(new, torch.zeros_like(new), batch, config)
        else:
            loss, _ = ppo.loss(new, torch.zeros_like(new), torch.zeros(len(batch)), batch, ppo.PpoConfig())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert torch.softmax(logits, 0)[1] > 0.85
