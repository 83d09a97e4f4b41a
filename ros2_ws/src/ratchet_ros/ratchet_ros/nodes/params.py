"""Parameters as a frozen dataclass: typed, described, bounded, declared on a node and read back.

Knows rclpy's descriptors. Knows no parameter of any node.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node
from rclpy.parameter import Parameter

from ratchet_vla.errors import RatchetError

T = TypeVar("T")

_TYPES = {
    bool: Parameter.Type.BOOL,
    int: Parameter.Type.INTEGER,
    float: Parameter.Type.DOUBLE,
    str: Parameter.Type.STRING,
    list[str]: Parameter.Type.STRING_ARRAY,
    list[float]: Parameter.Type.DOUBLE_ARRAY,
}


def parameter(
    default: Any,
    description: str,
    *,
    low: float | None = None,
    high: float | None = None,
    one_of: tuple[str, ...] = (),
    live: bool = False,
) -> Any:
    """A field of a parameter dataclass. low, high: bounds, both inclusive. live: may be changed while active."""
    metadata = {"description": description, "low": low, "high": high, "one_of": one_of, "live": live}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def declare(node: Node, kind: type[Any]) -> None:
    """Declare every field of the dataclass on the node."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        descriptor = ParameterDescriptor(description=field.metadata["description"], read_only=False)
        low, high, one_of = (field.metadata[k] for k in ("low", "high", "one_of"))
        if low is not None and hints[field.name] is int:
            descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high))]
        elif low is not None:
            descriptor.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high))]
        if one_of:
            descriptor.additional_constraints = "one of: " + ", ".join(one_of)
        default = _default_of(field)
        if hints[field.name] in (list[str], list[float]) and not default:
            node.declare_parameter(field.name, _TYPES[hints[field.name]], descriptor)
        else:
            node.declare_parameter(field.name, default, descriptor)


def read(node: Node, kind: type[T]) -> T:
    """The parameters as they are set now.

    Raises:
        RatchetError: ros.bad_parameter for a word that is not among those allowed.
    """
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        found = node.get_parameter_or(field.name)
        value = found.value if found is not None else None
        if value is None:
            value = _default_of(field)
        values[field.name] = list(value) if hasattr(value, "tolist") or isinstance(value, tuple) else value
        one_of = field.metadata["one_of"]
        if one_of and value not in one_of:
            raise RatchetError(
                "ros.bad_parameter", f"{value!r} is not allowed", where=field.name, fix=f"one of {', '.join(one_of)}"
            )
    return kind(**values)


def refusal(kind: type[Any], active: bool, changed: list[Parameter]) -> str:
    """Why a change of parameters is refused; empty where it is allowed."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for wanted in changed:
        field = fields.get(wanted.name)
        if field is None:
            continue
        if active and not field.metadata["live"]:
            return (
                f"[ros.parameter_fixed] {wanted.name} is fixed while the node is active; deactivate and clean up first"
            )
        one_of = field.metadata["one_of"]
        if one_of and wanted.value not in one_of:
            return f"[ros.bad_parameter] {wanted.name} is one of {', '.join(one_of)}"
    return ""
