"""Checks that the configurations of both families share, and the one difference between JSON data and dataclasses.

Knows dataclasses of literals and numbers. Knows no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_type_hints

from ratchet_vla.errors import RatchetError


def impossible(config: object, name: str, fix: str) -> RatchetError:
    """Return the refusal of one option's value: policy.bad_config."""
    value = getattr(config, name)
    return RatchetError("policy.bad_config", f"{name} = {value!r} is not possible", where="model", fix=fix)


def require_choices(config: object, names: Iterable[str]) -> None:
    """Refuse options that are none of the values that their annotation, a Literal, lists.

    Raises:
        RatchetError: policy.bad_config.
    """
    hints = get_type_hints(type(config))
    for name in names:
        choices = get_args(hints[name])
        if getattr(config, name) not in choices:
            raise impossible(config, name, f"one of {', '.join(choices)}")


def require_counts(config: object, names: Iterable[str]) -> None:
    """Refuse options that are not whole numbers above 0.

    Raises:
        RatchetError: policy.bad_config.
    """
    for name in names:
        value = getattr(config, name)
        if not (isinstance(value, int) and value > 0):
            raise impossible(config, name, "give a whole number above 0")


def tuples_for_lists(data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data with tuples where JSON knows lists only: the fields of a frozen dataclass."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
