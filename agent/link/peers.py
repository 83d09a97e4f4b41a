"""What a learner's end remembers of its robots and counts, and how a state is given a version.

Knows names, times and numbers. Knows no socket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

PRESENT = 5.0  # seconds after its last word that a robot counts as present


@dataclass
class Peer:
    """What is known of a robot. seen: monotonic seconds. report: its own words, see `client.LinkClient.report`."""

    name: str
    seen: float
    report: dict[str, Any] = field(default_factory=dict)
    software: str = ""
    routing: bytes = b""
    version: str = ""  # of the state that it has

    def present(self, now: float) -> bool:
        return now - self.seen < PRESENT


@dataclass
class Counts:
    """messages: well-formed ones from allowed robots. malformed, strangers: refused. received: files counted."""

    messages: int = 0
    malformed: int = 0
    strangers: int = 0
    refused: int = 0
    received: int = 0
    bytes: int = 0


def version_of(body: Mapping[str, Any]) -> str:
    """A state's version: equal states have one version, whoever computes it."""
    return hashlib.sha256(msgpack.packb(body)).hexdigest()[:16]
