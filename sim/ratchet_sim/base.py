"""TaskEnv and Expert interfaces: one simulated task in one process, which workers host and robots wrap.

Knows one task, its initial states, control steps in physical units and frames rendered on demand.
Knows no vectorisation, no policy and no learning.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, UInt8

__all__ = ["Expert", "TaskEnv", "TaskInfo"]


@dataclass(frozen=True)
class TaskInfo:
    """Description of a task, available without building it.

    Attributes:
        suite, name: registry names, such as "libero_object" and its task's name.
        instruction: the task in words, as the policy receives it.
        train_states, evaluation_states: ids of initial states; the two never overlap.
        horizon: control steps before an attempt counts as failed.
    """

    suite: str
    name: str
    instruction: str
    train_states: tuple[int, ...]
    evaluation_states: tuple[int, ...]
    horizon: int


class TaskEnv(ABC):
    """One task. Call `reset`, then `step` until `success` or the horizon.

    Constructing is expensive (a model is compiled); `reset` never recompiles. Not thread-safe.
    """

    info: TaskInfo
    contract: RobotContract

    @abstractmethod
    def reset(self, initial_state: int) -> None:
        """Bring the simulator to the initial state with this id, settled; the same id gives the same state, always.

        Raises:
            RatchetError: sim.unknown_state for an id the task does not have.
        """

    @abstractmethod
    def step(self, action: Float32) -> None:
        """Run one control step.

        Args:
            action: (D,) float32, the contract's physical units; out-of-range values are clipped to the contract's range
                exactly as the simulator's own controller would.
        """

    @abstractmethod
    def success(self) -> bool:
        """The benchmark's own predicate on the current state."""

    @abstractmethod
    def state(self) -> dict[str, Float32]:
        """The contract's state fields, physical units."""

    @abstractmethod
    def render(self, camera: str) -> UInt8:
        """(H, W, 3) uint8 RGB, upright, at the contract's size. camera: a contract camera's name."""

    def scene(self) -> Float32:
        """(P,) float32 m, world frame: positions of the task's objects and goal; empty where the simulator has none.

        Privileged: a target of auxiliary localisation in pretraining, never an input of a policy.
        """
        return np.zeros(0, np.float32)

    @abstractmethod
    def simulator_state(self) -> np.ndarray:
        """Flat float64 vector of the full physics state, for equality checks and restoring."""

    @abstractmethod
    def close(self) -> None:
        """Free the simulator and its GL context; safe to call more than once."""


class Expert(ABC):
    """A scripted expert for one task: stands in for a teleoperator and gives demonstrations.

    It may read the simulator's true state. `act` returns (D,) float32 in physical units of the contract, in range.
    """

    @abstractmethod
    def reset(self, env: TaskEnv) -> None:
        """Forget the last episode; called right after `env.reset`."""

    @abstractmethod
    def act(self, env: TaskEnv) -> Float32:
        """The expert's action for the current state, also from states that noise has led it to."""


def unknown_name(kind: str, name: str, known: Iterable[str], code: str) -> RatchetError:
    """RatchetError for an unknown name, naming the closest known ones."""
    known = list(known)
    close_names = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:8]
    return RatchetError(code, f"no {kind} '{name}'", fix=f"did you mean {', '.join(close_names)}?")
