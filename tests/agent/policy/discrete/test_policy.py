"""The policy class: what is beyond the conformance suite, because only this class has weights, adapters and a hash.

Pinned: the head's action rows against the whole head, alone and under an adapter in every state; fixed-length prompts
and padding; full gradients; the base's hash (what moves it and what must not); refusals with their codes; that a policy
with a state needs the state's statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ratchet_vla.adapters.lora.layers import attach, lora_config
from ratchet_vla.adapters.swap.hotswap import HotSwapper
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.discrete.action_tokens import BINS
from ratchet_vla.policy.discrete.policy import PrismaticConfig, PrismaticPolicy
from ratchet_vla.policy.protocol import PolicyInput
from ratchet_vla.testing.conformance.policy import uniform
from ratchet_vla.testing.conformance.swap import noise
from tests.agent.policy import samples


def hidden_of(policy: PrismaticPolicy) -> Tensor:
    shape = (2, policy.actions, policy.config.hidden)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def test_a_samples_log_probability_is_log_softmax_over_all_action_rows() -> None:
    policy, temperature = samples.policy(), 0.7
    batch = samples.batch(policy)
    chunks = policy.sample(batch, temperature, uniform(policy, len(batch)))
    assert chunks.tokens is not None
    logits = policy.logits(batch)
    expected = torch.distributions.Categorical(logits=logits / temperature)
    log_prob, entropy = policy.log_prob(batch, chunks.tokens, temperature)
    assert torch.allclose(log_prob, expected.log_prob(chunks.tokens), atol=1e-5)
    assert torch.allclose(entropy, expected.entropy(), atol=1e-5)
    assert torch.allclose(chunks.actions, policy.actions_of(chunks.tokens))
    greedy = policy.predict(batch).tokens
    assert greedy is not None
    assert torch.equal(greedy, logits.argmax(-1))


def test_the_feature_is_the_mean_hidden_state() -> None:
    policy = samples.policy()
    batch = samples.batch(policy)
    feature = policy.predict(batch).feature
    assert feature is not None
    assert feature.shape == (3, policy.config.hidden)
    sampled = policy.sample(batch, 1.0, uniform(policy, 3)).feature
    assert sampled is not None
    assert torch.equal(feature, sampled)


@pytest.mark.parametrize("state", ["no adapter", "adapter", "merged", "disabled"])
def test_the_action_rows_are_the_whole_heads_rows(state: str) -> None:
    policy = samples.policy()
    hidden = hidden_of(policy)
    before = policy.action_logits(hidden)
    if state != "no adapter":
        lora = attach(policy.module, lora_config(4, 8))
        swapper = HotSwapper(policy, lora)
        swapper.swap(noise(lora, policy, 1))
        assert not torch.allclose(policy.action_logits(hidden), before, atol=1e-2)
        if state == "merged":
            swapper.merge()
        if state == "disabled":
            with lora.disabled():
                assert torch.equal(policy.action_logits(hidden), before)
            return
    whole = policy.network.language_model.lm_head(hidden)
    mine = policy.action_logits(hidden)
    rows = slice(policy.config.vocabulary - BINS, policy.config.vocabulary)
    assert mine.shape == (2, policy.actions, BINS)
    assert torch.allclose(mine, whole[..., rows], atol=1e-5)


def test_padding_of_a_fixed_length_prompt_changes_nothing() -> None:
    short, long = (samples.policy(prompt_length=n) for n in (16, 24))
    batch = samples.batch(short)
    long.network.load_state_dict(short.network.state_dict())
    pixels = short.network.vision_backbone.prepare(torch.as_tensor(batch.images))
    assert batch.state is not None
    state = short.normalised_state(batch.state)
    with torch.no_grad():
        # Past `_hidden`, which drops padding that all rows share.
        one, two = (p.hidden_states(pixels, *p.prompt(batch.instructions), state) for p in (short, long))
    assert torch.allclose(one, two, atol=1e-4)
    assert torch.allclose(short.logits(batch), long.logits(batch), atol=1e-3)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_last_layer_gives_what_all_positions_would(attention: str) -> None:
    policy = samples.policy(attention=attention)
    trunk = policy.network.language_model.model
    x = torch.randn(2, 20, policy.config.hidden, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(2, 20, dtype=torch.bool)
    seen[0, 1:4] = False
    rope = trunk.rope_mask(seen, policy.config.attention, torch.float32)
    some = trunk(x, rope, slice(11, 19), torch.float32)
    everything = trunk(x, rope, slice(None), torch.float32)
    assert torch.allclose(some, everything[:, 11:19], atol=1e-5)


def test_every_parameter_of_the_base_gets_a_gradient() -> None:
    policy = samples.policy()
    batch = samples.batch(policy)
    tokens = policy.predict(batch).tokens
    assert tokens is not None
    policy.log_prob(batch, tokens, 1.0)[0].sum().backward()
    still = [n for n, p in policy.network.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert still == []


def test_the_state_is_counted_in_deviations_and_matters() -> None:
    policy = samples.policy()
    mean, deviation = (torch.tensor(v) for v in (policy.statistics.state_mean, policy.statistics.state_std))
    assert torch.allclose(policy.normalised_state(mean[None]), torch.zeros(1, 4))
    assert torch.allclose(policy.normalised_state((mean + 2 * deviation)[None]), torch.full((1, 4), 2.0))
    batch = samples.batch(policy)
    assert batch.state is not None
    moved = PolicyInput(batch.images, batch.state + 1, batch.instructions)
    assert not torch.allclose(policy.logits(batch), policy.logits(moved), atol=1e-3)


def test_physical_actions_and_bins_agree() -> None:
    policy = samples.policy()
    bins = torch.arange(1, BINS)[:, None].expand(-1, 4)
    actions = policy.actions_of(bins)
    assert actions.dtype == torch.float32
    assert torch.equal(policy.tokens_of(actions), bins)
    assert float(actions[:, 0].max()) <= policy.statistics.q99[0]
    assert float(actions[:, 0].min()) >= policy.statistics.q01[0]
    assert abs(float(actions[0, 3])) > 0.99  # the gripper passes unscaled


# The base's hash.


def test_the_hash_is_the_contents_alone() -> None:
    one, two = samples.policy(), samples.policy()
    assert one.base_hash == two.base_hash
    assert samples.policy(seed=1).base_hash != one.base_hash


def test_attaching_running_and_swapping_an_adapter_leave_the_hash() -> None:
    policy, fresh = samples.policy(), samples.policy()
    before = fresh.base_hash
    lora = attach(policy.module, lora_config(4, 4))
    assert policy.base_hash == before  # computed after attaching, from tensors under other names
    swapper = HotSwapper(policy, lora)
    swapper.swap(noise(lora, policy, 1))
    policy.base_changed()
    assert policy.base_hash == before
    swapper.merge()
    assert policy.base_hash == before
    with pytest.raises(RatchetError) as refused:
        policy.base_tensors()
    assert refused.value.code == "policy.merged"


def test_any_tensor_moves_the_hash() -> None:
    policy = samples.policy()
    before = policy.base_hash
    for name, tensor in policy.base_tensors().items():
        kept = tensor.flatten()[0].item()
        tensor.view(-1)[0] += 1.0
        policy.base_changed()
        assert policy.base_hash != before, name
        tensor.view(-1)[0] = kept
    policy.base_changed()
    assert policy.base_hash == before


def variant(
    config: dict[str, Any] | None = None, spec: dict[str, Any] | None = None, statistics: dict[str, Any] | None = None
) -> PrismaticPolicy:
    """The sample policy's weights under other facts."""
    demands = dataclasses.replace(samples.metaworld_spec(), **(spec or {}))
    numbers = samples.statistics(demands, **(statistics or {}))
    made = PrismaticPolicy(samples.tiny_config(**(config or {})), demands, numbers, samples.TOKENIZER)
    made.network.load_state_dict(samples.policy().network.state_dict())
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {"statistics": {"q01": (-0.05, -0.03, -0.02, -1.0)}},
        {"statistics": {"mask": (True, True, False, False)}},
        {"statistics": {"state_mean": (0.0, 0.1, 0.2, 0.4)}},
        {"statistics": {"state_std": (0.5, 1.5, 2.5, 3.0)}},
        {"spec": {"control_hz": 10.0}},
        {"spec": {"gripper_open": 1.0}},
        {"spec": {"frame": "base"}},
        {"config": {"attention": "causal"}},
        {"config": {"prompt": "do {instruction}"}},
        {"config": {"rope_theta": 1e5}},
        {"config": {"compute_dtype": "bfloat16"}},
    ],
)
def test_statistics_demands_and_conventions_move_the_hash(changes: dict[str, Any]) -> None:
    assert variant().base_hash == samples.policy().base_hash
    assert variant(**changes).base_hash != samples.policy().base_hash


