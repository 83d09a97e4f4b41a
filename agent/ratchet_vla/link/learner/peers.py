"""Registry entries of the link server: known robots, message counts, and the version of a state.

Knows names, times and numbers. Knows no socket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

PRESENT = 5.0  # seconds after its last message for which a robot counts as present: five of its beats


@dataclass
class Peer:
    """One known robot. seen: monotonic seconds of its last message. report: see `client.LinkClient.report`."""

    name: str
    seen: float
    report: dict[str, Any] = field(default_factory=dict)
    software: str = ""
    routing: bytes = b""
    version: str = ""  # of the state that it has

    def present(self, now_s: float) -> bool:
        return now_s - self.seen < PRESENT


@dataclass
class Counts:
    """Message counts of a server since its start.

    Attributes:
        messages: well-formed ones from allowed robots.
        malformed, strangers: refused.
        received: files counted.
    """

    messages: int = 0
    malformed: int = 0
    strangers: int = 0
    refused: int = 0
    received: int = 0
    bytes: int = 0


def version_of(body: Mapping[str, Any]) -> str:
    """A state's version: equal states have one version, whoever computes it."""
    return hashlib.sha256(msgpack.packb(body)).hexdigest()[:16]
