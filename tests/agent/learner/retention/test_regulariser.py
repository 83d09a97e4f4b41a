"""Learning one task must not cost another: what holds the adapter has to hold, at no other task's expense, and resume.

Pinned: with a strong reference a step moves the adapter less on other tasks than without; tasks that are learned or
held out never stand in the reference; earlier tasks' own successes are held within a memory budget; a run that was
stopped goes on to the same numbers; the loss does not depend on the micro-batch. Determinism: fixed weights and seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.methods.full import FullFineTuning
from ratchet_vla.learner.retention.regulariser import Retention, RetentionConfig, reference_for
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.sequence import Stop
from tests.agent.learner.methods.test_methods import outcome
from tests.agent.learner.retention.samples import decisions
from tests.agent.learner.retention.test_divergence import moved
from tests.agent.learner.runs import CONFIG, start, tiny_policy, tiny_with_adapter
from tests.agent.learner.test_sequence import quiet

TASK = CONFIG.tasks[0]


def retention(count: int = 24, **config: Any) -> Retention:
    return Retention(decisions(tiny_policy(), count), RetentionConfig(**config), identity="f" * 64)


def rollout(success: list[bool], chunks: int = 3) -> RolloutBatch:
    """Episodes of random observations, `chunks` decisions each."""
    count = chunks * len(success)
    data = decisions(tiny_policy(), count, (TASK,))
    none = np.zeros((count, 0), np.float32)
    return RolloutBatch(
        images=data.images,
        state=data.state,
        instruction=data.instruction,
        instructions=list(data.instructions),
        tokens=data.sampled,
        log_prob=np.zeros(data.sampled.shape, np.float32),
        feature=none,
        valid=np.ones(data.sampled.shape[:2], bool),
        episode=np.repeat(np.arange(len(success)), chunks),
        success=np.array(success),
        steps=np.full(len(success), 4 * chunks),
        group=np.zeros(len(success), np.int64),
        temperature=1.0,
        adapter_id="",
    )


def total(terms: Retention, seed: int = 0) -> float:
    return float(sum(loss.detach() for loss in terms.losses(torch.Generator().manual_seed(seed))))


def test_a_fresh_adapter_costs_nothing_and_a_moved_one_does() -> None:
    policy, lora = tiny_with_adapter()
    terms = retention()
    terms.bind(policy, lora, 0)
    assert abs(total(terms)) < 1e-3
    moved(lora)
    assert total(terms) > 1e-2


def test_the_targets_are_the_bases_whatever_the_adapter_is_by_then() -> None:
    policy, lora = tiny_with_adapter()
    early = retention()
    early.bind(policy, lora, 0)
    total(early)  # computes its targets while the adapter is empty
    moved(lora)
    late = retention()
    late.bind(policy, lora, 0)
    assert total(late) == pytest.approx(total(early), rel=1e-6)


def test_micro_batches_change_memory_and_not_the_gradient() -> None:
    gradients = []
    for micro in (64, 5):
        policy, lora = tiny_with_adapter()
        terms = Retention(decisions(policy), RetentionConfig(), micro_size=micro)
        terms.bind(policy, lora, 0)
        total(terms)
        moved(lora)
        for loss in terms.losses(torch.Generator().manual_seed(0)):
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in lora.trainable() if p.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


def test_what_is_learned_or_held_out_never_stands_in_the_reference() -> None:
    data = decisions(tiny_policy(), 12, ("push", "pull", "door"))
    left = reference_for(data, ["push"], ["pull the block"])
    assert left is not None
    assert left.present_tasks == ("door",)
    with pytest.raises(RatchetError) as refused:
        Retention(reference_for(data, ["push", "pull"], ["door"]), RetentionConfig())
    assert refused.value.code == "reference.empty"


def test_only_successes_of_the_newest_update_are_kept() -> None:
    policy, lora = tiny_with_adapter()
    terms = Retention(None, RetentionConfig())
    terms.bind(policy, lora, 0)
    terms.begin_task()
    terms.after_update(rollout([True, False, True]), TASK)
    terms.after_update(rollout([False, False, False]), TASK)  # nothing to keep: the earlier ones stay
    terms.end_task(TASK)
    held = terms.state_dict()["own"][TASK]
    assert len(held["instruction"]) == 6
    assert abs(total(terms)) < 1e-3
    moved(lora)
    assert total(terms) > 1e-2


def test_earlier_tasks_share_one_budget() -> None:
    policy, lora = tiny_with_adapter()
    data = rollout([True] * 20)
    terms = Retention(None, RetentionConfig(own_megabytes=0.5))
    terms.bind(policy, lora, 0)
    for task in ("one", "two", "three"):
        terms.begin_task()
        terms.after_update(data, task)
        terms.end_task(task)
        held = terms.state_dict()["own"]
        size = sum(t.nbytes for part in held.values() for t in part.values() if isinstance(t, torch.Tensor))
        assert size <= 0.5e6
    assert {len(part["instruction"]) for part in held.values()} == {len(held["one"]["instruction"])}


@pytest.mark.parametrize("field", ["reference_weight", "own_weight", "reference_decisions", "own_megabytes"])
def test_a_setting_without_sense_is_refused(field: str) -> None:
    with pytest.raises(RatchetError) as refused:
        RetentionConfig(**{field: -1})
    assert refused.value.code == "learn.bad_setting"


def test_a_method_without_a_base_beside_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RatchetError) as refused:
        start(tmp_path, quiet, method=FullFineTuning(), retention=retention())
    assert refused.value.code == "learn.cannot_retain"


def test_a_stopped_run_goes_on_to_the_same_numbers_and_not_without_its_reference(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    expected = outcome(whole, start(whole, quiet, retention=retention()))
    plain = tmp_path / "plain"
    assert outcome(plain, start(plain, quiet))["ids"] != expected["ids"], "the reference changed nothing"
    updates = 0

    def stop(kind: str, facts: dict[str, Any]) -> None:
        nonlocal updates
        updates += kind == "update"
        if updates == 3:  # in the second task, with successes of the first
            raise Stop

    halves = tmp_path / "halves"
    with pytest.raises(Stop):
        start(halves, stop, retention=retention())
    with pytest.raises(RatchetError) as refused:
        start(halves, quiet)
    assert refused.value.code == "learn.changed_run"
    assert outcome(halves, start(halves, quiet, retention=retention())) == expected


def test_a_strong_reference_keeps_the_adapter_nearer_to_the_base(tmp_path: Path) -> None:
    distances = {}
    for name, weight in (("plain", 0.0), ("held", 30.0)):
        folder = tmp_path / name
        run = start(folder, quiet, retention=retention(reference_weight=weight, own_weight=0.0))
        probe = Retention(decisions(run.policy, 24), RetentionConfig())
        probe.bind(run.policy, run.lora, 0)
        distances[name] = total(probe)
    assert distances["held"] < distances["plain"]
