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
    """Construct a frozen dataclass from plain YAML data, refusing what it does not know.

    Raises:
        RatchetError: contract.wrong_type, contract.unknown_field, contract.missing_field, contract.bad_value.
    """
    if not isinstance(raw, dict):
        raise RatchetError("contract.wrong_type", f"expected a mapping, got {type(raw).__name__}", where=where)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            raise _unknown_field(str(key), list(fields), where)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RatchetError("contract.missing_field", f"field '{name}' is missing", where=where, fix="add it")
    return cls(**values)


def _unknown_field(name: str, field_names: list[str], where: str) -> RatchetError:
    similar = difflib.get_close_matches(name, field_names, n=1)
    hint = f"did you mean '{similar[0]}'?" if similar else f"known fields: {', '.join(field_names)}"
    return RatchetError("contract.unknown_field", f"unknown field '{name}'", where=where, fix=hint)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Convert one value to what its field's annotation says."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        # The only unions in a contract are "this or nothing".
        inner_hint = next(argument for argument in arguments if argument is not type(None))
        return _convert(inner_hint, value, where)
    if origin is tuple:
        return _convert_list(arguments[0], value, where)
    if origin is Literal:
        return _convert_choice(arguments, value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, where)
    return _convert_scalar(hint, value, where)


def _convert_list(element_hint: Any, value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise RatchetError("contract.wrong_type", f"expected a list, got {value!r}", where=where)
    return tuple(_convert(element_hint, element, f"{where}[{index}]") for index, element in enumerate(value))


def _convert_choice(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    # The type counts too: True equals 1, and is not meant by it.
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        fix = f"one of {', '.join(map(str, choices))}"
        raise RatchetError("contract.bad_value", f"{value!r} is not allowed", where=where, fix=fix)
    return value


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    # bool is an int to Python, and neither a whole number nor a measurement to a contract.
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int | float) and not is_bool:
        if math.isnan(value):
            raise RatchetError("contract.bad_value", "NaN is not a value", where=where, fix="give a number")
        return float(value)
    if isinstance(value, hint) and not (hint is int and is_bool):
        return value
    raise RatchetError("contract.wrong_type", f"expected {hint.__name__}, got {value!r}", where=where)
