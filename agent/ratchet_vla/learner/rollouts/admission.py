"""Admission of episodes to an update: one decision per episode, with a stable code and the reason in words.

Knows episodes, the adapter being updated and what was requested. Knows no file, no network and no optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ratchet_vla.episodes.success_rules import doubt
from ratchet_vla.learner.rollouts.batch import dtype_names
from ratchet_vla.records import Bool, Episode, Step

Decision = Literal["accepted", "waiting", "replay"]


@dataclass(frozen=True)
class AdmissionCriteria:
    """What an episode must be to be admitted at the moment.

    adapter_id: the adapter being updated; every action must come from it. temperature: of the sampling.
    compute_dtype: of the episodes that the next update has already; None while it has none.
    instruction: the task in words; what the policy was told must be the same.
    request_id, slots: in simulation, the rollout request's id and how many episodes it asks for; empty and 0 where any
    episode of the task is welcome (a real robot, whose initial states cannot be repeated).
    """

    task: str
    adapter_id: str
    temperature: float
    instruction: str
    request_id: str = ""
    slots: int = 0
    compute_dtype: str | None = None


@dataclass(frozen=True)
class Admission:
    """The decision on one episode.

    decision: accepted enters an update; waiting would, once somebody has judged its success; replay is kept, and never
        sampled for the policy gradient.
    code, reason: why it was not accepted. slot: place in the rollout request, -1 without one.
    """

    decision: Decision
    code: str = ""
    reason: str = ""
    slot: int = -1


def admission_of(episode: Episode, criteria: AdmissionCriteria, filled: frozenset[int] | set[int]) -> Admission:
    """Decide on one episode. filled: slots of the rollout request that are taken."""
    # The order of the checks decides which code an episode with several faults gets.
    for check in (_check_adapter, _check_task, _check_samples):
        rejected = check(episode, criteria)
        if rejected is not None:
            return rejected
    slot = -1
    if criteria.request_id:
        slot = _slot_of(episode, criteria)
        if not 0 <= slot < criteria.slots:
            request_id = str(episode.meta.get("order", ""))[:40]
            return _replay("not_ordered", f"it belongs to rollout request {request_id or 'none'}")
        if slot in filled:
            return _replay("doubled", f"episode {slot} of this rollout request is here already")
    return _by_success(episode, slot)


def _replay(code: str, reason: str) -> Admission:
    return Admission("replay", f"inbox.{code}", reason)


def _check_adapter(episode: Episode, criteria: AdmissionCriteria) -> Admission | None:
    """Whether every action comes from the adapter being updated; None where it does."""
    if not episode.steps:
        return _replay("empty", "it has no steps")
    adapter_ids = {step.chunk.adapter_id for step in episode.steps}
    if len(adapter_ids) > 1:
        return _replay("mixed_adapters", f"its actions come from {len(adapter_ids)} adapters")
    sampled_under = next(iter(adapter_ids))
    if sampled_under != criteria.adapter_id:
        updated = criteria.adapter_id[:12]
        return _replay("other_adapter", f"sampled under {sampled_under[:12]}, being updated is {updated}")
    # The actions are what counts; a header that contradicts them casts doubt on the whole file.
    if episode.adapter_id != sampled_under:
        return _replay("false_adapter", f"says {episode.adapter_id[:12]}, its actions say {sampled_under[:12]}")
    return None


def _check_task(episode: Episode, criteria: AdmissionCriteria) -> Admission | None:
    """Whether it is of the task being learned, in its words from the first step to the last; None where it is."""
    if episode.task != criteria.task:
        return _replay("other_task", f"task {episode.task}, being learned is {criteria.task}")
    instructions = {episode.instruction, *(step.observation.instruction for step in episode.steps)}
    if instructions != {criteria.instruction}:
        heard = min(instructions - {criteria.instruction})
        return _replay("other_instruction", f"the policy was told {heard[:60]!r}, wanted is {criteria.instruction!r}")
    return None


def _check_samples(episode: Episode, criteria: AdmissionCriteria) -> Admission | None:
    """Whether its actions were sampled as this update needs them; None where they were."""
    for step in episode.steps:
        if step.chunk.tokens is None or step.chunk.log_prob is None:
            return _replay("no_log_prob", "its actions carry no log-probabilities")
        if abs(step.chunk.temperature - criteria.temperature) > 1e-9:
            text = f"sampled at temperature {step.chunk.temperature:g}, wanted is {criteria.temperature:g}"
            return _replay("other_temperature", text)
        # Steps that were not executed have no gradient, so their log-probabilities may hold anything.
        if not np.isfinite(step.chunk.log_prob[sampled(step)]).all():
            return _replay("not_finite", "log-probabilities of executed actions are not finite")
    dtypes = {step.chunk.compute_dtype for step in episode.steps}
    if criteria.compute_dtype is not None:
        dtypes.add(criteria.compute_dtype)
    if len(dtypes) > 1:
        return _replay("other_dtype", f"it and what this update has already were computed in {dtype_names(dtypes)}")
    if not any(sampled(step).any() for step in episode.steps):
        return _replay("nothing_sampled", "no action reached the robot as sampled: a person drove all of it")
    return None


def _slot_of(episode: Episode, criteria: AdmissionCriteria) -> int:
    """Its place in the rollout request, -1 for an episode of another request or of none."""
    if episode.meta.get("order") != criteria.request_id:
        return -1
    return int(episode.meta.get("slot", -1))


def _by_success(episode: Episode, slot: int) -> Admission:
    """Decide on an episode that is on-policy by who says that it succeeded."""
    if episode.success is None:
        return Admission("waiting", "inbox.unverified", "nobody has judged its success yet", slot)
    if not trusted(episode.success_source):
        return _replay("untrusted_success", f"success was judged by {episode.success_source or 'nobody'!r}")
    if episode.success_source == "simulator":
        why_not = doubt(episode)
        if why_not:
            return _replay("unearned_success", why_not)
    return Admission("accepted", slot=slot)


def sampled(step: Step) -> Bool:
    """(K,) bool: control steps that ran and reached the robot exactly as sampled; the only ones with a gradient."""
    ran = np.arange(len(step.executed)) < step.steps_run
    return np.asarray(step.executed, bool) & ran


def trusted(source: str) -> bool:
    """The simulator's own predicate, or a person by name; never the policy or a detector alone."""
    return source == "simulator" or (source.startswith("human:") and len(source) > len("human:"))
