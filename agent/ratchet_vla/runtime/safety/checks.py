"""Checks of what reaches the safety filter: chunks, single actions, measurements. Each tells what is wrong, or nothing.

Ages and sequence numbers of chunks and states are checked here, those of frames in `control.watchdog`. Knows contract,
limits and times. Changes nothing; what follows from a finding is decided in filter.py.
"""

from __future__ import annotations

import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.records import ActionChunk, SafetyEvent
from ratchet_vla.runtime.safety.axis import Cut
from ratchet_vla.runtime.safety.limits import Limiter
from ratchet_vla.runtime.safety.measured import Measured
from ratchet_vla.runtime.safety.types import Proposal

Problem = tuple[str, str]  # code, message


def chunk_fault(chunk: ActionChunk, contract: RobotContract, period: float, now: float) -> Problem | None:
    """What no sound policy sends: a wrong shape, values that are not finite, an observation from the future."""
    wanted = contract.action.size
    if chunk.actions.ndim != 2 or chunk.actions.shape[1] != wanted or not len(chunk.actions):
        return "safety.bad_action", f"chunk of shape {chunk.actions.shape}, the robot takes (K, {wanted})"
    if not np.isfinite(chunk.actions).all():
        return "safety.not_finite", f"chunk {chunk.observation_sequence} has NaN or infinite actions"
    if not chunk.observation_stamp - now <= period:
        return "safety.clock", f"the chunk's observation lies {chunk.observation_stamp - now:.3g} s ahead"
    return None


def proposal_problem(proposal: Proposal, contract: RobotContract, limiter: Limiter, now: float) -> Problem | None:
    """Shape, finite values, a real rotation, and age against the contract's `action_max_age`."""
    action = np.asarray(proposal.action)
    if action.shape != (contract.action.size,):
        return "safety.bad_action", f"shape {action.shape}, the robot takes ({contract.action.size},)"
    if not np.isfinite(action).all():
        bad = [d.name for d, v in zip(contract.action.dims, action, strict=True) if not np.isfinite(v)]
        return "safety.not_finite", f"not finite: {', '.join(bad)}"
    problem = limiter.no_rotation(proposal.action)
    if problem:
        return "safety.bad_action", problem
    age, allowed = now - proposal.due, contract.watchdog.action_max_age
    if not age <= allowed:
        return "safety.action_age", f"the action is {age:.3g} s late, allowed {allowed} s"
    if age < -allowed:
        return "safety.clock", f"the action is meant for {-age:.3g} s ahead"
    return None


def jump(limiter: Limiter, before: Measured, after: Measured, elapsed: float, factor: float) -> Problem | None:
    """A measurement that no motion within the limits explains. elapsed: seconds between the two."""
    for i, (new, old) in enumerate(zip(after.position, before.position, strict=True)):
        axis = limiter.axes[i]
        allowed = factor * max(axis.fast, -axis.slow) * elapsed
        if abs(new - old) > allowed:
            name = limiter.names[i]
            return "safety.state_jump", f"{name} measured {new - old:+.3g} within {elapsed:.3g} s, limit {allowed:.3g}"
    return None


def lag(limiter: Limiter, measured: Measured, factor: float) -> Problem | None:
    """In absolute modes: the arm does not follow; letting the command run ahead would end in a jump."""
    if not limiter.absolute:
        return None
    time = max(limiter.contract.watchdog.observation_max_age, 2.0 * limiter.period)
    for i, (aim, place) in enumerate(zip(limiter.target(), measured.position, strict=True)):
        axis = limiter.axes[i]
        allowed = factor * max(axis.fast, -axis.slow) * time
        if abs(aim - place) > allowed:
            text = f"{limiter.names[i]} is {abs(aim - place):.3g} from its command, limit {allowed:.3g}"
            return "safety.tracking", text
    return None


def cut_event(contract: RobotContract, now: float, name: str, cut: Cut, ramp: bool) -> SafetyEvent:
    """What a limit did to one dimension of an action. ramp: the speed was permitted, but not yet."""
    code = "safety.ramp" if ramp else f"safety.{cut.kind}"
    if cut.kind == "position" and contract.action.control_mode.startswith("ee"):
        code = "safety.workspace"
    unit = {"velocity": "per s", "acceleration": "per s^2", "jerk": "per s^3", "rate": "s"}.get(cut.kind, "")
    text = f"{name or 'command'} cut from {cut.value:.6g} to {cut.limit:.6g} {unit}".rstrip()
    return SafetyEvent(now, code, text, name, float(cut.value), float(cut.limit))
