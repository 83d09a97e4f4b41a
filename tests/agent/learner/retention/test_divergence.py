"""A term that holds the wrong thing, or nothing, looks like one that works: skills go, and no number says so.

Pinned: the divergence of a policy from itself is zero and has no gradient to speak of; from another it equals what a
closed form computes from the policy's public answers alone, for both kinds of policy; a policy without probabilities is
refused. Determinism: fixed weights and seeds.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ratchet_vla.adapters.lora.layers import Lora, attach, lora_config
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.retention.divergence import divergence_of
from ratchet_vla.policy.flow.policy import FlowPolicy
from tests.agent.learner.retention.samples import decisions
from tests.agent.learner.runs import tiny_policy, tiny_with_adapter
from tests.agent.policy import samples

ROWS = np.arange(6)


def moved(lora: Lora, size: float = 0.3) -> None:
    """Give the adapter an effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora.trainable():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def test_a_categorical_policy_does_not_differ_from_itself() -> None:
    policy, lora = tiny_with_adapter()
    data = decisions(policy)
    divergence = divergence_of(policy)
    targets = divergence.targets(data.policy_input(ROWS), data.sampled_at(ROWS))
    loss = divergence.loss(data.policy_input(ROWS), data.sampled_at(ROWS), targets, torch.Generator())
    loss.backward()
    assert abs(float(loss.detach())) < 1e-3  # targets are float16
    moved(lora)
    other = divergence.loss(data.policy_input(ROWS), data.sampled_at(ROWS), targets, torch.Generator())
    assert float(other.detach()) > 1e-2


def test_a_categorical_divergence_is_the_closed_form() -> None:
    policy, lora = tiny_with_adapter()
    data = decisions(policy)
    before = policy.logits(data.policy_input(ROWS)).detach()
    divergence = divergence_of(policy)
    targets = divergence.targets(data.policy_input(ROWS), data.sampled_at(ROWS))
    moved(lora)
    after = policy.logits(data.policy_input(ROWS)).detach()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=before), torch.distributions.Categorical(logits=after)
    ).mean()
    loss = divergence.loss(data.policy_input(ROWS), data.sampled_at(ROWS), targets, torch.Generator())
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-2)


def test_a_flow_divergence_is_that_of_its_gaussian_steps() -> None:
    """The mean over many draws of a step against the sum over all steps, by torch's own Gaussian divergence."""
    policy: FlowPolicy = samples.flow()
    lora = attach(policy.module, lora_config(4, 4.0))
    data = decisions(policy)
    divergence = divergence_of(policy)
    targets = divergence.targets(data.policy_input(ROWS), data.sampled_at(ROWS))
    chain = data.sampled_at(ROWS)
    steps = policy.config.sample_steps

    def means() -> list[torch.Tensor]:
        velocity = policy.velocity(policy.prefix(data.policy_input(ROWS)))
        out = []
        for i in range(steps):
            t = 1 - i / steps
            s = policy.config.noise_level * math.sqrt(min(t, 1 - 1 / steps) / (1 - min(t, 1 - 1 / steps)))
            v = velocity(chain[:, i], torch.full((len(ROWS),), t)).detach()
            out.append(chain[:, i] - (v + s * s / (2 * t) * (chain[:, i] + (1 - t) * v)) / steps)
        return out

    before = means()
    moved(lora)
    after = means()
    expected = torch.zeros(len(ROWS))
    for i in range(steps):
        t = min(1 - i / steps, 1 - 1 / steps)
        variance = policy.config.noise_level**2 * t / (1 - t) / steps
        correlation = torch.full((policy.config.horizon,) * 2, policy.config.shock_correlation).fill_diagonal_(1.0)
        first, second = (
            torch.distributions.MultivariateNormal(m[i].transpose(1, 2), variance * correlation)
            for m in (before, after)
        )
        expected += torch.distributions.kl_divergence(first, second).sum(1)
    tokens = policy.spec.chunk * len(policy.spec.action_names)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        float(divergence.loss(data.policy_input(ROWS), chain, targets, generator).detach()) for _ in range(40 * steps)
    ]
    assert np.mean(drawn) == pytest.approx(float(expected.mean()) / tokens, rel=0.15)


def test_a_policy_without_probabilities_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    monkeypatch.setattr(type(policy), "gives_probabilities", False)
    with pytest.raises(RatchetError) as refused:
        divergence_of(policy)
    assert refused.value.code == "learn.cannot_retain"
