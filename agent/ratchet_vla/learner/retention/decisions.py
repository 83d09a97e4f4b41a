"""Decisions as a divergence takes them: what the policy saw, what was asked of it, what it sampled.

Knows arrays. Knows no policy, no file and no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.policy.protocol import PolicyInput
from ratchet_vla.records import Float32, Int64, UInt8


@dataclass(frozen=True)
class Decisions:
    """N decisions of one base.

    images: (N, V, H, W, 3) uint8, RGB, upright, V cameras in the policy's order. state: (N, S) float32, physical units.
    instruction: (N,) int64, index into `instructions`. tasks: names, one per instruction.
    sampled: what `Chunks.tokens` held, (N, K, D) int64 bins or (N, steps + 1, H, A) float32 chains.
    """

    images: UInt8
    state: Float32
    instruction: Int64
    instructions: tuple[str, ...]
    tasks: tuple[str, ...]
    sampled: Int64 | Float32

    def __len__(self) -> int:
        return len(self.instruction)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, bytes."""
        return self.images.nbytes + self.state.nbytes + self.instruction.nbytes + self.sampled.nbytes

    def policy_input(self, rows: Int64) -> PolicyInput:
        """The observations of some decisions, as the policy takes them."""
        return PolicyInput(
            images=self.images[rows],
            state=torch.from_numpy(self.state[rows]) if self.state.shape[1] else None,
            instructions=[self.instructions[i] for i in self.instruction[rows]],
        )

    def sampled_at(self, rows: Int64) -> Tensor:
        """What was sampled in some decisions."""
        return torch.from_numpy(self.sampled[rows])

    def at(self, rows: Int64) -> Decisions:
        """Some of the decisions."""
        return replace(
            self,
            images=self.images[rows],
            state=self.state[rows],
            instruction=self.instruction[rows],
            sampled=self.sampled[rows],
        )

    def without(self, tasks: Sequence[str]) -> Decisions:
        """All decisions but those of some tasks, named by task or by instruction."""
        names = set(tasks)
        others = [
            index
            for index, (task, instruction) in enumerate(zip(self.tasks, self.instructions, strict=True))
            if task not in names and instruction not in names
        ]
        return self.at(np.flatnonzero(np.isin(self.instruction, others)))

    @property
    def present_tasks(self) -> tuple[str, ...]:
        """Names of the tasks that at least one decision belongs to."""
        return tuple(sorted({self.tasks[i] for i in np.unique(self.instruction)}))


def decisions_of(batch: RolloutBatch, rows: Int64, task_names: Mapping[str, str]) -> Decisions:
    """Some decisions of a rollout. task_names: instruction -> task."""
    tasks = tuple(task_names[instruction] for instruction in batch.instructions)
    return Decisions(
        images=batch.images[rows],
        state=batch.state[rows],
        instruction=batch.instruction[rows],
        instructions=tuple(batch.instructions),
        tasks=tasks,
        sampled=batch.tokens[rows],
    )


def joined(parts: Sequence[Decisions]) -> Decisions:
    """Decisions of several recordings of one base, in their order."""
    offsets = np.cumsum([0, *(len(part.instructions) for part in parts)])
    return Decisions(
        images=np.concatenate([part.images for part in parts]),
        state=np.concatenate([part.state for part in parts]),
        instruction=np.concatenate(
            [part.instruction + offset for part, offset in zip(parts, offsets[:-1], strict=True)]
        ),
        instructions=tuple(text for part in parts for text in part.instructions),
        tasks=tuple(task for part in parts for task in part.tasks),
        sampled=np.concatenate([part.sampled for part in parts]),
    )
