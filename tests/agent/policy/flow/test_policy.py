"""Flow policies: true likelihoods, chunks that go on from others, adapters that are swapped, learning that works.

The path matters because a ratio of flow-matching losses is no likelihood ratio, and a learner cannot tell. Pinned: the
policy and swap suites; densities against closed forms and counts; that the stochastic flow has the ordinary one's
distribution; real-time chunking; padding in the likelihood; and the learner's own update raising what succeeded.
Determinism: seeds; tolerances are several standard errors.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ratchet_vla.adapters.lora.layers import attach, lora_config
from ratchet_vla.contract import GripperSpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.rollouts.specs import EpisodeSpec
from ratchet_vla.learner.supervised.training import PretrainConfig, Pretrainer, Progress
from ratchet_vla.learner.update.step import UpdateConfig, Updater
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.policy.flow import rtc
from ratchet_vla.policy.flow import sde as flow_sde
from ratchet_vla.policy.flow import trunk as flow_trunk
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.flow.statistics import small_statistics
from ratchet_vla.policy.protocol import Policy, PolicyInput
from ratchet_vla.runtime.inference.server import PolicyServer
from ratchet_vla.runtime.inference.source import Ahead
from ratchet_vla.testing.conformance.policy import PolicySuite, uniform
from ratchet_vla.testing.conformance.swap import SwapSuite
from tests.agent.policy import samples


class FlowConformance(PolicySuite):
    tolerance = 2e-3  # the chain is stored in float32, and its steps are divided by small deviations
    visible = 0.5

    def test_a_chain_of_another_shape_or_kind_is_refused(self, policy: FlowPolicy, batch: PolicyInput) -> None:
        noise = uniform(policy, len(batch))
        chain = policy.sample(batch, 1.0, noise).tokens
        assert chain is not None
        broken = chain.clone()
        broken[0, 0, 0, 0] = math.nan
        for wrong in (chain[:1], chain[:, :1], chain.long(), chain[..., 0], broken):
            with pytest.raises(RatchetError) as refused:
                policy.log_prob(batch, wrong, 1.0)
            assert refused.value.code == "policy.bad_input"
        for wrong in (noise[:1], noise[:, :-1], noise[..., 0]):
            with pytest.raises(RatchetError) as refused:
                policy.sample(batch, 1.0, wrong)
            assert refused.value.code == "policy.bad_input"

    def test_probabilities_add_up_to_the_density_of_the_chain(self, policy: FlowPolicy, batch: PolicyInput) -> None:
        """Computed here from the velocity alone, step by step, over every element, padded or not."""
        chain = policy.sample(batch, 1.3, uniform(policy, len(batch))).tokens
        assert chain is not None
        log_prob, entropy = policy.log_prob(batch, chain, 1.3)
        prefix = policy.prefix(batch)
        steps, total, spread = policy.config.sample_steps, torch.zeros(len(batch)), 0.0
        for i in range(steps):
            t = 1 - i / steps
            v = policy.velocity(prefix)(chain[:, i], torch.full((len(batch),), t))
            s = policy.config.noise_level * 1.3 * math.sqrt(min(t, 1 - 1 / steps) / (1 - min(t, 1 - 1 / steps)))
            mean = chain[:, i] - (v + s * s / (2 * t) * (chain[:, i] + (1 - t) * v)) / steps
            correlated = torch.full((mean.shape[1],) * 2, policy.config.shock_correlation).fill_diagonal_(1.0)
            normal = torch.distributions.MultivariateNormal(mean.transpose(1, 2), s * s / steps * correlated)
            total += normal.log_prob(chain[:, i + 1].transpose(1, 2)).sum(1).detach()
            spread += float(normal.entropy().sum(1)[0])
        assert log_prob.sum((1, 2)).detach() == pytest.approx(total, rel=1e-3)
        assert float(entropy.sum((1, 2))[0]) == pytest.approx(spread, rel=1e-4)

    def test_temperature_spreads_the_samples(self, policy: FlowPolicy, batch: PolicyInput) -> None:
        noise = uniform(policy, len(batch))
        greedy = policy.sample(batch, 1e-4, noise).actions
        near = policy.sample(batch, 0.1, noise).actions
        far = policy.sample(batch, 2.0, noise).actions
        assert float((near - greedy).abs().mean()) < float((far - greedy).abs().mean())


class TestSmall(FlowConformance):
    @pytest.fixture
    def policy(self) -> FlowPolicy:
        return samples.flow()

    @pytest.fixture
    def batch(self, policy: FlowPolicy) -> PolicyInput:
        return samples.batch(policy)


class TestSmallBfloat16(TestSmall):
    tolerance = 1.0  # of densities that reach dozens of nats

    @pytest.fixture
    def policy(self) -> FlowPolicy:
        return samples.flow("bfloat16")

    def test_probabilities_add_up_to_the_density_of_the_chain(self, policy: FlowPolicy, batch: PolicyInput) -> None:
        log_prob, _ = policy.log_prob(batch, policy.sample(batch, 1.0, uniform(policy, 3)).tokens, 1.0)  # type: ignore[arg-type]
        assert log_prob.dtype == torch.float32


class TestPaddedAndAdaptive(TestSmall):
    """pi0.5's conventions: wider and longer than the robot's actions, state in words, time through the norms."""

    visible = 0.05

    @pytest.fixture
    def policy(self) -> FlowPolicy:
        config = samples.flow().config
        expert = dataclasses.replace(config.expert, form="gemma", adaptive=True)
        return samples.flow(
            expert=expert,
            language=dataclasses.replace(config.language, form="gemma"),
            horizon=3,
            action_width=6,
            state="words",
            time="adaptive",
            prompt="{instruction} {state}",
            prompt_length=80,
        )


class TestAcross(TestSmall):
    """SmolVLA's conventions: every other layer reads across, actions are causal, the state ends the prefix."""

    @pytest.fixture
    def policy(self) -> FlowPolicy:
        return samples.flow(crossed=2, order="causal", state="prefix", image_scale="root")


