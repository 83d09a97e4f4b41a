"""Action tokens: bins over [-1, 1], their place in the vocabulary, and frozen normalisation statistics.

Knows the arithmetic between physical actions, normalised actions, bins and token ids. Knows no network and no robot.

The published scheme (OpenVLA, arXiv 2406.09246): 256 edges over [-1, 1] give 255 centres; the last 256 ids of the
vocabulary are the action tokens in reverse order, so that token t means centre[clip(vocabulary - t - 1, 0, 254)].
A bin here is t - (vocabulary - 256), in [0, 256): bin 255 is the lowest action, bins 0 and 1 both mean the highest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.configuration import tuples_for_lists

BINS = 256
# numpy's edges, as published: torch.linspace rounds some of them differently.
_EDGES = torch.from_numpy(np.linspace(-1.0, 1.0, BINS))


@dataclass(frozen=True)
class Statistics:
    """Normalisation statistics, frozen with the base model: recomputing them per task ruins what was learned.

    key: which data they come from. units: per action dimension.
    q01, q99: 1st and 99th percentile per action dimension, physical units.
    mask: True where the dimension is normalised; False passes it through (the gripper).
    state_mean, state_std: per state value, physical units; empty where the policy takes no state.
    """

    key: str
    units: tuple[str, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...]
    state_mean: tuple[float, ...] = ()
    state_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        sizes = {len(self.units), len(self.q01), len(self.q99), len(self.mask)}
        if len(sizes) != 1 or 0 in sizes or len(self.state_mean) != len(self.state_std):
            raise RatchetError(
                "policy.missing_statistics",
                "normalisation statistics are incomplete: every action dimension needs units, q01, q99 and mask",
                where=self.key or "statistics",
                fix="take the statistics from the data that the checkpoint was trained on",
            )
        wrong = [
            i for i, (lo, hi, m) in enumerate(zip(self.q01, self.q99, self.mask, strict=True)) if m and not lo < hi
        ]
        if wrong:
            raise RatchetError(
                "policy.missing_statistics",
                f"q01 is not below q99 in action dimensions {wrong}",
                where=self.key,
                fix="take the statistics from the data that the checkpoint was trained on",
            )
        if any(not s > 0 for s in self.state_std):
            raise RatchetError("policy.missing_statistics", "state_std must be positive", where=self.key)
        numbers = (*self.q01, *self.q99, *self.state_mean, *self.state_std)
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
            raise RatchetError("policy.missing_statistics", "statistics must be finite numbers", where=self.key)

    def as_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None, where: str) -> Statistics:
        """Raises RatchetError policy.missing_statistics where `data` is absent or lacks a field."""
        if not data:
            raise RatchetError(
                "policy.missing_statistics",
                "the checkpoint has no normalisation statistics, so its actions have no scale",
                where=where,
                fix="add the statistics that the checkpoint was trained with; never compute new ones",
            )
        try:
            fields: dict[str, Any] = tuples_for_lists(data)
            return cls(**fields)
        except (TypeError, AttributeError) as error:
            raise RatchetError("policy.missing_statistics", f"statistics are malformed: {error}", where=where) from None


def centres() -> Tensor:
    """(255,) float64, the action of each pair of neighbouring edges, ascending."""
    return (_EDGES[:-1] + _EDGES[1:]) / 2


def decode(bins: Tensor) -> Tensor:
    """Bins (…,) int64 in [0, 256) -> normalised actions (…,) float64 in (-1, 1)."""
    return centres().to(bins.device)[(BINS - 1 - bins).clamp(0, BINS - 2)]


def encode(normalised: Tensor) -> Tensor:
    """Normalised actions (…,) -> bins (…,) int64; values outside [-1, 1] take the outermost bin.

    The published `vocabulary - numpy.digitize(clip(action, -1, 1), edges)`, less the first action id.

    Raises:
        RatchetError: policy.bad_input for NaN, which would otherwise become the highest action.
    """
    if bool(normalised.isnan().any()):
        raise RatchetError("policy.bad_input", "an action is NaN", fix="remove the sample from the data")
    edges = _EDGES.to(normalised.device)
    digit = torch.bucketize(normalised.double().clamp(-1.0, 1.0), edges, right=True)  # 1..256, as numpy.digitize
    return BINS - digit


def normalise(actions: Tensor, statistics: Statistics) -> Tensor:
    """Physical actions (…, D) -> normalised (…, D) float64; dimensions outside the mask pass unchanged."""
    low, high, mask = _tensors(statistics, actions.device)
    return torch.where(mask, 2 * (actions.double() - low) / (high - low + 1e-8) - 1, actions.double())


def unnormalise(normalised: Tensor, statistics: Statistics) -> Tensor:
    """Normalised (…, D) -> physical (…, D) float64; inverse of `normalise`."""
    low, high, mask = _tensors(statistics, normalised.device)
    return torch.where(mask, 0.5 * (normalised.double() + 1) * (high - low + 1e-8) + low, normalised.double())


def _tensors(statistics: Statistics, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    low = torch.tensor(statistics.q01, dtype=torch.float64, device=device)
    high = torch.tensor(statistics.q99, dtype=torch.float64, device=device)
    return low, high, torch.tensor(statistics.mask, device=device)
