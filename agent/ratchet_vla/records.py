"""What flows through the system: observations, action chunks, steps, control ticks, episodes.

Knows shapes, units and frames. Knows nothing of models, robots, files or networks.
All images are upright (the contract's orientation is already applied) and RGB.
All actions are in the contract's physical units, never normalised.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ActionChunk",
    "Applied",
    "Bool",
    "ControlTick",
    "Episode",
    "Float32",
    "Int64",
    "Mark",
    "Observation",
    "SafetyEvent",
    "Step",
    "UInt8",
]

UInt8 = npt.NDArray[np.uint8]
"""Array of bytes: images."""
Float32 = npt.NDArray[np.float32]
"""Array of float32: states, actions, log-probabilities."""
Int64 = npt.NDArray[np.int64]
"""Array of int64: action tokens."""
Bool = npt.NDArray[np.bool_]
"""Array of bool: masks."""


@dataclass(frozen=True)
class Observation:
    """What the robot saw at one instant.

    images: camera name -> (H, W, 3) uint8, RGB, upright; one entry per contract camera that the policy consumes.
    state: field name -> (size,) float32, units and frames as the contract's state fields say.
    instruction: the task in words.
    stamp: seconds, acquisition time on the robot's monotonic clock (simulated time in simulation).
    sequence: counts observations within an episode, from 0.
    """

    images: dict[str, UInt8]
    state: dict[str, Float32]
    instruction: str
    stamp: float
    sequence: int


@dataclass(frozen=True)
class ActionChunk:
    """K actions predicted at once from one observation.

    actions: (K, D) float32, physical units and order of the contract's action dimensions.
    tokens: what was sampled, so that its probability can be found again: (K, D) int64 in [0, bins), the action bins;
        of a flow policy (N + 1, H, A) float32, the chain of points from noise to normalised actions; None for policies
        without probabilities.
    log_prob: (K, D) float32, log-probability of each token under the sampling distribution (temperature included), of
        a chain its density spread over the actions; None with `tokens`.
    adapter_id: id of the adapter that produced it; the base's id when no adapter is loaded.
    temperature: sampling temperature; 0.0 means greedy.
    observation_stamp, observation_sequence: copied from the observation it answers.
    compute_dtype: what the policy's products were computed in, such as "float32"; "" where nobody recorded it.
    """

    actions: Float32
    tokens: Int64 | Float32 | None
    log_prob: Float32 | None
    adapter_id: str
    temperature: float
    observation_stamp: float
    observation_sequence: int
    compute_dtype: str = ""


@dataclass(frozen=True)
class Step:
    """One decision: the observation, the chunk chosen, and what became of it.

    executed: (K,) bool, True where the action reached the robot exactly as sampled; a clipped, skipped, blended or
        human action is False and is masked out of the policy gradient.
    reward: sum over the executed actions; success gives the task's reward once.
    done: the episode ended inside this chunk.
    steps_run: control steps of this chunk that ran, 1..K.
    """

    observation: Observation
    chunk: ActionChunk
    executed: Bool
    reward: float
    done: bool
    steps_run: int


class Mark(enum.IntFlag):
    """What became of a sampled action on its way to the robot; NONE means that it was sent exactly as sampled.

    CLIPPED: a safety limit changed it. SKIPPED: it was too old and never sent. BLENDED: mixed with the previous chunk.
    HUMAN: a person's command replaced it. HELD: nothing fit was available and the robot held its pose.
    RAMPED: approached from the measured pose at a start, after a hold or after an intervention.
    """

    NONE = 0
    CLIPPED = 1
    SKIPPED = 2
    BLENDED = 4
    HUMAN = 8
    HELD = 16
    RAMPED = 32


@dataclass(frozen=True)
class SafetyEvent:
    """One act of the safety filter, with its numbers.

    stamp: seconds, robot's monotonic clock.
    code: stable dotted identifier such as `safety.velocity`; dim: action dimension or field concerned, empty if none.
    value, limit: what was asked and what is allowed, in the unit that `message` names.
    latched: True where motion stays stopped until a person clears it.
    """

    stamp: float
    code: str
    message: str
    dim: str = ""
    value: float = 0.0
    limit: float = 0.0
    latched: bool = False


@dataclass(frozen=True)
class ControlTick:
    """One period of the control loop: what the policy asked for and what the robot was sent.

    stamp: seconds, robot's monotonic clock, when the command was sent; deadline: when it was due.
    index: counts ticks within an episode, from 0.
    sampled: (D,) float32, physical units, the policy's action before safety; None where the policy had none.
    command: (D,) float32, physical units, what the robot was sent; None where it was told to hold.
    chunk_sequence, chunk_offset: `ActionChunk.observation_sequence` and index of the action within it; -1 for none.
    state: measured state at this tick, as in `Observation.state`.
    applied, applied_marks: what a command filter behind this loop made of `command`, as in `Applied`; None and
        SKIPPED where it told nothing of it. `applied_marks` is None where there is no such stage.
    """

    stamp: float
    deadline: float
    index: int
    sampled: Float32 | None
    command: Float32 | None
    marks: Mark
    chunk_sequence: int
    chunk_offset: int
    adapter_id: str
    state: dict[str, Float32]
    applied: Float32 | None = None
    applied_marks: Mark | None = None

    @property
    def reached(self) -> Float32 | None:
        """(D,) float32, what the robot's driver was sent in the end; None for a hold."""
        return self.command if self.applied_marks is None else self.applied

    @property
    def fate(self) -> Mark:
        """Everything that was done to the sampled action on its way, by this loop and by a command filter behind it."""
        return self.marks | (self.applied_marks or Mark.NONE)


@dataclass(frozen=True)
class Applied:
    """What the command filter before the robot made of one command.

    number: of the command, as its sender counts them. action: (D,) float32, physical units, what the driver was sent;
    None for a hold. marks: the command's own, and what was done here.
    """

    number: int
    action: Float32 | None
    marks: Mark


@dataclass
class Episode:
    """One attempt at one task.

    success: None until somebody or something labelled it.
    success_source: "simulator", or "human:<name>"; empty while success is None.
    initial_state: index of the benchmark's initial state, -1 on a real robot.
    termination: why it ended, apart from success: "success", "horizon", "cancelled" and others of the control loop's
        and the recorder's words; empty where nobody said.
    ticks, events: what the control loop did, in order; empty for rollouts that run without one.
    """

    task: str
    instruction: str
    steps: list[Step] = field(default_factory=list)
    success: bool | None = None
    success_source: str = ""
    initial_state: int = -1
    seed: int = 0
    adapter_id: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    ticks: list[ControlTick] = field(default_factory=list)
    events: list[SafetyEvent] = field(default_factory=list)
    termination: str = ""
