"""Normalisation of flow policies: an offset and a scale per value, frozen with the base.

Knows numbers and units. Knows no network. Unlike the discrete family's percentiles they are not clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ratchet_vla.contract import PolicySpec
from ratchet_vla.errors import RatchetError

# A value that never moved in the demonstrations has no deviation; its scale must not be 0.
_LEAST_SCALE = 1e-4


@dataclass(frozen=True)
class FlowStatistics:
    """Normalisation, frozen with the base: normalised = (physical - offset) / scale, per value.

    key: which data they come from. units: per action dimension.

    Raises:
        RatchetError: policy.missing_statistics.
    """

    key: str
    units: tuple[str, ...]
    action_offset: tuple[float, ...]
    action_scale: tuple[float, ...]
    state_offset: tuple[float, ...] = ()
    state_scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise RatchetError(
                "policy.missing_statistics",
                problem,
                where=self.key or "statistics",
                fix="take those of the training data",
            )

    def _problem(self) -> str:
        """Return what is wrong with the numbers; "" where nothing is."""
        scales = (*self.action_scale, *self.state_scale)
        numbers = (*self.action_offset, *self.state_offset, *scales)
        actions_complete = len(self.units) == len(self.action_offset) == len(self.action_scale) > 0
        if not actions_complete or len(self.state_offset) != len(self.state_scale):
            return "every action dimension needs a unit, an offset and a scale, every state value the latter two"
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            return "statistics must be finite numbers"
        if not all(scale > 0 for scale in scales):
            return "a scale is not above 0"
        return ""


def small_statistics(values: Any, state: Any, spec: PolicySpec) -> FlowStatistics:
    """Mean and deviation of demonstrations: actions (M, K, D) and states (M, S), physical units, as numpy arrays."""
    actions = np.asarray(values, np.float64).reshape(-1, len(spec.action_names))  # (M K, D)
    states = np.asarray(state, np.float64).reshape(-1, spec.state_size)  # (M, S)
    state_offset: tuple[float, ...] = ()
    state_scale: tuple[float, ...] = ()
    if spec.state:
        state_offset = tuple(map(float, states.mean(0)))
        state_scale = tuple(map(float, np.maximum(states.std(0), _LEAST_SCALE)))
    return FlowStatistics(
        key=spec.statistics_key,
        units=spec.action_units,
        action_offset=tuple(map(float, actions.mean(0))),
        action_scale=tuple(map(float, np.maximum(actions.std(0), _LEAST_SCALE))),
        state_offset=state_offset,
        state_scale=state_scale,
    )
