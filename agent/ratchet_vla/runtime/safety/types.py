"""What goes into the safety filter and what comes out: proposals, results, states and settings.

Knows words and defaults. Decides nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

from ratchet_vla.records import Float32, Mark, SafetyEvent


class SafetyState(enum.StrEnum):
    """Where the safety filter is; the transitions are drawn in docs/safety.md.

    IDLE: holds, `start` has not been called. RAMPING: moves, the permitted speed still grows. RUNNING: moves.
    WAITING: stands (or brakes) because the next action is expected and not there yet. STOPPING: brakes.
    HOLDING: stands after something that may pass. LATCHED: stands until a person clears it.
    """

    IDLE = "idle"
    RAMPING = "ramping"
    RUNNING = "running"
    WAITING = "waiting"
    STOPPING = "stopping"
    HOLDING = "holding"
    LATCHED = "latched"


LATCHING = frozenset(
    {
        "safety.bad_action",
        "safety.not_finite",
        "safety.state",
        "safety.state_jump",
        "safety.tracking",
        "safety.clock",
        "safety.e_stop",
        "policy.crashed",
        "policy.hung",
        "policy.out_of_memory",
        "policy.failed",
        "runtime.robot",
    }
)


@dataclass(frozen=True)
class SafetyConfig:
    """What the contract leaves to whoever runs the arm. Limits and times stay the contract's.

    latch_on: codes after which motion stays stopped until `clear`; every other cause of a hold may pass by itself.
    resume: after a hold that is not latched, go on by itself ("automatic", with the ramp) or wait for `resume`.
    dead_man: motion needs `dead_man(True)`, repeated at least every `dead_man_timeout` seconds.
    tracking_factor: in absolute modes the measured pose may lag the command by this many times what the arm covers at
        full speed in the contract's `observation_max_age`; inf to switch the check off.
    jump_factor: between two measurements a position may change by this many times what full speed allows.
    clock_may_pause: time is a simulation's that runs by itself. Where it stands nothing moves, so that a clock that
        stands holds the arm (`safety.clock_paused`) and is waited for; any other one is a fault.
    """

    latch_on: frozenset[str] = LATCHING
    resume: Literal["automatic", "manual"] = "automatic"
    dead_man: bool = False
    dead_man_timeout: float = 0.2
    tracking_factor: float = 1.5
    jump_factor: float = 3.0
    clock_may_pause: bool = False

    @property
    def standing_clock(self) -> str:
        """The code for a clock that stands still."""
        return "safety.clock_paused" if self.clock_may_pause else "safety.clock"


@dataclass(frozen=True)
class Proposal:
    """One action on its way to the robot.

    action: (D,) float32, the contract's physical units. sampled: what the policy gave before blending, None if human.
    due: seconds, robot's clock, the moment the action was meant for.
    chunk_sequence, chunk_offset: `ActionChunk.observation_sequence` and the index within the chunk; -1 for human.
    marks: what happened to it so far (BLENDED, HUMAN).
    """

    action: Float32
    sampled: Float32 | None
    due: float
    chunk_sequence: int
    chunk_offset: int
    adapter_id: str = ""
    marks: Mark = Mark.NONE


@dataclass(frozen=True)
class FilterResult:
    """What the safety filter decided for one tick.

    command: (D,) float32 to send, within every limit; None means `Robot.hold`.
    marks: the proposal's marks and what was done here: CLIPPED, RAMPED, HELD.
    accepted: the proposal (changed or not) is what `command` carries.
    """

    command: Float32 | None
    marks: Mark
    state: SafetyState
    accepted: bool
    events: tuple[SafetyEvent, ...] = field(default=())
