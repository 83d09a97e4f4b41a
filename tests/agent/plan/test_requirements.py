"""The plan of an update's memory against what the real modules keep, and its way of saying what fits.

The path matters because people rent cards by it. Pinned: the coefficients against bytes counted on the modules, counts
against known ones, the goal of 7 billion weights on one 24 GB card on paper, recomputation with equal gradients and
less kept, and the command. Determinism: counting, no clocks.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from benchmarks.science import plan_coefficients
from ratchet_vla.adapters.lora.layers import attach, lora_config
from ratchet_vla.cli.main import main
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.update.step import UpdateConfig, Updater
from ratchet_vla.plan import requirements as plan
from ratchet_vla.policy.flow.network import FlowNetwork
from ratchet_vla.policy.presets import openvla_oft_7b
from ratchet_vla.testing.conformance.policy import uniform
from tests.agent.policy import samples

BASE = openvla_oft_7b("bidirectional")


def test_the_trunk_keeps_what_the_plan_says() -> None:
    config, rank = plan_coefficients.sized(1024, 1536, 3), 8
    many, _ = plan_coefficients.kept(config, rank, 88)
    few, _ = plan_coefficients.kept(config, rank, 24)
    layers = plan.kept_trunk(config, 64, rank)
    # The last layer runs the asked positions alone, so it keeps less per further token.
    whole = layers * (config.layers - 1) / config.layers
    assert whole < many - few < layers


def test_counts_are_the_models() -> None:
    base, adapter = plan.count(BASE, 32, adapt_vision=True)
    assert base == pytest.approx(7.5e9, rel=0.01)
    assert adapter == pytest.approx(109e6, rel=0.02)
    assert plan.count(BASE, 32, adapt_vision=False)[1] < adapter


def test_seven_billion_weights_train_on_one_24_gb_card_on_paper() -> None:
    made = plan.make(BASE, plan.Options(checkpointing=True, batch=4))
    assert made.gpu < 24e9
    assert made.fits == {"24 GB": True, "48 GB": True, "80 GB": True}
    large = plan.make(BASE, plan.Options(batch=8))
    assert large.fits == {"24 GB": False, "48 GB": True, "80 GB": True}
    milder = plan.smallest(BASE, plan.Options(batch=8), 24e9)
    assert milder is not None
    assert milder.checkpointing
    assert plan.smallest(BASE, plan.Options(), 5e9) is None


@pytest.mark.parametrize(
    ("change", "field", "less"),
    [
        ({"batch": 16}, "activations", False),
        ({"checkpointing": True}, "activations", True),
        ({"adapt_vision": False}, "activations", True),
        ({"base_bits": 8}, "weights", True),
        ({"rank": 64}, "optimiser", False),
        ({"adapt_vision": False}, "host", False),
    ],
)
def test_every_option_moves_what_it_is_for(change: dict[str, object], field: str, less: bool) -> None:
    before = plan.make(BASE, plan.Options())
    after = plan.make(BASE, dataclasses.replace(plan.Options(), **change))  # type: ignore[arg-type]
    assert (getattr(after, field) < getattr(before, field)) == less
    assert getattr(after, field) != getattr(before, field)


def test_recomputing_keeps_less_and_changes_no_gradient() -> None:
    def gradients(on: bool) -> tuple[list[torch.Tensor], int]:
        policy = samples.policy(layers=4)
        lora = attach(policy.module, lora_config(2, 2))
        Updater(policy, lora.trainable(), UpdateConfig(checkpointing=on), torch.Generator())
        for p in lora.trainable():
            p.data.normal_(generator=torch.Generator().manual_seed(0))
        kept: dict[int, int] = {}
        alive = []

        def save(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        batch = samples.batch(policy)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            log_prob, _ = policy.log_prob(batch, torch.full((3, 2, 4), 7), 1.0)
        total = sum(kept.values())
        log_prob.sum().backward()
        return [p.grad for p in lora.trainable() if p.grad is not None], total

    plain, much = gradients(False)
    again, little = gradients(True)
    assert len(plain) == len(again) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert little < 0.8 * much


def test_a_flow_keeps_what_the_plan_says() -> None:
    """Both stacks and all steps, with memory joined to every layer, at sizes that gave no coefficient."""
    config, rank = plan_coefficients.flow_sized(), 16
    measured, predicted = plan_coefficients.flow_check(config, rank)
    assert predicted == pytest.approx(measured, rel=0.02)
    # Recomputing keeps one layer and one step at a time.
    less = plan.make(config, plan.Options(batch=4, checkpointing=True)).activations
    assert less < 0.6 * plan.make(config, plan.Options(batch=4)).activations


@pytest.mark.parametrize("changes", [{}, {"crossed": 2, "order": "causal", "state": "prefix"}])
def test_a_flow_that_recomputes_has_the_same_gradient(changes: dict[str, Any]) -> None:
    policy = samples.flow(**changes)
    lora = attach(policy.module, lora_config(2, 2))
    batch = samples.batch(policy)
    chain = policy.sample(batch, 1.0, uniform(policy, 3)).tokens
    assert chain is not None

    def gradients(recompute: bool) -> tuple[list[torch.Tensor], int]:
        policy.network.set_checkpointing(recompute)
        policy.network.zero_grad()
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            total = policy.log_prob(batch, chain, 1.0)[0].sum()
        total.backward()
        return [p.grad.clone() for p in lora.trainable() if p.grad is not None], sum(kept.values())

    plain, much = gradients(False)
    again, little = gradients(True)
    assert len(plain) == len(again) > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))
    assert little < 0.7 * much


@pytest.mark.parametrize(("base", "weights", "card"), [("pi0", 3.2e9, "24 GB"), ("smolvla", 0.4e9, "24 GB")])
def test_flow_bases_are_planned(base: str, weights: float, card: str) -> None:
    made = plan.make(plan.bases()[base], plan.Options(batch=4, images=2))
    assert made.parameters == pytest.approx(weights, rel=0.1)
    assert made.fits[card]
    frozen = plan.make(plan.bases()[base], plan.Options(batch=4, images=2, adapt_vision=False))
    assert frozen.activations < made.activations
    assert frozen.host > made.host
    policy = samples.flow()
    tokens = policy.prefix(samples.batch(policy)).seen.shape[1]
    prompt = tokens - 4  # an image of 32 pixels in patches of 16
    assert plan.make(policy.config, plan.Options(prompt=prompt)).tokens == tokens


def test_a_policy_that_cannot_recompute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FlowNetwork, "set_checkpointing")
    policy = samples.flow()
    lora = attach(policy.module, lora_config(2, 2))
    with pytest.raises(RatchetError) as refused:
        Updater(policy, lora.trainable(), UpdateConfig(checkpointing=True), torch.Generator())
    assert refused.value.code == "learner.no_checkpointing"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--options.checkpointing", "--options.batch", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]["24 GB"] is True
    assert found["gpu"] < 24e9
    assert main(["plan"]) == 0
    shown = capsys.readouterr().out
    assert "24 GB: fits with checkpointing True" in shown
    assert "not measured" in shown
    assert main(["plan", "--base", "gpt"]) == 2
    assert main(["plan", "--options.rank", "0"]) == 2