# What is refused.


def test_a_policy_is_not_built_from_parts_that_do_not_fit() -> None:
    spec = samples.metaworld_spec()
    cases: list[tuple[str, Callable[[], object]]] = [
        ("policy.missing_statistics", lambda: variant(statistics={"state_mean": (), "state_std": ()})),
        ("policy.wrong_statistics", lambda: variant(statistics={"key": "another"})),
        ("policy.wrong_statistics", lambda: variant(statistics={"units": ("rad", "m", "m", "1")})),
        ("policy.no_probabilities", lambda: variant(spec={"bins": 0})),
        ("policy.unknown_vision_tower", lambda: variant(config={"vision": "resnet"})),
        (
            "policy.bad_config",
            lambda: PrismaticPolicy(
                samples.tiny_config(vocabulary=280, padded_vocabulary=280),
                spec,
                samples.statistics(spec),
                samples.TOKENIZER,
            ),
        ),
    ]
    for code, build in cases:
        with pytest.raises(RatchetError) as refused:
            build()
        assert refused.value.code == code


def test_statistics_of_too_few_dimensions_are_refused() -> None:
    spec = samples.metaworld_spec()
    three = samples.statistics(spec, units=spec.action_units[:3], q01=(0.0,) * 3, q99=(1.0,) * 3, mask=(True,) * 3)
    with pytest.raises(RatchetError) as refused:
        PrismaticPolicy(samples.tiny_config(), spec, three, samples.TOKENIZER)
    assert refused.value.code == "policy.wrong_statistics"


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "both"},
        {"placeholders": "none"},
        {"projector": "mlp"},
        {"compute_dtype": "float16"},
        {"heads": 3},
        {"heads": 32},
        {"layers": 0},
        {"hidden": 32.5},
        {"vocabulary": 100},
        {"padded_vocabulary": 700},
        {"pad": -1},
        {"bos": 1 << 20},
        {"prompt": "do it"},
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RatchetError) as refused:
        dataclasses.replace(samples.tiny_config(), **change)
    assert refused.value.code == "policy.bad_config"


