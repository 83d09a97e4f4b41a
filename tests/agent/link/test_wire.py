"""Messages come from another machine: whatever bytes arrive, `decode` gives checked fields or refuses with a code.

Pinned: round trip of every kind, refusal of any missing, unknown or wrong field, other schemas, sizes beyond limits,
and that no input makes it raise anything else. Deterministic: hypothesis with a fixed profile, no sockets.
"""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet_vla.errors import RatchetError
from ratchet_vla.link import wire

HASH = "ab" * 32
EXAMPLES: dict[str, dict[str, Any]] = {
    "hello": {"robot": "r-1", "software": "0.1"},
    "beat": {"robot": "r-1", "have": "", "report": {"a": [1, 2.5, None, True, "x"], "b": {"c": -1}}},
    "offer": {"robot": "r-1", "sha": HASH, "size": 3, "type": "episode", "key": "k", "sequence": 1, "meta": {}},
    "chunk": {"robot": "r-1", "sha": HASH, "offset": 0},
    "parts": {"robot": "r-1", "adapter": HASH},
    "read": {"robot": "r-1", "adapter": HASH, "name": "card.json", "offset": 0, "size": 10},
    "welcome": {"software": "0.1"},
    "state": {"version": "v", "body": {"tags": {"active": HASH}}},
    "same": {"version": "v"},
    "need": {"sha": HASH, "offset": 7},
    "got": {"sha": HASH, "offset": 7},
    "stored": {"sha": HASH},
    "files": {"adapter": HASH, "files": [{"name": "card.json", "size": 3, "sha": HASH}]},
    "data": {"adapter": HASH, "name": "card.json", "offset": 0},
    "refused": {"about": HASH, "code": "link.disk_full", "what": "no space", "fix": "", "again": True},
}
WRONG = [None, -1, 2**63, 1.5, "", "../x", "x" * 500, b"bytes", [], {}, [1], {"a": 1}, True]


def test_every_kind_has_an_example() -> None:
    assert EXAMPLES.keys() == wire.KINDS.keys()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_round_trip(kind: str) -> None:
    payload = b"\x00\xff" if kind in wire.PAYLOAD else None
    message = wire.decode(wire.encode(kind, EXAMPLES[kind], payload))
    assert (message.kind, message.fields) == (kind, EXAMPLES[kind])
    assert (None if message.payload is None else bytes(message.payload)) == payload


@pytest.mark.parametrize("kind", EXAMPLES)
def test_missing_and_unknown_fields_and_frames_are_refused(kind: str) -> None:
    payload = [b"x"] if kind in wire.PAYLOAD else []
    head = {"v": 1, "k": kind, **EXAMPLES[kind]}
    for field in EXAMPLES[kind]:
        _refused([msgpack.packb({k: v for k, v in head.items() if k != field}), *payload], "link.bad_message")
    _refused([msgpack.packb({**head, "extra": 1}), *payload], "link.bad_message")
    other_frames = [] if payload else [b"x"]
    _refused([msgpack.packb(head), *other_frames], "link.bad_message")
    _refused([msgpack.packb(head), b"x", b"y"], "link.bad_message")


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_field_of_another_type_is_refused_by_both_sides(kind: str) -> None:
    payload = [b"x"] if kind in wire.PAYLOAD else []
    for field, right in EXAMPLES[kind].items():
        for wrong in WRONG:
            fields = {**EXAMPLES[kind], field: wrong}
            try:
                frames = [msgpack.packb({"v": 1, "k": kind, **fields}), *payload]
                message = wire.decode(frames)
            except (RatchetError, OverflowError):
                with pytest.raises(RatchetError):
                    wire.encode(kind, fields, payload[0] if payload else None)
                continue
            assert type(message[field]) is type(right) or isinstance(message[field], type(right))


@pytest.mark.parametrize("version", [0, 2, "1", None, True, -1, 1.0 + 1e-9])
def test_another_schema_is_named(version: Any) -> None:
    _refused([msgpack.packb({"v": version, "k": "hello", **EXAMPLES["hello"]})], "link.schema")


def test_sizes_are_limited() -> None:
    _refused([b"\x00" * (wire.HEADER_LIMIT + 1)], "link.too_large")
    chunk = wire.encode("chunk", EXAMPLES["chunk"], b"x")
    _refused([chunk[0], b"\x00" * (wire.PAYLOAD_LIMIT + 1)], "link.too_large")
    _refused([msgpack.packb({"v": 1, "k": "beat", "robot": "r", "have": "", "report": {"x": "y" * 60_000}})], None)
    deep: Any = 1
    for _ in range(wire.DEPTH + 1):
        deep = [deep]
    with pytest.raises(RatchetError):
        wire.encode("beat", {"robot": "r", "have": "", "report": {"x": deep}})
    with pytest.raises(RatchetError):
        wire.encode("beat", {"robot": "r", "have": "", "report": {"x": float("nan")}})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.binary(max_size=300), max_size=4))
def test_random_bytes_are_refused_with_a_code(frames: list[bytes]) -> None:
    with pytest.raises(RatchetError) as caught:
        wire.decode(frames)
    assert caught.value.code.startswith("link.")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(EXAMPLES)), st.data())
def test_any_change_of_a_message_is_checked(kind: str, data: Any) -> None:
    field = data.draw(st.sampled_from(sorted(EXAMPLES[kind])))
    head = {"v": 1, "k": kind, **EXAMPLES[kind], field: data.draw(values)}
    frames = [msgpack.packb(head)] + ([b"x"] if kind in wire.PAYLOAD else [])
    try:
        message = wire.decode(frames)
    except RatchetError as error:
        code = error.code
    else:
        code = ""
        assert wire.encode(kind, message.fields, b"x" if kind in wire.PAYLOAD else None)
    assert code in ("", "link.bad_message", "link.too_large")


def _refused(frames: list[bytes], code: str | None) -> None:
    with pytest.raises(RatchetError) as caught:
        wire.decode(frames)
    assert code is None or caught.value.code == code
