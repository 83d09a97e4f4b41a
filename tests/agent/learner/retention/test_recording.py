"""A reference set is only as good as what it was made of: the base itself, on the tasks that were named, all of them.

Pinned: a recording holds what the base sampled (its own log-probabilities find the same tokens likely), every task
within its limit, the same numbers twice; episodes of a store give their own frames. Determinism: fixed seeds, a fake
simulator.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.retention.recording import RecordingConfig, decisions_by_task, from_episodes, record
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.samples import to_episodes
from ratchet_vla.learner.rollouts.specs import training_specs
from tests.agent.learner.runs import TASKS, fake_env, tiny_policy

CONFIG = RecordingConfig(episodes=3, decisions_per_task=5)


def test_a_recording_holds_every_task_within_its_limit_and_is_repeatable() -> None:
    policy = tiny_policy()
    seen: list[tuple[str, int, int]] = []
    recorded = []
    for _ in range(2):
        env = fake_env()
        try:
            tasks = list(TASKS.values())
            recorded.append(record(policy, env, tasks, CONFIG, "metaworld", lambda *facts: seen.append(facts)))
        finally:
            env.close()
    (first, origin), (second, _) = recorded
    assert decisions_by_task(first) == dict.fromkeys(TASKS, 5)
    assert origin.base_hash == policy.base_hash
    assert origin.episodes == 9
    assert 0 <= origin.success <= 1
    assert (TASKS["push"].name, 3, 3) in seen
    for field in dataclasses.fields(first):
        assert np.array_equal(getattr(first, field.name), getattr(second, field.name))


def test_stored_episodes_give_their_frames_whoever_decided() -> None:
    policy = tiny_policy()
    env = fake_env()
    specs = training_specs(TASKS["push"], seed=1, stage=0, update=0, groups=4, group_size=1)
    try:
        _, batch = run_episodes(policy, env, specs, temperature=1.0, adapter_id="c" * 64)
        assert batch is not None
        episodes = to_episodes(batch, specs, policy, env.contract)
    finally:
        env.close()
    decisions, origin = from_episodes(policy, episodes, 1000, 0, "store")
    assert origin.episodes == 4
    assert decisions.present_tasks == ("push",)
    assert np.array_equal(decisions.images, batch.images)
    assert np.array_equal(decisions.sampled, batch.tokens)
    with pytest.raises(RatchetError) as refused:
        from_episodes(policy, [], 10, 0, "store")
    assert refused.value.code == "reference.empty"
