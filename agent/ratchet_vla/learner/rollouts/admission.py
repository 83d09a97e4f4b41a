"""Which episodes may enter an update: one decision per episode, with a stable code and the reason in words.

Knows episodes, the adapter being updated and what was asked for. Knows no file, no network and no optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ratchet_vla.episodes.earned import doubt
from ratchet_vla.records import Bool, Episode, Step

Decision = Literal["accepted", "waiting", "replay"]


@dataclass(frozen=True)
class Wanted:
    """What the learner collects at the moment.

    adapter_id: the adapter being updated; every action must come from it. temperature: of the sampling.
    compute_dtype: of the episodes that the next update has already; None while it has none.
    instruction: the task in words; what the policy was told must be the same.
    order, slots: in simulation, the order's name and how many episodes it asks for; empty and 0 where any episode of
    the task is welcome (a real robot, whose initial states cannot be repeated).
    """

    task: str
    adapter_id: str
    temperature: float
    instruction: str
    order: str = ""
    slots: int = 0
    compute_dtype: str | None = None


@dataclass(frozen=True)
class Ruling:
    """accepted: enters an update. waiting: would, once somebody has judged its success. replay: kept, never sampled for
    the policy gradient; `code` and `reason` say why. slot: place in the order, -1 without one."""

    decision: Decision
    code: str = ""
    reason: str = ""
    slot: int = -1


def rule(episode: Episode, wanted: Wanted, filled: frozenset[int] | set[int]) -> Ruling:
    """Decide about one episode. filled: slots of the order that are taken."""

    def replay(code: str, reason: str) -> Ruling:
        return Ruling("replay", f"inbox.{code}", reason)

    if not episode.steps:
        return replay("empty", "it has no steps")
    ids = {step.chunk.adapter_id for step in episode.steps}
    if len(ids) > 1:
        return replay("mixed_adapters", f"its actions come from {len(ids)} adapters")
    found = next(iter(ids))
    if found != wanted.adapter_id:
        return replay("other_adapter", f"sampled under {found[:12]}, being updated is {wanted.adapter_id[:12]}")
    if episode.adapter_id != found:
        return replay("false_adapter", f"says {episode.adapter_id[:12]}, its actions say {found[:12]}")
    if episode.task != wanted.task:
        return replay("other_task", f"task {episode.task}, being learned is {wanted.task}")
    instructions = {episode.instruction, *(step.observation.instruction for step in episode.steps)}
    if instructions != {wanted.instruction}:
        other = min(instructions - {wanted.instruction})
        return replay("other_instruction", f"the policy was told {other[:60]!r}, wanted is {wanted.instruction!r}")
    for step in episode.steps:
        if step.chunk.tokens is None or step.chunk.log_prob is None:
            return replay("no_log_prob", "its actions carry no log-probabilities")
        if abs(step.chunk.temperature - wanted.temperature) > 1e-9:
            text = f"sampled at temperature {step.chunk.temperature:g}, wanted is {wanted.temperature:g}"
            return replay("other_temperature", text)
        if not np.isfinite(step.chunk.log_prob[sampled(step)]).all():
            return replay("not_finite", "log-probabilities of executed actions are not finite")
    dtypes = {step.chunk.compute_dtype for step in episode.steps}
    others = dtypes | ({wanted.compute_dtype} if wanted.compute_dtype is not None else set())
    if len(others) > 1:
        told = " and ".join(sorted(name or "an unrecorded dtype" for name in others))
        return replay("other_dtype", f"it and what this update has already were computed in {told}")
    if not any(sampled(step).any() for step in episode.steps):
        return replay("nothing_sampled", "no action reached the robot as sampled: a person drove all of it")
    slot = -1
    if wanted.order:
        slot = int(episode.meta.get("slot", -1)) if episode.meta.get("order") == wanted.order else -1
        if not 0 <= slot < wanted.slots:
            return replay("not_ordered", f"it belongs to order {str(episode.meta.get('order', ''))[:40] or 'none'}")
        if slot in filled:
            return replay("doubled", f"episode {slot} of this order is here already")
    if episode.success is None:
        return Ruling("waiting", "inbox.unverified", "nobody has judged its success yet", slot)
    if not trusted(episode.success_source):
        return replay("untrusted_success", f"success was judged by {episode.success_source or 'nobody'!r}")
    if episode.success_source == "simulator" and (why := doubt(episode)):
        return replay("unearned_success", why)
    return Ruling("accepted", slot=slot)


def sampled(step: Step) -> Bool:
    """(K,) bool: control steps that ran and reached the robot exactly as sampled; the only ones with a gradient."""
    ran = np.arange(len(step.executed)) < step.steps_run
    return np.asarray(step.executed, bool) & ran


def trusted(source: str) -> bool:
    """The simulator's own predicate, or a person by name; never the policy or a detector alone."""
    return source == "simulator" or (source.startswith("human:") and len(source) > len("human:"))
