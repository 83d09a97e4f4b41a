"""ChunkServer: what the policy's own process asks of a policy, whichever it is.

Knows chunks and adapters by name. Knows no socket, no network and no robot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.records import Float32, Int64, UInt8
from ratchet_vla.runtime.inference.source import Ahead

__all__ = ["ChunkServer", "Inferred", "OpenServer"]


@dataclass
class Inferred:
    """One answer. actions: (K, D) float32, the robot's physical units; tokens, log_prob, compute_dtype: as in
    `ActionChunk`."""

    actions: Float32
    tokens: Int64 | Float32 | None
    log_prob: Float32 | None
    adapter_id: str
    compute_dtype: str = ""


class ChunkServer(Protocol):
    """A policy as this process sees it. `infer` and `swap` may be called from different threads at once."""

    spec: PolicySpec
    base_hash: str
    warnings: list[str]

    @property
    def adapter_id(self) -> str: ...

    @property
    def computing(self) -> str:
        """What products are computed in and why, in words; empty for a policy that does not tell."""
        ...

    def infer(
        self,
        images: list[UInt8],
        state: Float32,
        instruction: str,
        temperature: float,
        noise: Float32 | None,
        ahead: Ahead | None,
    ) -> Inferred: ...

    def swap(self, reference: str, expected_id: str) -> dict[str, Any]:
        """Validate, stage beside, flip between two chunks; what happened, as JSON data. Raises RatchetError."""
        ...

    def adapters(self) -> list[dict[str, Any]]:
        """What could be swapped to, as JSON data."""
        ...


OpenServer = Callable[[dict[str, Any], RobotContract], ChunkServer]
"""Makes the server in the policy's process, from the options of its launch and the contract."""