def test_the_mask_has_no_default() -> None:
    fields = {f.name: f for f in dataclasses.fields(PrismaticConfig)}
    assert fields["attention"].default is dataclasses.MISSING


@pytest.mark.parametrize("state", [None, torch.zeros(3, 3), torch.zeros(2, 4), torch.full((3, 4), float("nan"))])
def test_states_that_do_not_fit_are_refused(state: Tensor | None) -> None:
    policy = samples.policy()
    batch = samples.batch(policy)
    with pytest.raises(RatchetError) as refused:
        policy.predict(PolicyInput(batch.images, state, batch.instructions))
    assert refused.value.code == "policy.bad_input"


def test_an_empty_batch_and_an_empty_instruction_are_refused() -> None:
    policy = samples.policy()
    batch = samples.batch(policy)
    assert batch.state is not None
    with pytest.raises(RatchetError) as refused:
        policy.predict(PolicyInput(torch.as_tensor(batch.images)[:0], batch.state[:0], []))
    assert refused.value.code == "policy.bad_input"
    with pytest.raises(RatchetError) as refused:
        policy.predict(PolicyInput(batch.images, batch.state, ["open", "", "close"]))
    assert refused.value.code == "policy.bad_instruction"


def test_images_may_be_numpy_and_no_state_is_needed_where_none_is_taken() -> None:
    policy = samples.policy(state=False)
    batch = samples.batch(policy)
    plain = PolicyInput(torch.as_tensor(batch.images).numpy(), None, batch.instructions)
    assert torch.equal(policy.predict(plain).actions, policy.predict(batch).actions)
