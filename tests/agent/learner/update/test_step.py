"""The one place where weights change: a sign error here un-learns quietly.

Pinned: an update makes the tokens of successful episodes likelier than those of failed ones; micro-batches change
memory and not the result; refusals leave the adapter bit-identical. Determinism: fixed policy, seeded order.
"""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.update.step import UpdateConfig, Updater, pad
from tests.agent.learner.rollouts.test_collection import specs
from tests.agent.learner.runs import fake_env, tiny_with_adapter


@pytest.fixture(scope="module")
def batch() -> RolloutBatch:
    policy, _ = tiny_with_adapter()
    env = fake_env(2, 4)
    try:
        _, made = run_episodes(policy, env, specs(24), temperature=1.0, adapter_id="x")
    finally:
        env.close()
    assert made is not None
    return made


def updated(batch: RolloutBatch, config: UpdateConfig) -> tuple[dict[str, torch.Tensor], dict[str, float], float]:
    """Adapter after one update, what was logged, and how much likelier successes became than failures (nats/token)."""
    policy, lora = tiny_with_adapter()
    updater = Updater(policy, lora.trainable(), config, torch.Generator().manual_seed(0))
    logged = updater.update(batch)
    with torch.no_grad():
        log_prob, _ = policy.log_prob(
            batch.policy_input(np.arange(len(batch.tokens))), torch.from_numpy(batch.tokens), 1.0
        )
    change = (log_prob.numpy() - batch.log_prob)[batch.valid]
    won = batch.success[batch.episode][:, None].repeat(batch.valid.shape[1], 1)[batch.valid]
    return lora.export(), logged, float(change[won].mean() - change[~won].mean())


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_successes_become_likelier_than_failures(batch: RolloutBatch, algorithm: str) -> None:
    assert 0 < batch.success.mean() < 1
    grouped = dataclasses.replace(batch, group=np.zeros(len(batch.success), np.int64))
    _, logged, change = updated(grouped, UpdateConfig(algorithm=algorithm, learning_rate=1e-3, minibatches=2))  # type: ignore[arg-type]
    assert change > 0
    assert logged["optimizer_steps"] == 2
    assert logged["approx_kl"] >= 0


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_micro_batches_change_memory_only(batch: RolloutBatch, algorithm: str) -> None:
    grouped = dataclasses.replace(batch, group=np.zeros(len(batch.success), np.int64))
    # Plain gradient size matters here: Adam's first step would turn rounding into full steps where gradients vanish.
    config = UpdateConfig(algorithm=algorithm, learning_rate=1e-3, minibatches=1, adam_epsilon=1e-2)  # type: ignore[arg-type]
    whole, _, _ = updated(grouped, dataclasses.replace(config, micro_size=10_000))
    parts, _, _ = updated(grouped, dataclasses.replace(config, micro_size=7))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-7)


def test_unanimous_groups_change_nothing(batch: RolloutBatch) -> None:
    policy, lora = tiny_with_adapter()
    before = lora.adapter(binding_of(policy)).id
    updater = Updater(policy, lora.trainable(), UpdateConfig(), torch.Generator().manual_seed(0))
    failures = dataclasses.replace(batch, success=np.zeros_like(batch.success))
    with pytest.raises(RatchetError, match=r"learner\.no_samples"):
        updater.update(failures)
    assert lora.adapter(binding_of(policy)).id == before


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_an_interrupted_optimiser_goes_on_where_it_was(batch: RolloutBatch, algorithm: str) -> None:
    grouped = dataclasses.replace(batch, group=np.zeros(len(batch.success), np.int64))
    config = UpdateConfig(algorithm=algorithm, learning_rate=1e-3, minibatches=2, warmup_steps=6)  # type: ignore[arg-type]
    policy, lora = tiny_with_adapter()
    updater = Updater(policy, lora.trainable(), config, torch.Generator().manual_seed(0))
    updater.update(grouped)
    tensors = {n: t.clone() for n, t in lora.export().items()}
    state = copy.deepcopy(updater.state_dict())
    updater.update(grouped)

    policy_after, lora_after = tiny_with_adapter()
    lora_after.load(tensors)
    resumed = Updater(policy_after, lora_after.trainable(), config, torch.Generator())
    resumed.load_state_dict(state)
    resumed.update(grouped)
    assert lora_after.adapter(binding_of(policy_after)).id == lora.adapter(binding_of(policy)).id


def test_warm_up_makes_the_first_step_smaller_by_its_factor(batch: RolloutBatch) -> None:
    grouped = dataclasses.replace(batch, group=np.zeros(len(batch.success), np.int64))
    moved = {}
    for warmup in (0, 3):
        policy, lora = tiny_with_adapter()
        before = {n: t.clone() for n, t in lora.export().items()}
        config = UpdateConfig(learning_rate=1e-3, minibatches=1, weight_decay=0.0, warmup_steps=warmup)
        Updater(policy, lora.trainable(), config, torch.Generator().manual_seed(0)).update(grouped)
        moved[warmup] = sum(float((t - before[n]).abs().sum()) for n, t in lora.export().items())
    assert moved[3] == pytest.approx(moved[0] / 4, rel=1e-3)


def test_a_gradient_that_is_not_finite_takes_no_step(batch: RolloutBatch) -> None:
    policy, lora = tiny_with_adapter()
    before = lora.adapter(binding_of(policy)).id
    config = UpdateConfig(algorithm="ppo", minibatches=1)
    broken = dataclasses.replace(batch, log_prob=np.full_like(batch.log_prob, np.nan))
    with pytest.raises(RatchetError, match=r"learner\.not_finite"):
        Updater(policy, lora.trainable(), config, torch.Generator().manual_seed(0)).update(broken)
    assert lora.adapter(binding_of(policy)).id == before


def test_target_kl_stops_the_pass(batch: RolloutBatch) -> None:
    grouped = dataclasses.replace(batch, group=np.zeros(len(batch.success), np.int64))
    config = UpdateConfig(learning_rate=1e-2, minibatches=4, passes=3, target_kl=1e-6)
    _, logged, _ = updated(grouped, config)
    # The first step sees the sampling policy itself, so its KL is rounding; a later one sees a moved policy.
    assert logged["optimizer_steps"] < 12


def test_nothing_to_train_is_refused() -> None:
    policy, _ = tiny_with_adapter()
    with pytest.raises(RatchetError, match=r"learner\.no_parameters"):
        Updater(policy, [], UpdateConfig(), torch.Generator())


def test_padding_puts_every_decision_in_its_episode(batch: RolloutBatch) -> None:
    padded = pad(batch)
    for episode in range(len(batch.success)):
        rows = np.flatnonzero(batch.episode == episode)
        assert padded.row[episode, : len(rows)].tolist() == rows.tolist()
        assert not padded.present[episode, len(rows) :].any()
        np.testing.assert_array_equal(padded.valid[episode, : len(rows)].numpy(), batch.valid[rows])
