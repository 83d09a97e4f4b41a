"""When an episode is over: success, horizon, cancel, latched fault, or a hold that does not end.

Knows a loop's ticks and its safety filter. Knows neither how a tick works nor who labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from ratchet_vla.records import ControlTick
from ratchet_vla.runtime.control.labelling import Labeller
from ratchet_vla.runtime.control.outcome import Termination
from ratchet_vla.runtime.safety.filter import SafetyFilter, SafetyState


class Ticking(Protocol):
    """A control loop, as far as an episode's end is concerned."""

    safety: SafetyFilter

    @property
    def cancelled(self) -> bool: ...

    def tick(self) -> ControlTick: ...


def until_end(
    loop: Ticking,
    horizon: int,
    labeller: Labeller | None,
    hold_timeout: float,
    on_tick: Callable[[ControlTick], None] | None,
) -> Termination:
    """Tick until something ends the episode; how it ended.

    Arguments as in `ControlLoop.run_episode`. An outcome goes before everything else that happens in the same tick.
    """
    held_since: float | None = None
    deadline, ticks, standing = -math.inf, 0, 0
    while ticks < horizon:
        tick = loop.tick()
        # The same deadline once more: the clock stands still, and ticks alone tell how long.
        standing = standing + 1 if tick.deadline == deadline else 0
        deadline, ticks = tick.deadline, ticks + (standing == 0)
        if on_tick is not None:
            on_tick(tick)
        outcome = None if labeller is None else labeller.outcome()
        if outcome is not None:
            return Termination.SUCCESS if outcome else Termination.FAILURE
        state = loop.safety.state
        if state is SafetyState.LATCHED:
            return Termination.FAULT
        if loop.cancelled:
            return Termination.CANCELLED
        if state is not SafetyState.HOLDING:
            held_since = None
        elif held_since is None:
            held_since = tick.stamp
        elif tick.stamp - held_since + standing * loop.safety.period > hold_timeout:
            return Termination.HOLD_TIMEOUT
    return Termination.HORIZON
