"""Episodes as an update takes them: flattened to decisions, with what every decision was computed in.

Knows arrays and their shapes. Knows no environment and no update rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.specs import EpisodeSpec
from ratchet_vla.policy.protocol import PolicyInput
from ratchet_vla.records import Bool, Float32, Int64, UInt8

__all__ = ["Outcomes", "RolloutBatch"]


@dataclass
class RolloutBatch:
    """Episodes flattened to decisions. E episodes, N decisions (chunks), K actions of D dimensions each.

    images: (N, V, H, W, 3) uint8. state: (N, S) float32. instruction: (N,) index into `instructions`.
    tokens: (N, K, D) int64; of flow policies the chains, (N, steps + 1, H, A) float32.
    log_prob: (N, K, D) float32 under the sampling distribution.
    feature: (N, H) float32, what a value head reads; H = 0 for policies without one.
    valid: (N, K) bool, control steps that ran. episode: (N,) index into the episode arrays, in order of time.
    success: (E,) bool. steps: (E,) control steps run. group: (E,). adapter_id: the id that produced every action.
    compute_dtype: what every decision was computed in; "" where nobody recorded it.
    """

    images: UInt8
    state: Float32
    instruction: Int64
    instructions: list[str]
    tokens: Int64 | Float32
    log_prob: Float32
    feature: Float32
    valid: Bool
    episode: Int64
    success: Bool
    steps: Int64
    group: Int64
    temperature: float
    adapter_id: str
    compute_dtype: str = ""
    specs: list[EpisodeSpec] = field(default_factory=list)
    seconds: float = 0.0

    def policy_input(self, rows: Int64) -> PolicyInput:
        """The observations of some decisions, as the policy takes them."""
        return PolicyInput(
            images=self.images[rows],
            state=torch.from_numpy(self.state[rows]) if self.state.shape[1] else None,
            instructions=[self.instructions[position] for position in self.instruction[rows]],
        )


def dtype_names(dtypes: Iterable[str]) -> str:
    """Dtypes for a person: "bfloat16 and float32"."""
    return " and ".join(sorted(dtype or "an unrecorded dtype" for dtype in dtypes))


def one_dtype(dtypes: set[str], whose: str) -> str:
    """The one dtype that everything was computed in.

    Raises:
        RatchetError: learner.mixed_dtypes, naming them.
    """
    if len(dtypes) > 1:
        raise RatchetError(
            "learner.mixed_dtypes",
            f"one batch was computed in {dtype_names(dtypes)}",
            where=whose,
            fix="let all robots compute in one dtype: --dtype, or RATCHET_DTYPE",
        )
    return next(iter(dtypes), "")


@dataclass
class Outcomes:
    """Result of an evaluation: successes in the order of the specs."""

    success: Bool
    steps: Int64
    seconds: float
