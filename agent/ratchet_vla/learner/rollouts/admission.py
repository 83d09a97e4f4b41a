"""Admission of episodes to an update: one decision per episode, with a stable code and the reason in words.

Knows episodes, the adapter being updated and what was requested. Knows no file, no network and no optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ratchet_vla.episodes.success_rules import doubt
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
    """accepted: enters an update. waiting: would, once somebody has judged its success. replay: kept, never sampled for
    the policy gradient; `code` and `reason` say why. slot: place in the rollout request, -1 without one."""

    decision: Decision
    code: str = ""
    reason: str = ""
    slot: int = -1


def admission_of(episode: Episode, criteria: AdmissionCriteria, filled: frozenset[int] | set[int]) -> Admission:
    """Decide on one episode. filled: slots of the rollout request that are taken."""

    def replay(code: str, reason: str) -> Admission:
        return Admission("replay", f"inbox.{code}", reason)

    if not episode.steps:
        return replay("empty", "it has no steps")
    ids = {step.chunk.adapter_id for step in episode.steps}
    if len(ids) > 1:
        return replay("mixed_adapters", f"its actions come from {len(ids)} adapters")
    sampled_under = next(iter(ids))
    if sampled_under != criteria.adapter_id:
        return replay(
            "other_adapter", f"sampled under {sampled_under[:12]}, being updated is {criteria.adapter_id[:12]}"
        )
    if episode.adapter_id != sampled_under:
        return replay("false_adapter", f"says {episode.adapter_id[:12]}, its actions say {sampled_under[:12]}")
    if episode.task != criteria.task:
        return replay("other_task", f"task {episode.task}, being learned is {criteria.task}")
    instructions = {episode.instruction, *(step.observation.instruction for step in episode.steps)}
    if instructions != {criteria.instruction}:
        other = min(instructions - {criteria.instruction})
        return replay("other_instruction", f"the policy was told {other[:60]!r}, wanted is {criteria.instruction!r}")
    for step in episode.steps:
        if step.chunk.tokens is None or step.chunk.log_prob is None:
            return replay("no_log_prob", "its actions carry no log-probabilities")
        if abs(step.chunk.temperature - criteria.temperature) > 1e-9:
            text = f"sampled at temperature {step.chunk.temperature:g}, wanted is {criteria.temperature:g}"
            return replay("other_temperature", text)
        if not np.isfinite(step.chunk.log_prob[sampled(step)]).all():
            return replay("not_finite", "log-probabilities of executed actions are not finite")
    dtypes = {step.chunk.compute_dtype for step in episode.steps}
    others = dtypes | ({criteria.compute_dtype} if criteria.compute_dtype is not None else set())
    if len(others) > 1:
        names = " and ".join(sorted(name or "an unrecorded dtype" for name in others))
        return replay("other_dtype", f"it and what this update has already were computed in {names}")
    if not any(sampled(step).any() for step in episode.steps):
        return replay("nothing_sampled", "no action reached the robot as sampled: a person drove all of it")
    slot = -1
    if criteria.request_id:
        slot = int(episode.meta.get("slot", -1)) if episode.meta.get("order") == criteria.request_id else -1
        if not 0 <= slot < criteria.slots:
            return replay(
                "not_ordered", f"it belongs to rollout request {str(episode.meta.get('order', ''))[:40] or 'none'}"
            )
        if slot in filled:
            return replay("doubled", f"episode {slot} of this rollout request is here already")
    if episode.success is None:
        return Admission("waiting", "inbox.unverified", "nobody has judged its success yet", slot)
    if not trusted(episode.success_source):
        return replay("untrusted_success", f"success was judged by {episode.success_source or 'nobody'!r}")
    if episode.success_source == "simulator" and (why := doubt(episode)):
        return replay("unearned_success", why)
    return Admission("accepted", slot=slot)


def sampled(step: Step) -> Bool:
    """(K,) bool: control steps that ran and reached the robot exactly as sampled; the only ones with a gradient."""
    ran = np.arange(len(step.executed)) < step.steps_run
    return np.asarray(step.executed, bool) & ran


def trusted(source: str) -> bool:
    """The simulator's own predicate, or a person by name; never the policy or a detector alone."""
    return source == "simulator" or (source.startswith("human:") and len(source) > len("human:"))