class TestIndependent(TestSmall):
    """Shocks that move each action of a chunk alone."""

    @pytest.fixture
    def policy(self) -> FlowPolicy:
        return samples.flow(shock_correlation=0.0)


class TestSwap(SwapSuite):
    head = "action_out_proj"

    @pytest.fixture
    def make(self) -> Callable[[], FlowPolicy]:
        return samples.flow

    @pytest.fixture
    def answer(self) -> Callable[[FlowPolicy], Tensor]:
        def velocity(policy: FlowPolicy) -> Tensor:
            batch = samples.batch(policy)
            x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
            return policy.velocity(policy.prefix(batch))(x, torch.tensor([0.2, 0.5, 1.0]))

        return velocity


def test_the_class_is_a_policy() -> None:
    assert isinstance(samples.flow(), Policy)


# The stochastic flow.


def test_the_stochastic_flow_has_the_ordinary_ones_distribution() -> None:
    """For Gaussian data the exact velocity is known; both flows must end in that Gaussian."""
    mean, deviation = 0.7, 0.4

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        t = time[:, None, None]
        variance = t * t + (1 - t) ** 2 * deviation**2
        slope = (t - (1 - t) * deviation**2) / variance
        return -mean + slope * (x - (1 - t) * mean)

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 1, 1, generator=generator)
    shocks = torch.randn(20_000, 64, 1, 1, generator=generator)
    chain, _ = flow_sde.sample(velocity, noise, shocks, 0.7, flow_sde.mixing(1, 0.0))
    ordinary = flow_sde.integrate(velocity, noise, 64)
    for end in (chain[:, -1], ordinary):
        assert float(end.mean()) == pytest.approx(mean, abs=0.02)
        assert float(end.std()) == pytest.approx(deviation, abs=0.02)


