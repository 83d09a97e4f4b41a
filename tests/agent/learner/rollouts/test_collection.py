"""A frame paired with another decision's tokens teaches nonsense without an error; this file pins the pairing.

Pinned: every row's image, state, tokens, log-probability and validity belong to one decision of one episode; an episode
does not depend on how many others run beside it; noise keeps each token's distribution.
Determinism: frames encode initial state and step, noise comes from the episode's seed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.specs import EpisodeSpec
from ratchet_vla.policy.noise import chunk_noise
from tests import fakes
from tests.agent.learner.runs import fake_env, tiny_policy


def specs(count: int) -> list[EpisodeSpec]:
    return [EpisodeSpec("door-open", "open the door", 100 + i, 12, seed=1000 + i, group=i // 2) for i in range(count)]


def play(count: int, workers: int, slots: int) -> RolloutBatch:
    env = fake_env(workers, slots)
    try:
        _, batch = run_episodes(tiny_policy(), env, specs(count), temperature=1.0, adapter_id="x")
    finally:
        env.close()
    assert batch is not None
    return batch


@pytest.fixture(scope="module")
def batch() -> RolloutBatch:
    return play(9, 2, 2)


def test_rows_belong_together(batch: RolloutBatch) -> None:
    policy = tiny_policy()
    position = np.zeros(3)
    for row in range(len(batch.tokens)):
        episode = batch.episode[row]
        first = row == 0 or batch.episode[row - 1] != episode
        if first:
            steps, position = 0, np.array([batch.specs[episode].initial_state % 7, 0.0, 0.0]) * 0.001
        assert batch.images[row, 0, 0, 0, 0] == batch.specs[episode].initial_state % 256
        assert batch.images[row, 0, 0, 1, 0] == steps
        np.testing.assert_allclose(batch.state[row, :3], position, atol=1e-6)
        chunk = policy.actions_of(torch.from_numpy(batch.tokens[row])).numpy()
        ran = int(batch.valid[row].sum())
        assert batch.valid[row, :ran].all()
        position = position + chunk[:ran, :3].astype(np.float64).sum(0)
        steps += ran
    assert batch.success.any()
    assert not batch.success.all()


def test_log_probabilities_are_those_of_the_tokens(batch: RolloutBatch) -> None:
    rows = np.arange(len(batch.tokens))
    log_prob, _ = tiny_policy().log_prob(batch.policy_input(rows), torch.from_numpy(batch.tokens), 1.0)
    np.testing.assert_allclose(log_prob.detach().numpy(), batch.log_prob, atol=1e-4)


@pytest.mark.parametrize(("workers", "slots"), [(1, 1), (1, 4), (3, 2)])
def test_an_episode_does_not_depend_on_its_neighbours(batch: RolloutBatch, workers: int, slots: int) -> None:
    other = play(9, workers, slots)
    np.testing.assert_array_equal(other.success, batch.success)
    np.testing.assert_array_equal(other.steps, batch.steps)
    np.testing.assert_array_equal(other.tokens, batch.tokens)
    np.testing.assert_array_equal(other.images, batch.images)


@pytest.mark.parametrize(
    ("changes", "temperature", "code"),
    [
        ({"instruction": " "}, 1.0, "goal.no_instruction"),
        ({"task": ""}, 1.0, "goal.no_task"),
        ({"horizon": 0}, 1.0, "rollout.bad_horizon"),
        ({}, float("nan"), "goal.bad_temperature"),
    ],
)
def test_episodes_that_nobody_could_earn_are_refused_before_any_runs(
    changes: dict[str, Any], temperature: float, code: str
) -> None:
    env = fake_env()
    wanted = [*specs(1), dataclasses.replace(specs(1)[0], **changes)]
    try:
        with pytest.raises(RatchetError) as caught:
            run_episodes(tiny_policy(), env, wanted, temperature=temperature)
    finally:
        env.close()
    assert caught.value.code == code


def test_an_initial_state_that_is_solved_already_is_refused() -> None:
    env = ChunkVectorEnv(
        "metaworld", cameras=("corner2",), state_fields=("hand", "gripper"), chunk=4, workers=1, slots_per_worker=1,
        make_env=fakes.make_solved,
    )  # fmt: skip
    try:
        with pytest.raises(RatchetError, match=r"goal\.already_solved.*door-open, initial state 100"):
            run_episodes(tiny_policy(), env, specs(1), temperature=1.0)
    finally:
        env.close()


def test_greedy_episodes_cannot_be_learned_from() -> None:
    env = fake_env()
    try:
        with pytest.raises(RatchetError, match=r"rollout\.greedy_batch"):
            run_episodes(tiny_policy(), env, specs(1), temperature=0.0)
        outcomes, nothing = run_episodes(tiny_policy(), env, specs(3), temperature=0.0, keep=False)
    finally:
        env.close()
    assert nothing is None
    assert (outcomes.steps > 0).all()


def test_an_empty_list_is_refused() -> None:
    env = fake_env()
    try:
        with pytest.raises(RatchetError, match=r"rollout\.no_episodes"):
            run_episodes(tiny_policy(), env, [], temperature=1.0)
    finally:
        env.close()


def test_actions_that_are_not_finite_never_reach_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    monkeypatch.setattr(policy, "actions_of", lambda tokens: torch.full((*tokens.shape,), torch.nan))
    env = fake_env()
    try:
        with pytest.raises(RatchetError, match=r"rollout\.not_finite"):
            run_episodes(policy, env, specs(2), temperature=1.0)
        assert not env.arrays["actions"].any()
    finally:
        env.close()


def test_commands_are_in_the_robots_gripper_numbers(batch: RolloutBatch) -> None:
    """The same tokens, from a policy that calls open 0 and closed 1 where the robot says -1 and 1."""
    policy = tiny_policy()
    policy._spec = dataclasses.replace(policy.spec, gripper_open=0.0, gripper_closed=1.0)
    env = fake_env(1, 1)
    try:
        _, other = run_episodes(policy, env, specs(1), temperature=1.0)
        sent = env.arrays["actions"][0].copy()
    finally:
        env.close()
    assert other is not None
    np.testing.assert_array_equal(other.tokens, batch.tokens[batch.episode == 0])
    own = policy.actions_of(torch.from_numpy(other.tokens[-1])).numpy()
    np.testing.assert_allclose(sent[:, 3], 2 * own[:, 3] - 1, atol=1e-6)
    np.testing.assert_array_equal(sent[:, :3], own[:, :3])


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_noise_is_uniform_and_correlates_within_a_chunk_only(correlation: float) -> None:
    generator = np.random.default_rng(0)
    noise = np.stack([chunk_noise(generator, (5, 4), correlation) for _ in range(20_000)])
    assert noise.dtype == np.float32
    assert noise.min() >= 0
    assert noise.max() < 1
    counts, _ = np.histogram(noise[:, 2, 1], bins=20, range=(0, 1))
    assert abs(counts / 1000 - 1).max() < 0.15  # five standard deviations of a uniform count
    # Spearman's correlation of a Gaussian copula: 6 / pi asin(rho / 2).
    expected = 6 / np.pi * np.arcsin(correlation / 2)
    assert np.corrcoef(noise[:, 0, 1], noise[:, 4, 1])[0, 1] == pytest.approx(expected, abs=0.03)
    assert np.corrcoef(noise[:, 0, 0], noise[:, 0, 1])[0, 1] == pytest.approx(0, abs=0.03)
