"""The policy against transformers and PEFT themselves: one sequence, two implementations.

The trunk, its masks and the adapters' arithmetic are this project's own for speed, so they are held against the
libraries that wrote the checkpoints and adapters. Pinned: logits, log-probabilities and every adapter's gradient, with
padded prompts, under both masks. Determinism: seeded weights, float32.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.runtime.plain import Plain
from ratchet_vla.adapters.lora.layers import attach, lora_config
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.testing.conformance.swap import noise
from tests.agent.policy import samples


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("placeholders", ["learned", "zero"])
def test_logits_and_gradients_are_the_libraries(attention: str, placeholders: str) -> None:
    policy = samples.policy(attention=attention, placeholders=placeholders)
    lora = attach(policy.module, lora_config(4, 8))
    # A third of the swap tests' adapter: with all of it the logits are so sharp that rounding alone nears the bound.
    lora.load({name: tensor / 3 for name, tensor in noise(lora, policy, 1).tensors.items()})
    plain = Plain(policy)
    batch = samples.batch(policy)
    tokens = policy.predict(batch).tokens
    assert tokens is not None

    def gradients(of: PrismaticPolicy | Plain) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        log_prob, entropy = of.log_prob(batch, tokens, 1.6)
        flat = torch.autograd.grad((log_prob.sin() + entropy).sum(), lora.trainable())
        return log_prob.detach(), entropy.detach(), torch.cat([g.flatten() for g in flat])

    for mine, theirs in zip(gradients(policy), gradients(plain), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


def test_the_straightforward_way_samples_possible_actions() -> None:
    policy = samples.policy()
    batch = samples.batch(policy)
    actions = Plain(policy).sample(batch, 1.0)
    assert actions.shape == (3, 2, 4)
    assert torch.allclose(policy.actions_of(policy.tokens_of(actions)), actions)
