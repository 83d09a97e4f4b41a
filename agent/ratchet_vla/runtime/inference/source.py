"""Where chunks come from: the protocol between the control loop and a policy, wherever it runs.

Knows requests, replies and faults. Knows no process, no socket and no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ratchet_vla.records import ActionChunk, Float32, Observation


@dataclass(frozen=True)
class PolicyFault:
    """The policy failed. code: such as policy.crashed, policy.hung, policy.out_of_memory, policy.failed."""

    code: str
    message: str


Reply = ActionChunk | PolicyFault

Noise = Callable[[np.random.Generator, tuple[int, int]], Float32]  # draws (K, D) uniform in [0, 1)


def independent(generator: np.random.Generator, shape: tuple[int, int]) -> Float32:
    """(K, D) float32 uniform in [0, 1), every number on its own."""
    return generator.random(shape, np.float32)


class Sampling:
    """How actions are drawn. temperature: 0 acts greedily. noise: `independent` if absent."""

    def __init__(self, temperature: float = 0.0, seed: int = 0, noise: Noise | None = None) -> None:
        self.temperature, self._noise = temperature, noise or independent
        self._generator = np.random.Generator(np.random.Philox(key=seed))

    def draw(self, shape: tuple[int, int]) -> Float32 | None:
        """The next chunk's noise, (K, D) float32 in [0, 1); None where none is needed."""
        return self._noise(self._generator, shape) if self.temperature > 0.0 else None


@dataclass(frozen=True)
class Ahead:
    """What will already have been sent when an answer arrives: for policies with real-time chunking.

    previous_actions: (P, D) float32, the actions of the running plan from the observation's moment on, physical units:
    the
        answer's first action is for the same moment as the first of these.
    delay: of these, how many have been sent or will surely be before the answer is in force.
    """

    previous_actions: Float32
    delay: int


@runtime_checkable
class ChunkSource(Protocol):
    """One request at a time; asking, polling and status never wait for the policy."""

    @property
    def ready(self) -> bool:
        """Whether `request` may be called now: up, and no request is out."""
        ...

    def request(self, observation: Observation, ahead: Ahead | None = None) -> None:
        """Ask for a chunk for this observation. Raises RatchetError policy.not_ready."""
        ...

    def poll(self) -> list[Reply]:
        """Answers and faults since the last call, oldest first."""
        ...

    def wait(self, timeout: float) -> list[Reply]:
        """Like `poll`, waiting up to `timeout` real seconds for the first: for lock-step only."""
        ...

    def forget(self) -> None:
        """The answer to the request that is out, if any, is not wanted any more."""
        ...
