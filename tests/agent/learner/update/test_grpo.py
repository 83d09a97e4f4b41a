"""The update is the one place where episodes change weights; a silent slip here costs robot hours, not an exception.

Pinned: loss and gradient computed by hand, against an independent float64 reference, and against the published code
(tests/golden/grpo, through benchmarks/learner/parity_grpo.py); masks at control-step granularity; that the parts of a
minibatch sum to the whole; the diagnostics' definitions. Determinism: seeded generators, no environment.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.learner import parity_grpo
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.update import grpo
from ratchet_vla.learner.update.minibatch import Diagnostics, Minibatch, flatten
from tests.agent.learner.update import reference

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "grpo"


def one_chunk(log_ratio: Tensor, advantage: float, valid: Tensor, weight: float = 1.0) -> tuple[Tensor, Minibatch]:
    """A minibatch of one sample whose (K, D) log-ratio is given."""
    old = torch.full_like(log_ratio, -1.0)[None]
    batch = Minibatch(
        old_log_prob=old, advantage=torch.tensor([advantage], dtype=old.dtype), valid=valid[None],
        weight=torch.tensor([weight], dtype=old.dtype), slots=1.0, index=torch.zeros(1, 2, dtype=torch.int64),
    )  # fmt: skip
    return (old + log_ratio).requires_grad_(), batch


def random_update(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """12 episodes in 3 groups, 4 chunks of 5 steps with 3 dimensions, unequal lengths and holes in the mask."""
    generator = torch.Generator().manual_seed(seed)
    episodes, chunks, steps, dims = 12, 4, 5, 3
    old = -4 * torch.rand(episodes, chunks, steps, dims, generator=generator, dtype=dtype)
    new = old + 0.4 * torch.randn(old.shape, generator=generator, dtype=dtype)
    lengths = torch.randint(1, chunks * steps + 1, (episodes,), generator=generator)
    valid = (torch.arange(chunks * steps)[None] < lengths[:, None]).view(episodes, chunks, steps)
    valid = valid & (torch.rand(valid.shape, generator=generator) > 0.1)
    valid[:, 0, 0] = True
    score = 5.0 * (torch.rand(episodes, generator=generator) < 0.5).to(dtype)
    score[:4] = 0.0
    score[4], score[5], score[8], score[9] = 5.0, 0.0, 5.0, 0.0
    return new, old, valid, score, torch.arange(episodes) // 4


def test_loss_and_gradient_by_hand() -> None:
    # One step, three tokens, A = +2: ratio 1.1 counts, 1.5 is clipped to 1.28, 0.5 counts (the clip never helps it).
    log_ratio = torch.tensor([[math.log(1.1), math.log(1.5), math.log(0.5)]], dtype=torch.float64)
    new, batch = one_chunk(log_ratio, 2.0, torch.tensor([True]))
    loss, diagnostics = grpo.loss(new, torch.ones_like(new), batch, grpo.GrpoConfig())
    assert loss.item() == pytest.approx(-2 * (1.1 + 1.28 + 0.5) / 3)
    loss.backward()
    assert new.grad is not None
    assert new.grad.flatten().tolist() == pytest.approx([-2 * 1.1 / 3, 0.0, -2 * 0.5 / 3])
    figures = diagnostics.means()
    assert figures["clip_fraction"] == pytest.approx(1 / 3)
    assert figures["ratio_mean"] == pytest.approx((1.1 + 1.5 + 0.5) / 3)
    assert figures["ratio_max"] == pytest.approx(1.5)
    assert figures["entropy"] == pytest.approx(1.0)
    k3 = [r - 1 - math.log(r) for r in (1.1, 1.5, 0.5)]
    assert figures["approx_kl"] == pytest.approx(sum(k3) / 3)


def test_loss_by_hand_with_a_negative_advantage() -> None:
    # A = -1: ratio 0.5 is clipped to 0.8, 1.5 counts in full.
    log_ratio = torch.tensor([[math.log(0.5)], [math.log(1.5)]], dtype=torch.float64)
    new, batch = one_chunk(log_ratio, -1.0, torch.tensor([True, True]), weight=4.0)
    loss, diagnostics = grpo.loss(new, torch.zeros_like(new), batch, grpo.GrpoConfig())
    assert loss.item() == pytest.approx(4.0 * (0.8 + 1.5) / 2)
    assert diagnostics.clipped == 1


def test_masked_steps_reach_neither_loss_nor_gradient_even_as_nan() -> None:
    log_ratio = torch.tensor([[0.1], [math.nan], [50.0]], dtype=torch.float64)
    new, batch = one_chunk(log_ratio, 1.0, torch.tensor([True, False, False]))
    loss, diagnostics = grpo.loss(new, torch.full_like(new, math.nan).detach(), batch, grpo.GrpoConfig())
    assert math.isfinite(diagnostics.ratio_max)
    loss.backward()
    assert new.grad is not None
    assert loss.item() == pytest.approx(-math.exp(0.1) / 3)
    assert new.grad.flatten()[1:].tolist() == [0.0, 0.0]
    assert diagnostics.tokens == 1


def test_success_in_the_third_step_of_a_chunk_leaves_three_steps() -> None:
    valid = torch.zeros(2, 2, 8, dtype=torch.bool)
    valid[0, 0], valid[0, 1, :3] = True, True  # success at step 11
    valid[1] = True
    config = grpo.GrpoConfig(horizon=16)
    targets = grpo.targets(torch.tensor([5.0, 0.0]), torch.zeros(2).long(), valid, config)
    assert targets.weight.tolist() == pytest.approx([16 / 11, 1.0])
    assert targets.slots == 2 * 16 / 8
    batch = flatten(targets, torch.zeros(2, 2, 8, 7), valid)
    assert batch.valid.sum(dim=1).tolist() == [8, 3, 8, 8]
    assert batch.index.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("estimator", ["group", "leave_one_out"])
def test_loss_and_gradient_match_the_reference(seed: int, estimator: str) -> None:
    new, old, valid, score, group = random_update(seed)
    config = grpo.GrpoConfig(estimator=estimator, horizon=20 + seed)  # type: ignore[arg-type]
    targets = grpo.targets(score, group, valid, config)
    batch = flatten(targets, old, valid)
    variable = new.clone().requires_grad_()
    gathered = variable[batch.index[:, 0], batch.index[:, 1]]
    loss, _ = grpo.loss(gathered, torch.zeros_like(gathered), batch, config)
    (gradient,) = torch.autograd.grad(loss, variable)

    advantages = (
        reference.group_advantages(score.tolist(), group.tolist(), 1e-6)
        if estimator == "group"
        else reference.leave_one_out(score.tolist(), group.tolist())
    )

    def expected(flat: list[float]) -> float:
        values = torch.tensor(flat, dtype=torch.float64).view(new.shape).tolist()
        return reference.grpo_loss(values, old.tolist(), valid.tolist(), advantages, 0.20, 0.28)

    flat = new.flatten().tolist()
    assert loss.item() == pytest.approx(expected(flat), rel=1e-12)
    if seed == 0:
        numeric = reference.numerical_gradient(expected, flat)
        assert gradient.flatten().tolist() == pytest.approx(numeric, abs=1e-8)


def test_float32_stays_within_tolerance_of_float64() -> None:
    gradients = []
    for dtype in (torch.float32, torch.float64):
        new, old, valid, score, group = random_update(9)
        new, old, score = new.to(dtype), old.to(dtype), score.to(dtype)
        batch = flatten(grpo.targets(score, group, valid, grpo.GrpoConfig()), old, valid)
        variable = new.requires_grad_()
        gathered = variable[batch.index[:, 0], batch.index[:, 1]]
        loss, _ = grpo.loss(gathered, torch.zeros_like(gathered), batch, grpo.GrpoConfig())
        gradients.append(torch.autograd.grad(loss, variable)[0].double())
    worst = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
    assert worst < 1e-5


def test_the_horizon_cancels() -> None:
    losses = []
    for horizon in (20, 512):
        new, old, valid, score, group = random_update(2)
        config = grpo.GrpoConfig(horizon=horizon)
        batch = flatten(grpo.targets(score, group, valid, config), old, valid)
        gathered = new[batch.index[:, 0], batch.index[:, 1]]
        losses.append(grpo.loss(gathered, torch.zeros_like(gathered), batch, config)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_micro_batches_sum_to_the_whole_and_steps_average_to_it() -> None:
    new, old, valid, score, group = random_update(4)
    config = grpo.GrpoConfig()
    batch = flatten(grpo.targets(score, group, valid, config), old, valid)

    def run(part: Minibatch) -> tuple[Tensor, Diagnostics]:
        gathered = new[part.index[:, 0], part.index[:, 1]]
        return grpo.loss(gathered, gathered.abs(), part, config)

    whole, diagnostics = run(batch)
    parts = [run(part) for part in batch.micro(3)]
    assert sum(p[0].item() for p in parts) == pytest.approx(whole.item(), rel=1e-12)
    merged = Diagnostics()
    for _, one in parts:
        merged = merged + one
    assert merged.means() == pytest.approx(diagnostics.means(), rel=1e-12)

    steps = batch.shuffled(4, torch.Generator().manual_seed(0))
    seen = torch.cat([step.index for step in steps])
    assert len(seen) == len(batch)
    assert len({tuple(row) for row in seen.tolist()}) == len(batch)
    assert sum(step.slots for step in steps) == pytest.approx(batch.slots)
    weighted = sum(run(step)[0].item() * step.slots for step in steps) / batch.slots
    assert weighted == pytest.approx(whole.item(), rel=1e-12)


def test_masked_groups_are_counted_and_leave_no_samples() -> None:
    _, old, valid, score, group = random_update(6)
    targets = grpo.targets(score, group, valid, grpo.GrpoConfig())
    assert (targets.groups, targets.masked_groups) == (3, 1)
    assert targets.masked_share == pytest.approx(1 / 3)
    assert (flatten(targets, old, valid).index[:, 0] >= 4).all()


def test_nothing_to_learn_from_is_an_error_not_a_zero() -> None:
    _, old, valid, score, group = random_update(6)
    targets = grpo.targets(torch.zeros_like(score), group, valid, grpo.GrpoConfig())
    with pytest.raises(RatchetError) as caught:
        flatten(targets, old, valid)
    assert caught.value.code == "learner.no_samples"


def test_log_probabilities_that_are_not_finite_are_refused() -> None:
    new, batch = one_chunk(torch.tensor([[math.nan]]), 1.0, torch.tensor([True]))
    with pytest.raises(RatchetError) as caught:
        grpo.loss(new, torch.zeros_like(new), batch, grpo.GrpoConfig())
    assert caught.value.code == "learner.not_finite"


@pytest.mark.parametrize(
    "changes",
    [{"clip_low": 0.0}, {"clip_low": 1.0}, {"clip_high": -1.0}, {"horizon": 0}, {"estimator": "gae"}, {"epsilon": 0.0}],
)
def test_configuration_is_bounded(changes: dict[str, object]) -> None:
    with pytest.raises(RatchetError) as caught:
        grpo.GrpoConfig(**changes)  # type: ignore[arg-type]
    assert caught.value.code == "learner.bad_config"
    assert next(iter(changes)) in str(caught.value)


def test_shapes_are_checked() -> None:
    new, batch = one_chunk(torch.zeros(2, 3), 1.0, torch.tensor([True, True]))
    for call in (
        lambda: grpo.loss(new[..., :2], new[..., :2], batch, grpo.GrpoConfig()),
        lambda: grpo.targets(torch.zeros(3), torch.zeros(3).long(), torch.zeros(2, 1, 1).bool(), grpo.GrpoConfig()),
        lambda: grpo.targets(torch.zeros(3), torch.zeros(3).long(), torch.zeros(3, 1).bool(), grpo.GrpoConfig()),
        lambda: Minibatch(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3).bool(), torch.zeros(2), 1.0, new),
    ):
        with pytest.raises(RatchetError) as caught:
            call()
        assert caught.value.code == "learner.bad_shape"


def test_parity_with_the_published_code() -> None:
    errors = parity_grpo.compare(GOLDEN)
    assert set(errors) == {"advantages", "mask", "valid_steps", "loss", "gradient"}
    assert max(errors.values()) < parity_grpo.GOAL


def test_parity_benchmark_writes_json_and_fails_on_a_miss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert parity_grpo.main([str(GOLDEN), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("parity_grpo: worst relative error")
    assert json.loads(output.read_text())["worst"] < parity_grpo.GOAL

    tensors = load_file(GOLDEN / "grpo.safetensors")
    tensors["loss"] = tensors["loss"] * 1.001
    save_file(tensors, tmp_path / "grpo.safetensors")
    (tmp_path / "grpo.json").write_text((GOLDEN / "grpo.json").read_text())
    assert parity_grpo.main([str(tmp_path), "--output", str(output)]) == 1
    assert parity_grpo.main([str(tmp_path / "absent"), "--output", str(output)]) == 1
    assert "parity.missing_file" in capsys.readouterr().err
