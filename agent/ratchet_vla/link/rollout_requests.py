"""Rollout request of the learner: `order` in the state that it publishes, checked field by field.

Knows the request's form. Knows neither who collects nor what is done with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ratchet_vla.errors import RatchetError

KINDS: dict[str, Any] = {"str": str, "float": (int, float), "int": int}


@dataclass(frozen=True)
class RolloutRequest:
    """Episodes of one task under one adapter.

    Attributes:
        slots: in simulation, how many exact episodes (initial state and seed from the numbers here); 0 where any
            episode of the task is welcome, as from an arm, whose scenes cannot be repeated.
        groups, group_size: their product is the number of episodes requested.
        have: of these, how many are accepted already.
        horizon: control periods.
        noise_correlation: of the sampling noise within a chunk, in [0, 1).
    """

    id: str
    task: str
    instruction: str
    adapter: str
    temperature: float
    noise_correlation: float
    stage: int
    update: int
    groups: int
    group_size: int
    horizon: int
    seed: int
    slots: int
    have: int

    @property
    def wanted(self) -> int:
        return self.groups * self.group_size

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> RolloutRequest | None:
        """The rollout request in a learner's published state, if there is one.

        Raises:
            RatchetError: robot.bad_order.
        """
        request_fields = state.get("order")
        if request_fields is None:
            return None
        try:
            request = cls(**{field_name: request_fields[field_name] for field_name in cls.__dataclass_fields__})
            for field_name, type_name in cls.__annotations__.items():
                if not isinstance(getattr(request, field_name), KINDS[type_name]):
                    raise TypeError(field_name)
        except (KeyError, TypeError) as error:
            raise RatchetError(
                "robot.bad_order",
                f"the learner's rollout request cannot be read: {error}",
                fix="run the same release on both",
            ) from None
        return request
