"""What may enter an update decides whether learning is on-policy: every way to be off it is refused with its reason.

Pinned: one code per reason, waiting without a label, trust only in the simulator and named people, masks of
interventions and safety. Also that a rollout survives the way through records: to episodes, and back to the same batch.
Deterministic: values built by hand, one small rollout in a fake environment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.learner.small_world import TASKS, FakeChunkEnv, contract, tiny_policy
from ratchet_vla.episodes.file.checking import check_chunk
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.admission import AdmissionCriteria, admission_of, sampled
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.samples import log_prob_gap, to_batch, to_episodes
from ratchet_vla.learner.rollouts.specs import training_specs
from ratchet_vla.policy import presets
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.flow.statistics import FlowStatistics
from ratchet_vla.policy.noise import chunk_noise
from ratchet_vla.records import ActionChunk, Episode, Observation, Step

ADAPTER = "a" * 64
CRITERIA = AdmissionCriteria("door-open", ADAPTER, 1.0, "open the door", "run/1", 4)


def episode(steps: int = 2) -> Episode:
    found = Episode("door-open", "open the door", success=True, success_source="simulator", adapter_id=ADAPTER)
    found.termination = "success"
    for n in range(steps):
        seen = Observation({}, {}, "open the door", float(n), n)
        chunk = ActionChunk(
            np.zeros((3, 2), np.float32), np.zeros((3, 2), np.int64), np.full((3, 2), -1.0, np.float32),
            ADAPTER, 1.0, float(n), n,
        )  # fmt: skip
        found.steps.append(Step(seen, chunk, np.ones(3, bool), 0.0, n == steps - 1, 3))
    found.meta = {"order": "run/1", "slot": 2}
    return found


def change(field: str, value: Any) -> Callable[[Episode], None]:
    def apply(found: Episode) -> None:
        chunk = dataclasses.replace(found.steps[1].chunk, **{field: value})
        found.steps[1] = dataclasses.replace(found.steps[1], chunk=chunk)

    return apply


def every(field: str, value: Any) -> Callable[[Episode], None]:
    def apply(found: Episode) -> None:
        chunks = [dataclasses.replace(s.chunk, **{field: value}) for s in found.steps]
        found.steps = [dataclasses.replace(s, chunk=c) for s, c in zip(found.steps, chunks, strict=True)]

    return apply


def drove(found: Episode) -> None:
    found.steps = [dataclasses.replace(s, executed=np.zeros(3, bool)) for s in found.steps]


def told(found: Episode) -> None:
    seen = dataclasses.replace(found.steps[1].observation, instruction="open the window")
    found.steps[1] = dataclasses.replace(found.steps[1], observation=seen)


CASES: dict[str, Callable[[Episode], None]] = {
    "empty": lambda e: e.steps.clear(),
    "mixed_adapters": change("adapter_id", "b" * 64),
    "other_adapter": every("adapter_id", "b" * 64),
    "false_adapter": lambda e: setattr(e, "adapter_id", "b" * 64),
    "other_task": lambda e: setattr(e, "task", "push"),
    "other_instruction": told,
    "no_log_prob": change("log_prob", None),
    "other_temperature": change("temperature", 0.0),
    "not_finite": change("log_prob", np.full((3, 2), np.nan, np.float32)),
    "other_dtype": change("compute_dtype", "bfloat16"),
    "nothing_sampled": drove,
    "not_ordered": lambda e: e.meta.update(order="run/0"),
    "doubled": lambda e: e.meta.update(slot=1),
    "untrusted_success": lambda e: setattr(e, "success_source", "detector"),
    "unearned_success": lambda e: setattr(e, "termination", "cancelled"),
}


def test_a_fitting_episode_is_accepted_into_its_slot() -> None:
    admission = admission_of(episode(), CRITERIA, {1})
    assert (admission.decision, admission.slot) == ("accepted", 2)


@pytest.mark.parametrize("code", CASES)
def test_every_misfit_is_kept_for_replay_with_its_reason(code: str) -> None:
    found = episode()
    CASES[code](found)
    admission = admission_of(found, CRITERIA, {1})
    assert (admission.decision, admission.code) == ("replay", f"inbox.{code}")
    assert admission.reason


def test_one_update_takes_episodes_of_one_dtype_and_says_which_two_met() -> None:
    found = episode()
    every("compute_dtype", "float32")(found)
    assert admission_of(found, dataclasses.replace(CRITERIA, compute_dtype="float32"), {1}).decision == "accepted"
    admission = admission_of(found, dataclasses.replace(CRITERIA, compute_dtype="bfloat16"), {1})
    assert (admission.decision, admission.code) == ("replay", "inbox.other_dtype")
    assert "bfloat16 and float32" in admission.reason
    unrecorded = admission_of(found, dataclasses.replace(CRITERIA, compute_dtype=""), {1})
    assert "an unrecorded dtype" in unrecorded.reason


@pytest.mark.parametrize("slot", [-1, 4, 99])
def test_a_slot_that_was_not_ordered_is_none(slot: int) -> None:
    found = episode()
    found.meta["slot"] = slot
    assert admission_of(found, CRITERIA, set()).code == "inbox.not_ordered"


@pytest.mark.parametrize("source", ["simulator", "human:anna"])
def test_trusted_labels(source: str) -> None:
    found = episode()
    found.success_source = source
    assert admission_of(found, CRITERIA, set()).decision == "accepted"


@pytest.mark.parametrize("source", ["", "human:", "policy", "human", "Simulator"])
def test_other_labels_are_not_trusted(source: str) -> None:
    found = episode()
    found.success_source = source
    assert admission_of(found, CRITERIA, set()).code == "inbox.untrusted_success"


def test_a_person_may_judge_what_no_machine_could() -> None:
    found = episode()
    found.termination, found.success_source = "cancelled", "human:anna"
    assert admission_of(found, CRITERIA, set()).decision == "accepted"


def test_without_a_label_it_waits() -> None:
    found = episode()
    found.success, found.success_source = None, ""
    assert admission_of(found, CRITERIA, set()).decision == "waiting"


def test_log_probabilities_of_actions_that_were_not_executed_may_be_anything() -> None:
    found = episode()
    log_prob = np.full((3, 2), -1.0, np.float32)
    log_prob[2] = np.nan
    chunk = dataclasses.replace(found.steps[1].chunk, log_prob=log_prob)
    found.steps[1] = dataclasses.replace(found.steps[1], chunk=chunk, executed=np.array([True, True, False]))
    assert admission_of(found, CRITERIA, set()).decision == "accepted"


def test_masks_join_what_ran_and_what_was_sampled() -> None:
    step = dataclasses.replace(episode().steps[0], executed=np.array([True, False, True]), steps_run=2)
    assert sampled(step).tolist() == [True, False, False]


def test_on_a_robot_no_order_is_needed() -> None:
    found = episode()
    found.meta = {}
    assert admission_of(found, dataclasses.replace(CRITERIA, request_id="", slots=0), set()).slot == -1


def tiny_flow() -> FlowPolicy:
    """A flow policy with padding in both directions, for the fake environment."""
    made, _ = tiny_policy()
    spec = dataclasses.replace(made.spec, bins=0)
    config = dataclasses.replace(
        presets.small_flow(
            state=4, actions=6, chunk=5, hidden=32, expert=32, layers=1, heads=2, channels=(8, 8, 8, 16),
            compute_dtype="float32",
        ),
        vocabulary=300,
    )  # fmt: skip
    numbers = FlowStatistics(
        "fake", spec.action_units, (0.02, 0, 0, 0), (0.03, 0.02, 0.02, 1.0), (0.0,) * 4, (0.1,) * 4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FlowPolicy(config, spec, numbers, made.tokenizer)


@pytest.mark.parametrize("make", [lambda: tiny_policy()[0], tiny_flow], ids=["bins", "chains"])
def test_a_rollout_survives_the_way_through_records(make: Callable[[], PrismaticPolicy | FlowPolicy]) -> None:
    torch.set_num_threads(1)
    policy = make()
    specs = training_specs(TASKS["door-open"], seed=0, stage=0, update=0, groups=2, group_size=3)
    _, batch = run_episodes(policy, FakeChunkEnv(), specs, temperature=1.0, adapter_id=ADAPTER)
    assert batch is not None
    episodes = to_episodes(batch, specs, policy, contract())
    again = to_batch(episodes, [s.group for s in specs], policy, features=True)
    for name in (
        "images",
        "state",
        "instruction",
        "tokens",
        "log_prob",
        "valid",
        "episode",
        "success",
        "steps",
        "group",
    ):
        assert np.array_equal(getattr(again, name), getattr(batch, name)), name
    assert (again.instructions, again.temperature, again.adapter_id) == (batch.instructions, 1.0, ADAPTER)
    assert np.abs(again.feature - batch.feature).max() < 1e-4
    assert log_prob_gap(again, policy) < 1e-4
    assert {s.chunk.actions.dtype for e in episodes for s in e.steps} == {np.dtype(np.float32)}
    # The actions of the records are those that were sampled, and the recording takes them.
    first = np.zeros(1, np.int64)
    noise = torch.from_numpy(chunk_noise(np.random.Generator(np.random.Philox(key=specs[0].seed)), (4, 4), 0.0))[None]
    drawn = policy.sample(batch.policy_input(first), 1.0, noise).actions[0]
    np.testing.assert_allclose(episodes[0].steps[0].chunk.actions, drawn.numpy(), atol=1e-6)
    check_chunk(episodes[0].steps[0].chunk, contract())
    # Intervention: what a person drove has no gradient, the rest keeps it.
    episodes[0].steps[0].executed[1:] = False
    masked = to_batch(episodes, [s.group for s in specs], policy)
    assert masked.valid[0].tolist() == [True, False, False, False]
    assert np.array_equal(masked.valid[1:], batch.valid[1:])


def test_another_policy_is_noticed_by_its_numbers() -> None:
    torch.set_num_threads(1)
    policy, lora = tiny_policy()
    specs = training_specs(TASKS["door-open"], seed=0, stage=0, update=0, groups=1, group_size=2)
    _, batch = run_episodes(policy, FakeChunkEnv(), specs, temperature=1.0, adapter_id=ADAPTER)
    assert batch is not None
    with torch.no_grad():
        for parameter in lora.trainable():
            parameter.add_(0.3)
    assert log_prob_gap(batch, policy) > 0.05


def test_episodes_that_the_policy_cannot_take_are_refused() -> None:
    policy, _ = tiny_policy()
    with pytest.raises(RatchetError, match=r"learner\.bad_episode"):
        to_batch([episode()], [0], policy)
    mixed = [episode(), episode()]
    every("adapter_id", "b" * 64)(mixed[1])
    with pytest.raises(RatchetError, match=r"learner\.off_policy"):
        to_batch(mixed, [0, 0], policy)
