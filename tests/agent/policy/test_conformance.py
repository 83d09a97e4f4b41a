"""The policy conformance suite on the small configuration and on the published architecture.

One class runs both sizes, so what holds here without a GPU holds for the published model's code path too. Pinned: the
suite in float32 and under bfloat16 autocast for the small one, with golden weights for the fused towers and zero
placeholders, under both masks.
"""

from __future__ import annotations

import pytest

from benchmarks.science import parity_oft
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.protocol import Policy, PolicyInput
from ratchet_vla.testing.conformance.policy import PolicyConformance
from tests.agent.policy import samples


class TestSmall(PolicyConformance):
    @pytest.fixture
    def policy(self) -> PrismaticPolicy:
        return samples.policy()

    @pytest.fixture
    def batch(self, policy: PrismaticPolicy) -> PolicyInput:
        return samples.batch(policy)


class TestSmallBfloat16(TestSmall):
    tolerance = 0.03

    @pytest.fixture
    def policy(self) -> PrismaticPolicy:
        return samples.policy("bfloat16")


class TestPublishedArchitecture(TestSmall):
    @pytest.fixture(params=["bidirectional", "causal"])
    def policy(self, request: pytest.FixtureRequest) -> PrismaticPolicy:
        return parity_oft.build(samples.GOLDEN, request.param)[0]


def test_the_class_is_a_policy() -> None:
    assert isinstance(samples.policy(), Policy)
