"""Entries of a study's grid: a method, and what differs in this entry from the study's common settings.

Knows the written form, `method[:key=value,...]`, such as `retain:coefficient=0.5` or `seq_ft:alpha=8,order=reversed`.
Knows no run. Keys are the method's own parameters, and of any method those of `COMMON`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.methods.base import SeqFT
from ratchet_vla.learner.methods.registry import method_named
from ratchet_vla.learner.retention.regulariser import RetentionConfig
from ratchet_vla.learner.supervised.training import Samples

RETENTION: dict[str, type] = {"reference": str, "reference_weight": float, "own_weight": float}
SEQUENCE: dict[str, type] = {"updates": int, "groups": int, "until": float, "temperature": float}
COMMON: dict[str, type] = {"rank": int, "alpha": float, "learning_rate": float, "order": str} | SEQUENCE | RETENTION


@dataclass(frozen=True)
class Variant:
    """One row of the grid.

    label: as it was written; names folder and row. settings: of the method. rank, alpha: of the adapter, None for the
    study's; a rank alone keeps the scale alpha / rank. learning_rate: None for the study's. order: "given", "reversed",
    or a number that seeds a shuffle of the tasks. sequence: of `SequenceConfig`, what is not the study's. reference:
    "none", "base" for the reference set beside the base, or another's name there (`reference-NAME.safetensors`).
    weights: of `RetentionConfig`, what is not the default.
    """

    label: str
    kind: type[SeqFT]
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    alpha: float | None = None
    learning_rate: float | None = None
    order: str = "given"
    sequence: dict[str, Any] = field(default_factory=dict)
    reference: str = "none"
    weights: dict[str, float] = field(default_factory=dict)

    def make(self, demonstrations: Samples | None) -> SeqFT:
        """A fresh method. Raises RatchetError learn.no_demonstrations."""
        return self.kind(demonstrations if self.kind.needs_demonstrations else None, **self.settings)

    def retention(self) -> RetentionConfig:
        """How strongly the reference set holds, where there is one."""
        default = RetentionConfig()
        return RetentionConfig(
            reference_weight=self.weights.get("reference_weight", default.reference_weight),
            own_weight=self.weights.get("own_weight", default.own_weight),
        )

    def make_settings(self) -> dict[str, Any]:
        """The method's own parameters that differ from their defaults, as a run of it would write them down."""
        parameters = inspect.signature(self.kind.__init__).parameters
        return {key: value for key, value in self.settings.items() if value != parameters[key].default}

    def arranged(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """The tasks in this entry's order."""
        if self.order == "given":
            return tasks
        if self.order == "reversed":
            return tasks[::-1]
        positions = np.random.default_rng(int(self.order)).permutation(len(tasks))
        return tuple(tasks[position] for position in positions)

    def lora(self, rank: int, alpha: float) -> tuple[int, float]:
        """Rank and alpha of the adapter, given the study's."""
        own_rank = self.rank or rank
        own_alpha = alpha * own_rank / rank if self.alpha is None else self.alpha
        return own_rank, own_alpha


def parse(text: str) -> Variant:
    """Read one entry.

    Raises:
        RatchetError: learn.unknown_method, learn.unknown_setting, learn.bad_setting.
    """
    name, _, options = text.partition(":")
    method = method_named(name)
    parameters = inspect.signature(method.__init__).parameters.values()
    own_defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    settings: dict[str, Any] = {}
    common: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if key in own_defaults:
            # A parameter's type is that of its default.
            settings[key] = _read(text, key, value if equals else "", type(own_defaults[key]))
        elif key in COMMON:
            common[key] = _read(text, key, value if equals else "", COMMON[key])
        else:
            known_keys = ", ".join((*own_defaults, *COMMON))
            raise RatchetError("learn.unknown_setting", f"{name} has no '{key}'", where=text, fix=f"keys: {known_keys}")
    _check_common(common, text)
    sequence = {key: common.pop(key) for key in SEQUENCE if key in common}
    weights: dict[str, float] = {key: common.pop(key) for key in RETENTION if key != "reference" and key in common}
    reference = common.get("reference", "none")
    if weights and reference == "none":
        raise RatchetError("learn.bad_setting", "weights without a reference", where=text, fix="add reference=base")
    if reference != "none" and not method.can_retain:
        raise RatchetError("learn.bad_setting", f"{name} takes no reference set", where=text, fix="leave it out")
    return Variant(text, method, settings, **common, sequence=sequence, weights=weights)


def _check_common(common: dict[str, Any], text: str) -> None:
    order = common.get("order", "given")
    if order not in ("given", "reversed") and not order.isdigit():
        raise RatchetError("learn.bad_setting", f"order '{order}'", where=text, fix="given, reversed, or a number")
    for key, value in common.items():
        if key in ("reference_weight", "own_weight") and value >= 0:
            continue  # 0 leaves a term out
        if key not in ("order", "until", "reference") and not value > 0:
            raise RatchetError("learn.bad_setting", f"{key} {value} is not above 0", where=text)


def _read(text: str, key: str, value: str, value_type: type) -> Any:
    try:
        if not value:
            raise ValueError("no value")
        return value_type(value)
    except ValueError:
        raise RatchetError(
            "learn.bad_setting", f"{key} '{value}' is not of type {value_type.__name__}", where=text
        ) from None