def test_one_step_is_the_gaussian_that_it_says() -> None:
    x, v = torch.tensor([[[0.3]]]), torch.tensor([[[-0.5]]])
    mean, deviation = flow_sde.mean_of(x, v, 0.5, 4, 0.8)
    # sigma = 0.8 sqrt(0.5 / 0.5); drift = v + 0.64 / 1 (x + 0.5 v)
    assert float(mean) == pytest.approx(0.3 - 0.25 * (-0.5 + 0.64 * (0.3 - 0.25)))
    assert deviation == pytest.approx(0.4)
    assert flow_sde.sigma(1.0, 4, 0.5) == flow_sde.sigma(0.75, 4, 0.5) == pytest.approx(0.5 * math.sqrt(3))


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.95])
def test_correlated_shocks_have_the_density_that_is_said(correlation: float) -> None:
    """One step from a fixed point is a Gaussian whose covariance is known; torch's own density of it must agree."""
    generator = torch.Generator().manual_seed(0)
    noise, shocks = torch.randn(5, 4, 2, generator=generator), torch.randn(5, 1, 4, 2, generator=generator)
    mix = flow_sde.mixing(4, correlation)

    def still(x: Tensor, time: Tensor) -> Tensor:
        return torch.zeros_like(x)

    chain, density = flow_sde.sample(still, noise, shocks, 0.8, mix)
    mean, deviation = flow_sde.mean_of(noise, torch.zeros_like(noise), 1.0, 1, 0.8)
    covariance = deviation**2 * torch.full((4, 4), correlation).fill_diagonal_(1.0)
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(4), covariance)
    expected = gaussian.log_prob((chain[:, 1] - mean).transpose(1, 2))  # (B, A): over the chunk's actions
    assert torch.allclose(density.sum(1), expected, atol=1e-4)
    again, entropy = flow_sde.log_density(still, chain, 0.8, mix)
    assert torch.allclose(again, density, atol=1e-5)
    assert float(entropy.sum((1, 2))[0]) == pytest.approx(2 * float(gaussian.entropy()), rel=1e-5)


def test_shocks_correlate_as_configured() -> None:
    """Over many rows, steps of a chunk move together; each alone is a standard normal still."""
    shocks = torch.randn(40_000, 1, 3, 1, generator=torch.Generator().manual_seed(0))
    chain, _ = flow_sde.sample(
        lambda x, t: torch.zeros_like(x), torch.zeros(40_000, 3, 1), shocks, 1.0, flow_sde.mixing(3, 0.7)
    )
    found = torch.corrcoef(chain[:, 1, :, 0].T)
    assert torch.allclose(found, torch.full((3, 3), 0.7).fill_diagonal_(1.0), atol=0.02)
    assert torch.allclose(chain[:, 1].std(0), chain[:, 1, 0].std(0).expand(3, 1), rtol=0.03)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_an_impossible_correlation_is_refused(value: float) -> None:
    with pytest.raises(RatchetError) as refused:
        samples.flow(shock_correlation=value)
    assert refused.value.code == "policy.bad_config"


def test_correlated_noise_reaches_the_first_point() -> None:
    policy = samples.flow()
    noise = torch.full((1, 2, 4), 0.5)
    first, shocks = policy._draws(noise)
    assert first == pytest.approx(torch.zeros(1, 2, 4), abs=1e-6)
    other, others = policy._draws(noise + 0.01)
    assert float((shocks - others).abs().min()) > 0  # every shock moves with the row
    assert not torch.equal(first, other)


