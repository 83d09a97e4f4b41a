"""The check that tells a wrong attention mask, on policies trained for a moment under each.

A wrong mask is no error, only a worse robot. Pinned: a policy run under the mask that it was trained with passes, the
same weights under the other one are refused with both figures, and observations that cannot tell are not taken for an
answer. Determinism: seeds; the margin is far from both sides.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import pytest
import torch

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.discrete import masks
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from tests.agent.policy import samples


@lru_cache
def trained(attention: str) -> PrismaticPolicy:
    """Memorises what to do in eight observations."""
    policy = samples.policy(attention=attention)
    batch = samples.batch(policy, 8)
    tokens = torch.randint(0, 256, (8, 2, 4), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(policy.network.parameters(), 3e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(policy.logits(batch).flatten(0, 2), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.base_changed()
    return policy


@pytest.mark.parametrize(("mine", "other"), [("bidirectional", "causal"), ("causal", "bidirectional")])
def test_the_mask_of_the_training_passes_and_the_other_does_not(mine: str, other: str) -> None:
    policy = trained(mine)
    batch = samples.batch(policy, 8)
    before = policy.base_hash
    report = masks.require(policy, batch)
    assert report.fits is True
    assert policy.network.config.attention == mine  # left as it was
    config = dataclasses.replace(policy.config, attention=other)  # type: ignore[arg-type]
    wrong = PrismaticPolicy(config, policy.spec, policy.statistics, policy.tokenizer)
    wrong.network.load_state_dict(policy.network.state_dict())
    with pytest.raises(RatchetError) as refused:
        masks.require(wrong, batch)
    assert refused.value.code == "policy.attention_mismatch"
    assert mine in refused.value.fix
    policy.base_changed()
    assert policy.base_hash == before


def test_random_weights_cannot_tell() -> None:
    policy = samples.policy()
    assert masks.check(policy, samples.batch(policy)).fits is None
    # However far apart: neither is surer than somebody who draws among the bins.
    assert masks.MaskReport("causal", -7.0, -5.0).fits is None
    assert masks.MaskReport("causal", -7.0, -3.0).fits is False
