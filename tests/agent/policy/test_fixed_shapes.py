"""The fast path of prediction: the same actions as the policy's own, with nothing computed twice.

The path matters because it is what a robot runs, and a stale cache moves an arm by yesterday's image. Pinned: equal
actions for every kind of head, new images, states, words and adapters being seen at once, and the vision towers
running only for new images. Determinism: seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from benchmarks.science import parity_oft
from ratchet_vla.adapters.lora.layers import attach, lora_config
from ratchet_vla.adapters.swap.hotswap import HotSwapper
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.fixed_shapes import StaticPredictor
from ratchet_vla.policy.flow import rtc
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.protocol import PolicyInput
from ratchet_vla.testing.conformance.policy import rows
from ratchet_vla.testing.conformance.swap import noise
from tests.agent.policy import samples

CASES: dict[str, Callable[[], PrismaticPolicy | FlowPolicy]] = {
    "tokens": samples.policy,
    "flow": samples.flow,
    "across": lambda: samples.flow(crossed=2, order="causal", state="prefix"),
    "published": lambda: parity_oft.build(samples.GOLDEN, "bidirectional")[0],
}


@pytest.fixture(params=CASES)
def policy(request: pytest.FixtureRequest) -> PrismaticPolicy | FlowPolicy:
    return CASES[request.param]()


def one(policy: PrismaticPolicy | FlowPolicy, seed: int) -> PolicyInput:
    return rows(samples.batch(policy, 3, seed), [seed % 3])


def test_actions_are_the_policys_own_for_every_new_thing(policy: PrismaticPolicy | FlowPolicy) -> None:
    fast = StaticPredictor(policy)
    first = one(policy, 0)
    # New images, new words with them, then words alone, then the state alone.
    cases = [first, one(policy, 3), one(policy, 1), PolicyInput(first.images, first.state, ["press the button"])]
    if first.state is not None:
        cases.append(PolicyInput(first.images, first.state + 1, ["press the button"]))
    for batch in cases:
        made, own = fast.chunks(batch), policy.predict(batch)
        assert torch.allclose(made.actions, own.actions, atol=1e-5)
        for mine, theirs in ((made.tokens, own.tokens), (made.log_prob, own.log_prob)):
            if mine is None or theirs is None:
                assert mine is theirs
            else:
                assert torch.equal(mine, theirs)


def test_the_same_images_are_seen_once(policy: PrismaticPolicy | FlowPolicy) -> None:
    fast = StaticPredictor(policy)
    batch = one(policy, 0)
    actions = fast.predict(batch)
    assert torch.equal(fast.predict(batch), actions)
    assert fast.seen == 1
    copied = PolicyInput(torch.as_tensor(batch.images).clone(), batch.state, batch.instructions)
    assert torch.equal(fast.predict(copied), actions)
    assert fast.seen == 2
    fast.predict(PolicyInput(copied.images, batch.state, ["press the button"]))
    assert fast.seen == 3  # words may modulate what is seen


def test_an_exchanged_adapter_acts_at_once(policy: PrismaticPolicy | FlowPolicy) -> None:
    lora = attach(policy.module, lora_config(2, 2))
    swapper = HotSwapper(policy, lora, mode="copy")
    fast = StaticPredictor(policy)
    batch = one(policy, 0)
    base = fast.predict(batch)
    swapper.swap(noise(lora, policy, 1))
    fresh = PolicyInput(torch.as_tensor(batch.images).clone(), batch.state, batch.instructions)
    assert torch.allclose(fast.predict(fresh), policy.predict(fresh).actions, atol=1e-5)
    assert not torch.equal(fast.predict(fresh), base)


def test_a_running_chunk_is_gone_on_from(policy: PrismaticPolicy | FlowPolicy) -> None:
    """With a plan, without it again, and the same numbers as the policy's own each time."""
    fast, batch = StaticPredictor(policy), one(policy, 0)
    free = policy.predict(batch).actions
    if isinstance(policy, PrismaticPolicy):
        with pytest.raises(RatchetError) as refused:
            fast.predict(batch, rtc.Guide(torch.zeros(1, 2, 4), 1))
        assert refused.value.code == "policy.no_static"
        return
    guide = policy.guide(free + 0.01, 1)
    held = policy.predict(batch, guide).actions
    assert not torch.allclose(held, free, atol=1e-3)
    for wanted, given in ((free, None), (held, guide), (free, None)):
        assert torch.allclose(fast.predict(batch, given), wanted, atol=1e-5)
    with pytest.raises(RatchetError) as refused:
        fast.predict(batch, dataclasses.replace(guide, exact=True))
    assert refused.value.code == "policy.no_static"


def test_one_token_after_another_is_refused() -> None:
    policy = samples.policy(attention="causal", decoding="autoregressive")
    with pytest.raises(RatchetError) as refused:
        StaticPredictor(policy)
    assert refused.value.code == "policy.no_static"
