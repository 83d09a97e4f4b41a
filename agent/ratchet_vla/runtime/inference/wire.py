"""Messages between the control process and the policy process: a JSON header and raw arrays, length-prefixed.

Knows bytes on a local stream socket. Nothing that is received is executed; sizes and types are checked before use.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ratchet_vla.errors import RatchetError

HEADER = struct.Struct("<II")
MAX_HEADER, MAX_ARRAYS = 4 << 20, 64 << 20
DTYPES = ("float32", "int64", "uint8")

Arrays = dict[str, npt.NDArray[Any]]


def pack(message: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]] | None = None) -> bytes:
    """One message as bytes. message: JSON data with a `type`; arrays: float32, int64 or uint8."""
    parts, shapes = [], []
    for name, array in (arrays or {}).items():
        if array.dtype.name not in DTYPES:
            raise RatchetError("wire.bad_array", f"{array.dtype} does not travel", where=name, fix=" or ".join(DTYPES))
        parts.append(np.ascontiguousarray(array).tobytes())
        shapes.append([name, array.dtype.name, list(array.shape)])
    header = json.dumps({**message, "arrays": shapes}).encode()
    body = b"".join(parts)
    if len(header) > MAX_HEADER or len(body) > MAX_ARRAYS:
        raise RatchetError("wire.too_long", f"a message of {len(header)} + {len(body)} bytes is too long")
    return HEADER.pack(len(header), len(body)) + header + body


def receive(sock: socket.socket) -> tuple[dict[str, Any], Arrays] | None:
    """The next message; None where the other side is gone (also in the middle of a message).

    Raises:
        RatchetError: wire.malformed for anything that `pack` does not write.
    """
    prefix = _exactly(sock, HEADER.size)
    if prefix is None:
        return None
    lengths = HEADER.unpack(prefix)
    if lengths[0] > MAX_HEADER or lengths[1] > MAX_ARRAYS:
        raise RatchetError("wire.malformed", f"a message of {lengths} bytes is not allowed")
    header, body = _exactly(sock, lengths[0]), _exactly(sock, lengths[1])
    if header is None or body is None:
        return None
    try:
        message = json.loads(header)
        arrays: Arrays = {}
        offset = 0
        for name, dtype, shape in message.pop("arrays"):
            if dtype not in DTYPES or any(not isinstance(n, int) or n < 0 for n in shape):
                raise ValueError(f"array {name!r} of {dtype} {shape}")
            count = math.prod(shape)
            arrays[name] = np.frombuffer(body, dtype, count, offset).reshape(shape).copy()
            offset += count * np.dtype(dtype).itemsize
        if offset != len(body) or not isinstance(message["type"], str):
            raise ValueError("sizes do not add up")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RatchetError("wire.malformed", f"a message cannot be read: {error}") from None
    return message, arrays


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    chunks = []
    while count:
        try:
            got = sock.recv(min(count, 1 << 20))
        except (ConnectionResetError, BrokenPipeError):
            return None
        if not got:
            return None
        chunks.append(got)
        count -= len(got)
    return b"".join(chunks)
