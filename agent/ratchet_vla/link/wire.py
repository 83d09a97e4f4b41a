"""Wire format of the link: msgpack maps with a schema version, a kind and checked fields; never code.

Knows which kinds exist, which fields they carry and how large anything may be. Knows no socket and no file.
A message is one or two frames: the header (this module's map) and, for `chunk` and `data`, raw bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from ratchet_vla.errors import RatchetError

SCHEMA = 1
HEADER_LIMIT = 64 * 1024  # bytes of a header
PAYLOAD_LIMIT = 4 * 1024 * 1024  # bytes of a payload frame
CHUNK = 1024 * 1024  # bytes of a file sent per message
FILE_LIMIT = 16 * 1024**3  # bytes of one file
TABLE_LIMIT = 48 * 1024  # bytes of a free-form table, encoded
DEPTH = 8  # levels of nesting in a table

Check = Callable[[Any], bool]
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def is_name(value: Any) -> bool:
    """A robot's name: letters, digits, '.', '_', '-', at most 64, so that it can be part of a path."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def is_hash(value: Any) -> bool:
    """SHA-256 in lower-case hex."""
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _file(value: Any) -> bool:
    return isinstance(value, str) and _FILE.fullmatch(value) is not None


def _count(limit: int) -> Check:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _text(limit: int) -> Check:
    return lambda value: isinstance(value, str) and len(value) <= limit


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def plain(value: Any, depth: int = DEPTH) -> bool:
    """Whether a value is plain data: None, bool, int64, finite float, text, lists, maps with text keys."""
    if value is None or isinstance(value, bool | str):
        return True
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, float):
        return math.isfinite(value)
    if depth == 0:
        return False
    if isinstance(value, list | tuple):
        return all(plain(item, depth - 1) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and plain(item, depth - 1) for key, item in value.items())
    return False


def _table(value: Any) -> bool:
    return isinstance(value, Mapping) and plain(value) and len(msgpack.packb(value)) <= TABLE_LIMIT


def _files(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) > 16:
        return False
    return all(
        isinstance(file_fields, Mapping)
        and set(file_fields) == {"name", "size", "sha"}
        and _file(file_fields["name"])
        and _count(FILE_LIMIT)(file_fields["size"])
        and is_hash(file_fields["sha"])
        for file_fields in value
    )


_SIZE = _count(FILE_LIMIT)
# Kind -> its fields, all of them required. Robot to learner first, then learner to robot.
KINDS: dict[str, dict[str, Check]] = {
    "hello": {"robot": is_name, "software": _text(64)},
    "beat": {"robot": is_name, "have": _text(64), "report": _table},
    "offer": {
        "robot": is_name,
        "sha": is_hash,
        "size": _SIZE,
        "type": is_name,
        "key": _text(200),
        "sequence": _count(2**53),
        "meta": _table,
    },
    "chunk": {"robot": is_name, "sha": is_hash, "offset": _SIZE},
    "parts": {"robot": is_name, "adapter": is_hash},
    "read": {"robot": is_name, "adapter": is_hash, "name": _file, "offset": _SIZE, "size": _count(PAYLOAD_LIMIT)},
    "welcome": {"software": _text(64)},
    "state": {"version": _text(64), "body": _table},
    "same": {"version": _text(64)},
    "need": {"sha": is_hash, "offset": _SIZE},
    "got": {"sha": is_hash, "offset": _SIZE},
    "stored": {"sha": is_hash},
    "files": {"adapter": is_hash, "files": _files},
    "data": {"adapter": is_hash, "name": _file, "offset": _SIZE},
    "refused": {"about": _text(64), "code": _text(64), "what": _text(400), "fix": _text(400), "again": _flag},
}
PAYLOAD = {"chunk", "data"}  # kinds with a second frame


@dataclass(frozen=True)
class Message:
    """One checked message. payload: raw bytes of a file, None for kinds without."""

    kind: str
    fields: dict[str, Any]
    payload: memoryview | None = None

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


def encode(kind: str, fields: Mapping[str, Any], payload: bytes | memoryview | None = None) -> list[Any]:
    """The frames of a message.

    Raises:
        RatchetError: link.bad_message where the sender's own fields do not fit; nothing is sent then.
    """
    _check(kind, dict(fields), payload is not None)
    header_bytes = msgpack.packb({"v": SCHEMA, "k": kind, **fields})
    if len(header_bytes) > HEADER_LIMIT:
        raise RatchetError("link.too_large", f"header of {len(header_bytes)} bytes, limit {HEADER_LIMIT}", where=kind)
    return [header_bytes] if payload is None else [header_bytes, payload]


def decode(frames: Sequence[Any]) -> Message:
    """A message from its frames (bytes-like), every field checked.

    Raises:
        RatchetError: link.bad_message, link.too_large, link.schema.
    """
    if not 1 <= len(frames) <= 2:
        raise RatchetError("link.bad_message", f"{len(frames)} frames, expected 1 or 2")
    header_view = memoryview(frames[0])
    if len(header_view) > HEADER_LIMIT:
        raise RatchetError("link.too_large", f"header of {len(header_view)} bytes, limit {HEADER_LIMIT}")
    payload = memoryview(frames[1]) if len(frames) == 2 else None
    if payload is not None and len(payload) > PAYLOAD_LIMIT:
        raise RatchetError("link.too_large", f"payload of {len(payload)} bytes, limit {PAYLOAD_LIMIT}")
    try:
        header_fields = msgpack.unpackb(
            # Limits against hostile input: no extension types, no binary, bounded containers.
            header_view,
            raw=False,
            strict_map_key=True,
            max_ext_len=0,
            max_bin_len=0,
            max_array_len=4096,
            max_map_len=4096,
        )
    except (ValueError, msgpack.UnpackException, TypeError, OverflowError, RecursionError) as error:
        raise RatchetError("link.bad_message", f"not a msgpack header: {type(error).__name__}") from None
    if not isinstance(header_fields, dict) or not all(isinstance(key, str) for key in header_fields):
        raise RatchetError("link.bad_message", "the header is not a map with text keys")
    schema_version = header_fields.pop("v", None)
    kind = header_fields.pop("k", None)
    if schema_version != SCHEMA or isinstance(schema_version, bool):
        raise RatchetError(
            "link.schema",
            f"message of schema {str(schema_version)[:20]!r}, expected {SCHEMA}",
            fix="install the same release of ratchet on robot and learner",
        )
    if not isinstance(kind, str):
        raise RatchetError("link.bad_message", "the message has no kind")
    _check(kind, header_fields, payload is not None)
    return Message(kind, header_fields, payload)


def _check(kind: str, fields: dict[str, Any], payload: bool) -> None:
    field_checks = KINDS.get(kind)
    if field_checks is None:
        raise RatchetError("link.bad_message", f"unknown kind {kind[:40]!r}")
    if fields.keys() != field_checks.keys():
        unexpected_fields = sorted(fields.keys() ^ field_checks.keys())
        raise RatchetError(
            "link.bad_message", f"missing or unknown fields: {', '.join(unexpected_fields)[:80]}", where=kind
        )
    for field_name, field_check in field_checks.items():
        if not field_check(fields[field_name]):
            raise RatchetError("link.bad_message", f"field {field_name} is out of its range or type", where=kind)
    if payload != (kind in PAYLOAD):
        raise RatchetError("link.bad_message", "payload missing or unexpected", where=kind)
