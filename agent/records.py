"""What flows through the system: observations, action chunks, steps, episodes.

Knows shapes, units and frames. Knows nothing of models, robots, files or networks.
All images are upright (the contract's orientation is already applied) and RGB.
All actions are in the contract's physical units, never normalised.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


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
    tokens: (K, D) int64 in [0, bins), the sampled action bins; None for policies without tokens.
    log_prob: (K, D) float32, log-probability of each token under the sampling distribution
        (temperature included); None with `tokens`.
    adapter_id: id of the adapter that produced it; the base's id when no adapter is loaded.
    temperature: sampling temperature; 0.0 means greedy.
    observation_stamp, observation_sequence: copied from the observation it answers.
    """

    actions: Float32
    tokens: Int64 | None
    log_prob: Float32 | None
    adapter_id: str
    temperature: float
    observation_stamp: float
    observation_sequence: int


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


@dataclass
class Episode:
    """One attempt at one task.

    success: None until somebody or something judged it.
    success_source: "simulator", or "human:<name>"; empty while success is None.
    initial_state: index of the benchmark's initial state, -1 on a real robot.
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
