"""Plain data, as YAML holds it, to frozen dataclasses: names and types only, and every refusal names file and field."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal

from ratchet_vla.errors import RatchetError


def build(cls: type[Any], raw: Any, where: str) -> Any:
    """Construct a frozen dataclass from plain YAML data, refusing what it does not know."""
    if not isinstance(raw, dict):
        raise RatchetError("contract.wrong_type", f"expected a mapping, got {type(raw).__name__}", where=where)
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known fields: {', '.join(known)}"
            raise RatchetError("contract.unknown_field", f"unknown field '{key}'", where=where, fix=hint)
    values: dict[str, Any] = {}
    for name, spec in known.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], f"{where}: {name}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise RatchetError("contract.missing_field", f"field '{name}' is missing", where=where, fix="add it")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise RatchetError("contract.wrong_type", f"expected a list, got {value!r}", where=where)
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            raise RatchetError(
                "contract.bad_value",
                f"{value!r} is not allowed",
                where=where,
                fix=f"one of {', '.join(map(str, args))}",
            )
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isnan(value):
            raise RatchetError("contract.bad_value", "NaN is not a value", where=where, fix="give a number")
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise RatchetError("contract.wrong_type", f"expected {hint.__name__}, got {value!r}", where=where)
