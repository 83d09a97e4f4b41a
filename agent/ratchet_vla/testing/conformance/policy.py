"""What every policy must do for the runtime and the learner. Inherit `PolicyConformance` and give its two fixtures.

On-policy learning stands on one fact: the log-probability stored with an action is the one the learner computes again.
Each test here pins a way in which that fact, or the randomness behind it, gets lost without an error.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.protocol import Policy, PolicyInput

__all__ = ["PolicyConformance", "PolicySuite"]


def rows(batch: PolicyInput, chosen: list[int]) -> PolicyInput:
    """Some observations of a batch, in the order given."""
    state = None if batch.state is None else batch.state[chosen]
    return PolicyInput(torch.as_tensor(batch.images)[chosen], state, [batch.instructions[i] for i in chosen])


def uniform(policy: Policy, count: int, seed: int = 0) -> Tensor:
    shape = (count, policy.spec.chunk, len(policy.spec.action_names))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class PolicySuite:
    """What holds whatever is sampled: bins, or the chain of points of a flow.

    policy: a policy without adapters. batch: at least 3 observations that differ in image and instruction.
    """

    tolerance = 1e-4  # of log-probabilities that should be equal: rounding in the compute dtype
    visible = 0.05  # change of a log-probability below which an input would count as ignored
    temperature = 1.6

    def test_actions_are_finite_of_the_stated_shape_and_repeat(self, policy: Policy, batch: PolicyInput) -> None:
        actions = policy.predict(batch).actions
        assert actions.shape == (len(batch), policy.spec.chunk, len(policy.spec.action_names))
        assert actions.dtype == torch.float32
        assert bool(actions.isfinite().all())
        assert torch.equal(policy.predict(batch).actions, actions)

    def test_a_sample_has_the_log_probability_that_the_learner_finds(self, policy: Policy, batch: PolicyInput) -> None:
        chunks = policy.sample(batch, self.temperature, uniform(policy, len(batch)))
        assert chunks.tokens is not None
        assert chunks.log_prob is not None
        log_prob, entropy = policy.log_prob(batch, chunks.tokens, self.temperature)
        assert log_prob.requires_grad
        assert log_prob.shape == entropy.shape == chunks.actions.shape
        assert log_prob.dtype == entropy.dtype == chunks.log_prob.dtype == torch.float32
        assert float((log_prob.detach() - chunks.log_prob).abs().max()) <= self.tolerance

    def test_a_row_has_its_probability_whatever_else_is_in_the_batch(self, policy: Policy, batch: PolicyInput) -> None:
        noise = uniform(policy, len(batch))
        together = policy.sample(batch, self.temperature, noise)
        assert together.tokens is not None
        assert together.log_prob is not None
        for chosen in ([0], [len(batch) - 1], list(reversed(range(len(batch))))):
            log_prob, _ = policy.log_prob(rows(batch, chosen), together.tokens[chosen], self.temperature)
            assert float((log_prob.detach() - together.log_prob[chosen]).abs().max()) <= self.tolerance

    def test_images_and_words_matter(self, policy: Policy, batch: PolicyInput) -> None:
        tokens = policy.sample(batch, 1.0, uniform(policy, len(batch))).tokens
        assert tokens is not None
        before, _ = policy.log_prob(batch, tokens, 1.0)
        dark = PolicyInput(torch.zeros_like(torch.as_tensor(batch.images)), batch.state, batch.instructions)
        told = PolicyInput(batch.images, batch.state, list(reversed(batch.instructions)))
        for changed in (dark, told):
            after, _ = policy.log_prob(changed, tokens, 1.0)
            assert float((after - before).abs().max().detach()) > self.visible

    def test_the_ends_of_the_noise_give_finite_actions(self, policy: Policy, batch: PolicyInput) -> None:
        for value in (0.0, 1.0 - 2.0**-24):
            chunks = policy.sample(batch, self.temperature, torch.full(uniform(policy, len(batch)).shape, value))
            assert chunks.log_prob is not None
            assert bool(chunks.log_prob.isfinite().all())
            assert bool(chunks.actions.isfinite().all())

    def test_the_base_hash_is_a_constant(self, policy: Policy, batch: PolicyInput) -> None:
        before = policy.base_hash
        assert len(before) == 64
        assert int(before, 16) >= 0
        tokens = policy.sample(batch, 1.0, uniform(policy, len(batch))).tokens
        assert tokens is not None
        policy.log_prob(batch, tokens, 1.0)[0].sum().backward()  # type: ignore[no-untyped-call]
        assert policy.base_hash == before
        policy.module.zero_grad()

    def test_inference_leaves_no_gradient_and_no_trace_in_its_input(self, policy: Policy, batch: PolicyInput) -> None:
        before = copy.deepcopy(batch)
        noise = uniform(policy, len(batch))
        kept = noise.clone()
        chunks = policy.sample(batch, self.temperature, noise)
        for tensor in (chunks.actions, chunks.log_prob, chunks.feature):
            assert tensor is None or not tensor.requires_grad
        assert torch.equal(torch.as_tensor(batch.images), torch.as_tensor(before.images))
        assert torch.equal(noise, kept)
        if batch.state is not None:
            assert before.state is not None
            assert torch.equal(batch.state, before.state)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
    def test_a_temperature_that_is_none_is_refused(
        self, policy: Policy, batch: PolicyInput, temperature: float
    ) -> None:
        noise = uniform(policy, len(batch))
        tokens = policy.sample(batch, 1.0, noise).tokens
        assert tokens is not None
        with pytest.raises(RatchetError) as refused:
            policy.sample(batch, temperature, noise)
        assert refused.value.code == "policy.bad_temperature"
        with pytest.raises(RatchetError) as refused:
            policy.log_prob(batch, tokens, temperature)
        assert refused.value.code == "policy.bad_temperature"

    def test_images_that_do_not_fit_are_refused(self, policy: Policy, batch: PolicyInput) -> None:
        images = torch.as_tensor(batch.images)
        for wrong in (images.float(), images[:, :, 1:], images[:-1], images.transpose(-1, -2), images[:, :0]):
            with pytest.raises(RatchetError) as refused:
                policy.predict(PolicyInput(wrong, batch.state, batch.instructions))
            assert refused.value.code == "policy.bad_input"

    def test_randomness_comes_from_the_noise_alone(self, policy: Policy, batch: PolicyInput) -> None:
        noise = uniform(policy, len(batch))
        torch.manual_seed(1)
        one = policy.sample(batch, self.temperature, noise)
        torch.manual_seed(2)
        two = policy.sample(batch, self.temperature, noise)
        assert one.tokens is not None
        assert two.tokens is not None
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.log_prob, two.log_prob)  # type: ignore[arg-type]
        other = policy.sample(batch, self.temperature, uniform(policy, len(batch), seed=9))
        assert not torch.equal(one.tokens, other.tokens)  # type: ignore[arg-type]


class PolicyConformance(PolicySuite):
    """Policies with token bins.

    The fixtures:

    policy: a policy without adapters.
    batch: at least 3 observations that differ in image and instruction.
    """

    def test_predict_gives_finite_chunks_of_the_stated_shapes(self, policy: Policy, batch: PolicyInput) -> None:
        chunks = policy.predict(batch)
        shape = (len(batch), policy.spec.chunk, len(policy.spec.action_names))
        assert chunks.actions.shape == shape
        assert chunks.actions.dtype == torch.float32
        assert bool(chunks.actions.isfinite().all())
        assert chunks.tokens is not None
        assert chunks.tokens.shape == shape
        assert chunks.tokens.dtype == torch.int64
        assert 0 <= int(chunks.tokens.min()) <= int(chunks.tokens.max()) < policy.spec.bins
        assert chunks.log_prob is not None
        assert torch.equal(chunks.log_prob, torch.zeros(shape))
        assert torch.equal(policy.predict(batch).actions, chunks.actions)

    def test_the_learner_finds_the_log_probability_of_the_sample(self, policy: Policy, batch: PolicyInput) -> None:
        chunks = policy.sample(batch, self.temperature, uniform(policy, len(batch)))
        assert chunks.tokens is not None
        assert chunks.log_prob is not None
        log_prob, entropy = policy.log_prob(batch, chunks.tokens, self.temperature)
        assert log_prob.requires_grad
        assert log_prob.dtype == entropy.dtype == chunks.log_prob.dtype == torch.float32
        assert float((log_prob.detach() - chunks.log_prob).abs().max()) <= self.tolerance
        assert bool((entropy >= 0).all())
        assert float(entropy.detach().max()) <= math.log(policy.spec.bins) + 1e-4

    def test_a_row_does_not_depend_on_what_else_is_in_the_batch(self, policy: Policy, batch: PolicyInput) -> None:
        noise = uniform(policy, len(batch))
        together = policy.sample(batch, self.temperature, noise)
        assert together.tokens is not None
        order = list(reversed(range(len(batch))))
        for chosen in ([0], [len(batch) - 1], order):
            apart = rows(batch, chosen)
            # At given tokens, because rounding may move a sample across the border of two bins.
            log_prob, _ = policy.log_prob(apart, together.tokens[chosen], self.temperature)
            assert together.log_prob is not None
            assert float((log_prob.detach() - together.log_prob[chosen]).abs().max()) <= self.tolerance
            tokens = policy.sample(apart, self.temperature, noise[chosen]).tokens
            assert tokens is not None
            assert float((tokens == together.tokens[chosen]).float().mean()) > 0.95

    def test_frequencies_of_samples_are_their_probabilities(self, policy: Policy, batch: PolicyInput) -> None:
        count = 64
        same = rows(batch, [0] * count)
        grid = (torch.arange(count) + 0.5) / count
        noise = grid[:, None, None].expand(-1, policy.spec.chunk, len(policy.spec.action_names))
        chunks = policy.sample(same, self.temperature, noise)
        assert chunks.tokens is not None
        assert chunks.log_prob is not None
        # A bin of probability p is hit by floor or ceil of 64 p grid points, give or take one at its borders.
        for token in chunks.tokens[:, 0, 0].unique():  # type: ignore[no-untyped-call]
            hits = chunks.tokens[:, 0, 0] == token
            expected = count * float(chunks.log_prob[hits, 0, 0].exp().mean())
            assert abs(int(hits.sum()) - expected) <= 1 + count * self.tolerance
        ordered = chunks.tokens[:, 0, 0]
        assert bool((ordered[1:] >= ordered[:-1]).all())  # an inverse distribution function never falls

    def test_probabilities_of_all_bins_sum_to_one(self, policy: Policy, batch: PolicyInput) -> None:
        bins = policy.spec.bins
        shape = (-1, policy.spec.chunk, len(policy.spec.action_names))
        total = torch.zeros(shape[1:])
        with torch.no_grad():
            for part in torch.arange(bins).split(64):  # type: ignore[no-untyped-call]
                tokens = part[:, None, None].expand(shape).contiguous()
                total += policy.log_prob(rows(batch, [0] * len(part)), tokens, self.temperature)[0].exp().sum(0)
        assert total == pytest.approx(np.ones(total.shape), abs=max(1e-3, self.tolerance))

    def test_temperature_flattens_the_distribution(self, policy: Policy, batch: PolicyInput) -> None:
        tokens = policy.predict(batch).tokens
        assert tokens is not None
        cold, cold_entropy = policy.log_prob(batch, tokens, 0.5)
        warm, warm_entropy = policy.log_prob(batch, tokens, 2.0)
        assert bool((warm_entropy > cold_entropy).all())
        assert bool((warm < cold).all())  # the most likely token loses
        nearly_greedy = policy.sample(batch, 1e-4, uniform(policy, len(batch))).tokens
        assert nearly_greedy is not None
        assert float(nearly_greedy.eq(tokens).float().mean()) > 0.9

    def test_the_ends_of_the_noise_give_possible_actions(self, policy: Policy, batch: PolicyInput) -> None:
        shape = uniform(policy, len(batch)).shape
        for value in (0.0, 1.0 - 2.0**-24):
            for temperature in (1e-3, self.temperature):
                chunks = policy.sample(batch, temperature, torch.full(shape, value))
                assert chunks.log_prob is not None
                assert bool(chunks.log_prob.isfinite().all())
                assert bool(chunks.actions.isfinite().all())

    def test_noise_and_tokens_of_another_shape_are_refused(self, policy: Policy, batch: PolicyInput) -> None:
        noise = uniform(policy, len(batch))
        for wrong in (noise[:1], noise[:, :-1], noise[..., 0]):
            with pytest.raises(RatchetError) as refused:
                policy.sample(batch, 1.0, wrong)
            assert refused.value.code == "policy.bad_input"
            with pytest.raises(RatchetError) as refused:
                policy.log_prob(batch, wrong.long(), 1.0)
            assert refused.value.code == "policy.bad_input"
        for value in (-1, policy.spec.bins):
            with pytest.raises(RatchetError) as refused:
                policy.log_prob(batch, torch.full(noise.shape, value), 1.0)
            assert refused.value.code == "policy.bad_input"