@pytest.mark.parametrize("groups", [1, 2])
def test_shared_keys_are_repeated_as_the_kernel_shares_them(groups: int) -> None:
    """What a GPU's kernel is given, against the kernel that shares them itself."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 4, 8, generator=generator)
    key, value = (torch.randn(2, 5, groups, 8, generator=generator) for _ in range(2))
    hidden = torch.zeros(2, 1, 3, 5)
    shared = flow_trunk.attend(query, key, value, hidden)
    own = [flow_trunk.repeated(x.transpose(1, 2), 4).transpose(1, 2) for x in (key, value)]
    assert torch.allclose(flow_trunk.attend(query, own[0], own[1], hidden), shared, atol=1e-6)


# Real-time chunking.


def test_weights_hold_fade_and_let_go() -> None:
    assert rtc.weights(2, 4, 6, "zeros").tolist() == [1, 1, 0, 0, 0, 0]
    assert rtc.weights(2, 4, 6, "ones").tolist() == [1, 1, 1, 1, 0, 0]
    assert rtc.weights(1, 4, 6, "linear") == pytest.approx(torch.tensor([1, 0.75, 0.5, 0.25, 0, 0]))
    fading = rtc.weights(1, 4, 6, "exponential")
    assert float(fading[1]) == pytest.approx(0.75 * math.expm1(0.75) / (math.e - 1))
    assert rtc.weights(9, 4, 3, "linear").tolist() == [1, 1, 1]


@pytest.mark.parametrize("exact", [False, True])
def test_a_new_chunk_begins_where_the_old_one_is(exact: bool) -> None:
    policy = samples.flow(steps=20)
    batch = samples.batch(policy)
    free = policy.predict(batch).actions
    target = policy.normalised(free) + 0.8
    guide = rtc.Guide(target, delay=1, horizon=1, schedule="zeros", limit=10.0, exact=exact)
    held = policy.normalised(policy.predict(batch, guide).actions)
    gap = (held - target).abs()
    assert float(gap[:, 0].mean()) < 0.25 * 0.8
    assert float(gap[:, 1].mean()) > float(gap[:, 0].mean())
    with pytest.raises(RatchetError) as refused:
        rtc.Guide(target[0], delay=1)
    assert refused.value.code == "policy.bad_input"


# Learning.


def test_the_learner_raises_what_succeeded_and_lowers_what_failed() -> None:
    """One GRPO update over a batch of chains, by the same learner as for bins."""
    policy = samples.flow()
    lora = attach(policy.module, lora_config(4, 4))
    one = samples.batch(policy, 1)
    count = 8
    images = torch.as_tensor(one.images).repeat(count, 1, 1, 1, 1)
    state = None if one.state is None else one.state.repeat(count, 1)
    batch = PolicyInput(images, state, list(one.instructions) * count)
    chunks = policy.sample(batch, 1.0, uniform(policy, count))
    assert chunks.tokens is not None
    assert chunks.log_prob is not None
    assert chunks.feature is not None
    success = np.arange(count) < 4
    rollouts = RolloutBatch(
        images=images.numpy(),
        state=np.zeros((count, 0), np.float32) if state is None else state.numpy(),
        instruction=np.zeros(count, np.int64),
        instructions=list(one.instructions),
        tokens=chunks.tokens.numpy(),
        log_prob=chunks.log_prob.numpy(),
        feature=chunks.feature.numpy(),
        valid=np.ones((count, 2), bool),
        episode=np.arange(count),
        success=success,
        steps=np.full(count, 2),
        group=np.zeros(count, np.int64),
        temperature=1.0,
        adapter_id="",
        specs=[EpisodeSpec("t", "go", 0, 2, s) for s in range(count)],
    )
    config = UpdateConfig(learning_rate=1e-3, minibatches=1, passes=3)
    updater = Updater(policy, lora.trainable(), config, torch.Generator().manual_seed(0))
    logged = updater.update(rollouts)
    assert logged["ratio_mean"] == pytest.approx(1.0, abs=0.2)
    with torch.no_grad():
        change = policy.log_prob(batch, chunks.tokens, 1.0)[0] - chunks.log_prob
    assert float(change[:4].sum()) > 0 > float(change[4:].sum())


def train(policy: FlowPolicy, steps: int) -> list[float]:
    """Eight observations, each with its own actions."""
    batch = samples.batch(policy, 8)
    generator = torch.Generator().manual_seed(5)
    actions = torch.randn(8, 2, 4, generator=generator) * torch.tensor([0.02, 0.03, 0.02, 1.0])
    optimizer = torch.optim.Adam(policy.network.parameters(), 2e-3)
    losses = []
    for _ in range(steps):
        noise, time = torch.randn(8, 2, 4, generator=generator), torch.rand(8, generator=generator)
        loss = policy.loss(batch, actions, noise, time).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    policy.base_changed()
    return losses


def test_training_learns_which_actions_belong_to_what_is_seen() -> None:
    policy = samples.flow()
    losses = train(policy, 400)
    assert np.mean(losses[-50:]) < 0.5 * np.mean(losses[:50])
    batch = samples.batch(policy, 8)
    generator = torch.Generator().manual_seed(5)
    wanted = torch.randn(8, 2, 4, generator=generator) * torch.tensor([0.02, 0.03, 0.02, 1.0])
    scale = torch.tensor(policy.statistics.action_scale)
    error = ((policy.predict(batch).actions - wanted) / scale).abs().mean()
    mixed = ((policy.predict(batch).actions - wanted.roll(1, 0)) / scale).abs().mean()
    assert float(error) < 0.5 * float(mixed)


# What is refused.


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"noise_level": 0.0}, "policy.bad_config"),
        ({"sample_steps": 0}, "policy.bad_config"),
        ({"order": "random"}, "policy.bad_config"),
        ({"time": "adaptive"}, "policy.bad_config"),
        ({"prompt": "do"}, "policy.bad_config"),
        ({"state": "words"}, "policy.bad_config"),
        ({"state": "none"}, "policy.bad_config"),
        ({"horizon": 1}, "policy.bad_config"),
        ({"action_width": 3}, "policy.bad_config"),
        ({"vision": "clip"}, "policy.unknown_vision_tower"),
        ({"vision_options": {"size": 3}}, "policy.bad_config"),
        ({"vocabulary": 20}, "policy.wrong_vocabulary"),
        ({"images": {"resize": "none"}}, "policy.bad_config"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(RatchetError) as refused:
        samples.flow(**changes)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"action_scale": (0.02, 0.0, 0.02, 1.0)}, "policy.missing_statistics"),
        ({"action_offset": (0.0, math.inf, 0.0, 0.0)}, "policy.missing_statistics"),
        ({"state_offset": ()}, "policy.missing_statistics"),
        ({"key": "another"}, "policy.wrong_statistics"),
        ({"units": ("rad", "m", "m", "1")}, "policy.wrong_statistics"),
    ],
)
def test_statistics_that_are_refused(changes: dict[str, Any], code: str) -> None:
    policy = samples.flow()
    with pytest.raises(RatchetError) as refused:
        FlowPolicy(policy.config, policy.spec, samples.flow_statistics(policy.spec, **changes), policy.tokenizer)
    assert refused.value.code == code


# Folders, and training by the command's own trainer.


def test_a_saved_flow_policy_is_the_same_policy(tmp_path: Path) -> None:
    policy = samples.flow(crossed=2, order="causal", state="prefix")
    checkpoint.save(policy, tmp_path)
    again = checkpoint.load(tmp_path)
    assert isinstance(again, FlowPolicy)
    assert again.base_hash == policy.base_hash
    batch = samples.batch(policy)
    assert torch.equal(again.predict(batch).actions, policy.predict(batch).actions)
    with pytest.raises(RatchetError) as refused:
        checkpoint.load_discrete(tmp_path)
    assert refused.value.code == "policy.wrong_kind"
    raw = json.loads((tmp_path / "config.json").read_text())
    for change, code in (
        ({"statistics": None}, "policy.missing_statistics"),
        ({"kind": "diffusion"}, "policy.bad_checkpoint"),
        ({"model": {**raw["model"], "language": {"width": 3}}}, "policy.bad_checkpoint"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
        with pytest.raises(RatchetError) as refused:
            checkpoint.load(tmp_path)
        assert refused.value.code == code


@dataclass
class Drawers:
    """Sixty frames in two colours, and the colour says which way to move."""

    tasks = ("t",)
    instructions = ("open the drawer",)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(0)
        side = generator.integers(0, 2, 60)
        self.images = np.full((60, 1, 32, 32, 3), 40, np.uint8)
        self.images[side == 1] = 200
        self.images += generator.integers(0, 20, self.images.shape, np.uint8)
        size = samples.flow_spec().state_size
        self.state = generator.normal(0, 1, (60, size)).astype(np.float32)
        way = np.where(side == 1, 1.0, -1.0)[:, None, None] * np.array([0.02, -0.03, 0.01, 1.0])
        self.actions = (way + generator.normal(0, 0.001, (60, 2, 4))).astype(np.float32)
        self.task, self.start = np.zeros(60, np.int64), np.arange(60)

    def __len__(self) -> int:
        return 60


def test_the_trainer_of_the_small_policy_trains_the_flow_policy_too(tmp_path: Path) -> None:
    """The loss falls, prediction and samples find the way that the image shows, and a killed run goes on."""
    data = Drawers()

    def trainer() -> Pretrainer:
        spec = samples.flow_spec()
        numbers = small_statistics(data.actions, data.state, spec)
        policy = FlowPolicy(samples.flow().config, spec, numbers, samples.TOKENIZER)
        policy.network.load_state_dict(samples.flow().network.state_dict())
        config = PretrainConfig(steps=120, batch=16, save_every=60, shift=0)
        return Pretrainer(policy, list(policy.network.parameters()), data, config, tmp_path)  # type: ignore[arg-type]

    reports: list[Progress] = []

    def die(report: Progress) -> None:
        reports.append(report)
        if report.step == 80:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer().run(die, every=20)
    resumed = trainer()
    resumed.run(reports.append, every=20)
    assert [r.step for r in reports] == [20, 40, 60, 80, 80, 100, 120]
    assert reports[3].loss == reports[4].loss
    assert reports[-1].validation_loss < 0.5 * reports[0].validation_loss
    assert reports[-1].validation_error < 0.4  # deviations of the data; guessing gives 1
    policy = resumed.policy
    batch = PolicyInput(data.images[:8], torch.from_numpy(data.state[:8]), ["open the drawer"] * 8)
    drawn = policy.sample(batch, 0.5, uniform(policy, 8)).actions
    assert (
        float((torch.sign(drawn[:, 0, 3]) == torch.sign(torch.from_numpy(data.actions[:8, 0, 3]))).float().mean()) > 0.8
    )


# In the policy's process.


def test_the_server_gives_chains_whole_and_goes_on_from_what_runs() -> None:
    """What a recorder gets must be the chain itself, and real-time chunking counts in the policy's own numbers."""
    policy = samples.flow(steps=20)
    robot = RobotContract.load(samples.ROOT / "robots/metaworld.yaml")
    cameras = tuple(dataclasses.replace(c, width=32, height=32) for c in robot.cameras)
    gripper = GripperSpec(robot.action.gripper.dim, open=1.0, closed=-1.0)  # type: ignore[union-attr]
    turned = dataclasses.replace(robot, cameras=cameras, action=dataclasses.replace(robot.action, gripper=gripper))
    server = PolicyServer(policy, turned, None, None)
    batch = samples.batch(policy, 1)
    images, state = [np.asarray(batch.images[0, 0])], batch.state[0].numpy()  # type: ignore[index]
    noise = uniform(policy, 1)
    drawn = server.infer(images, state, batch.instructions[0], 1.0, noise[0].numpy(), None)
    expected = policy.sample(batch, 1.0, noise)
    assert drawn.tokens is not None
    assert drawn.tokens.dtype == np.float32
    assert drawn.tokens.shape == policy.sampled_shape
    np.testing.assert_array_equal(drawn.tokens, expected.tokens[0].numpy())  # type: ignore[index]
    log_prob = policy.log_prob(batch, torch.from_numpy(drawn.tokens)[None], 1.0)[0]
    assert drawn.log_prob is not None
    np.testing.assert_allclose(drawn.log_prob, log_prob[0].detach().numpy(), atol=1e-4)
    # The running plan, in the robot's numbers; its gripper is turned round for the policy.
    free = server.infer(images, state, batch.instructions[0], 0.0, None, None).actions
    step = np.array([0.012, -0.018, 0.012, 0.4], np.float32)
    held = server.infer(images, state, batch.instructions[0], 0.0, None, Ahead(free + step, 2)).actions
    assert (np.abs(held - free - step) < 0.4 * np.abs(step)).all()
