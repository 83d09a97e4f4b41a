"""A learner that works in one dtype alone works on half of the machines, and nobody notices on the other half.

Pinned, forced each way in turn on the same smallest model, whose checkpoint declares bfloat16: a few on-policy updates
raise success, the adapter is trained in float32, base and empty adapter have the same id, and a batch that was sampled
in one dtype is learned from in that dtype, whatever the learner itself would choose. Determinism: fixed weights, seeded
episodes and shuffles.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.lora.layers import Lora, attach, lora_config
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.samples import log_prob_gap, to_batch, to_episodes
from ratchet_vla.learner.rollouts.specs import EpisodeSpec
from ratchet_vla.learner.update.step import UpdateConfig, Updater
from ratchet_vla.policy.computing import VARIABLE, name_of
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from tests.agent.learner.runs import fake_env, tiny_policy

BOTH = ("float32", "bfloat16")
UPDATES = 6


def declared_bfloat16() -> tuple[PrismaticPolicy, Lora]:
    policy = tiny_policy("bfloat16")
    return policy, attach(policy.module, lora_config(4, 4.0))


@pytest.fixture(scope="module")
def env() -> Iterator[ChunkVectorEnv]:
    made = fake_env(1, 32)
    yield made
    made.close()


def sampled(policy: PrismaticPolicy, env: ChunkVectorEnv, update: int) -> RolloutBatch:
    """One update's episodes: eight starts, eight times each, with eight steps to get there."""
    specs = [
        EpisodeSpec("door-open", "open the door", 100 + start, 8, 1000 * update + 8 * start + i, group=0)
        for start in range(8)
        for i in range(8)
    ]
    _, batch = run_episodes(policy, env, specs, temperature=1.0, adapter_id="a", noise_correlation=0.8)
    assert batch is not None
    return batch


@pytest.mark.parametrize("dtype", BOTH)
def test_the_smallest_model_learns(dtype: str, env: ChunkVectorEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, dtype)
    policy, lora = declared_bfloat16()
    config = UpdateConfig(algorithm="ppo", learning_rate=2e-2, minibatches=4, passes=4)
    updater = Updater(policy, lora.trainable(), config, torch.Generator().manual_seed(0))
    rates = []
    for update in range(UPDATES):
        batch = sampled(policy, env, update)
        assert batch.compute_dtype == dtype
        rates.append(float(batch.success.mean()))
        updater.update(batch)
    rates.append(float(sampled(policy, env, UPDATES).success.mean()))
    assert rates[0] < 0.6
    assert rates[-1] > 0.8, rates
    assert {p.dtype for p in lora.trainable()} == {torch.float32}


def test_ids_are_the_same_both_ways(env: ChunkVectorEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = set()
    for dtype in BOTH:
        monkeypatch.setenv(VARIABLE, dtype)
        policy, lora = declared_bfloat16()
        policy.predict(sampled(policy, env, 0).policy_input(np.arange(2)))
        ids.add((policy.base_hash, lora.adapter(binding_of(policy)).id))
    assert len(ids) == 1


@pytest.mark.parametrize(("robot", "learner"), [BOTH, BOTH[::-1]])
def test_a_batch_is_learned_from_in_the_robots_dtype(
    robot: str, learner: str, env: ChunkVectorEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, robot)
    there, its_lora = declared_bfloat16()
    batch = sampled(there, env, 0)
    same = Updater(there, its_lora.trainable(), UpdateConfig(algorithm="ppo"), torch.Generator().manual_seed(0))
    same.update(batch)

    monkeypatch.setenv(VARIABLE, learner)
    here, lora = declared_bfloat16()
    assert name_of(here) == learner
    assert log_prob_gap(batch, here) < 1e-5  # recomputed as the robot did; in its own dtype it would be off
    updater = Updater(here, lora.trainable(), UpdateConfig(algorithm="ppo"), torch.Generator().manual_seed(0))
    updater.update(batch)
    assert name_of(here) == learner
    for name, tensor in its_lora.export().items():
        assert torch.equal(tensor, lora.export()[name])


def test_the_dtype_travels_with_the_episodes(env: ChunkVectorEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "bfloat16")
    policy, _ = declared_bfloat16()
    batch = sampled(policy, env, 0)
    episodes = to_episodes(batch, batch.specs, policy, env.contract)
    monkeypatch.setenv(VARIABLE, "float32")
    again = to_batch(episodes, list(batch.group), policy)
    assert again.compute_dtype == "bfloat16"
