"""Terms of the loss that hold an adapter near what could be done before.

Departures from plain Seq. FT (arXiv 2603.11653): after the policy gradient of each optimiser step come the gradients of

    reference_weight * KL(base || adapter)            on decisions of the base on other tasks, and
    own_weight       * KL(adapter then || adapter)    on each earlier task's own last successes.

The first keeps what nobody trained, the second what was learned: without it the first pulls earlier tasks back to the
base. Both are distillation from an earlier self (Li and Hoiem 2016, arXiv 1606.09282), on states of other tasks instead
of the current one's.

Knows decisions, weights and a memory budget. Knows no environment and no optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ratchet_vla.adapters.lora.layers import Lora
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.retention.decisions import Decisions, decisions_of
from ratchet_vla.learner.retention.divergence import Divergence, divergence_of
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.policy.noise import derive_seed
from ratchet_vla.policy.protocol import Policy
from ratchet_vla.records import Int64

FORWARD_ROWS = 64
"""Decisions per forward while targets are computed."""


@dataclass(frozen=True)
class RetentionConfig:
    """How strongly an adapter is held."""

    reference_weight: float = 1.0
    """Weight of KL(base || adapter) on the reference set, per nat and action token; 0 leaves it out."""
    own_weight: float = 1.0
    """Weight of KL(adapter after its stage || adapter) on an earlier task's own successes; 0 leaves it out."""
    reference_decisions: int = 64
    """Decisions of the reference set per optimiser step."""
    own_decisions: int = 32
    """Decisions of earlier tasks per optimiser step, shared among them, at least 16 each."""
    own_megabytes: float = 64.0
    """Memory for the successes of all earlier tasks together, with their targets."""

    def __post_init__(self) -> None:
        if self.reference_weight < 0 or self.own_weight < 0:
            raise RatchetError(
                "learn.bad_setting", "a weight of the retention is below 0", fix="0 leaves a term out, 1 is the default"
            )
        if self.reference_decisions < 1 or self.own_decisions < 1 or not self.own_megabytes > 0:
            raise RatchetError(
                "learn.bad_setting", "decisions per step and memory of the retention must be above 0", fix="see --help"
            )


@dataclass
class _Held:
    """Decisions of one task and the distributions that they are held to. targets: (N, …) float16."""

    decisions: Decisions
    targets: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of decisions and targets, bytes."""
        return self.decisions.nbytes + self.targets.nbytes

    def thinned(self, count: int, seed: int) -> _Held:
        """At most `count` of the decisions, drawn at random."""
        if len(self.decisions) <= count:
            return self
        rows = np.sort(np.random.default_rng(seed).permutation(len(self.decisions))[:count])
        return _Held(self.decisions.at(rows), self.targets[torch.from_numpy(rows)])


class Retention:
    """Holds one adapter while it learns one task after another. Its whole state is in `state_dict`.

    Args:
        reference: decisions of the base on tasks that are neither learned nor held out; None for no such term.
        config: weights and memory.
        micro_size: decisions per forward and backward; changes memory, not the result.
        identity: of the reference set, "" without one; part of a run's identity.
    """

    def __init__(
        self, reference: Decisions | None, config: RetentionConfig, *, micro_size: int = 64, identity: str = ""
    ) -> None:
        if reference is not None and not len(reference):
            raise RatchetError(
                "reference.empty",
                "no decision of the reference set is left after those of the tasks learned or held out here",
                fix="record one on other tasks, or --reference none",
            )
        self.config = config
        self.reference = reference if config.reference_weight else None
        self.identity = identity
        self._micro_size = micro_size
        self._divergence: Divergence | None = None
        self._policy: Policy | None = None
        self._lora: Lora | None = None
        self._seed = 0
        self._reference_targets: Tensor | None = None
        self._own: dict[str, _Held] = {}  # by task, in the order in which they were learned
        self._latest: Decisions | None = None  # successes of the newest update of the current task

    def bind(self, policy: Policy, lora: Lora, seed: int) -> None:
        """Called once, before the first task.

        Raises:
            RatchetError: learn.cannot_retain.
        """
        self._divergence = divergence_of(policy)
        self._policy = policy
        self._lora = lora
        self._seed = seed

    @property
    def settings(self) -> dict[str, Any]:
        """What a run's identity contains."""
        return {"reference": self.identity, **vars(self.config)}

    # -- a run -----------------------------------------------------------------------------------------------

    def begin_task(self) -> None:
        """Before the first update of a task."""
        self._latest = None

    def after_update(self, batch: RolloutBatch | None, task: str) -> None:
        """Keep the successes that the current task's newest update was made of."""
        if batch is None or not self.config.own_weight:
            return
        successes = np.flatnonzero(batch.success[batch.episode])
        if not len(successes):
            return
        names = dict.fromkeys(batch.instructions, task)
        limit = self._decisions_that_fit(decisions_of(batch, successes[:1], names))
        order = np.random.default_rng(derive_seed(self._seed, "own", task)).permutation(successes)
        self._latest = decisions_of(batch, np.sort(order[:limit]), names)

    def end_task(self, task: str) -> None:
        """After a task's last update: what the adapter does on its own successes is what it is held to from now on."""
        if self._latest is None:
            return
        latest = self._latest
        self._latest = None
        self._own.pop(task, None)
        self._own[task] = _Held(latest, self._targets(latest))
        self._keep_within_budget()

    # -- an update -------------------------------------------------------------------------------------------

    def losses(self, generator: torch.Generator) -> Iterator[Tensor]:
        """The terms of one optimiser step in micro-batches; backward is called on each before the next is made.

        Yields:
            A scalar with gradient; their sum is the whole.
        """
        if self.reference is not None:
            if self._reference_targets is None:
                self._reference_targets = self._base_targets(self.reference)
            held = _Held(self.reference, self._reference_targets)
            yield from self._drawn(held, self.config.reference_decisions, self.config.reference_weight, generator)
        if self._own:
            count = max(16, self.config.own_decisions // len(self._own))
            for held in self._own.values():
                yield from self._drawn(held, count, self.config.own_weight / len(self._own), generator)

    def _drawn(self, held: _Held, count: int, weight: float, generator: torch.Generator) -> Iterator[Tensor]:
        assert self._divergence is not None
        rows = torch.randint(0, len(held.decisions), (count,), generator=generator)
        for part in rows.split(self._micro_size):  # type: ignore[no-untyped-call]
            index: Int64 = part.numpy()
            loss = self._divergence.loss(
                held.decisions.policy_input(index), held.decisions.sampled_at(index), held.targets[part], generator
            )
            yield weight * len(part) / count * loss

    # -- resuming --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data. The base's targets are not among them: the base gives them again."""
        return {
            "own": {task: {"targets": h.targets, **_packed(h.decisions)} for task, h in self._own.items()},
            "latest": None if self._latest is None else _packed(self._latest),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, after `bind`."""
        self._own = {task: _Held(_unpacked(part), part["targets"]) for task, part in state["own"].items()}
        self._latest = None if state["latest"] is None else _unpacked(state["latest"])

    def describe(self) -> str:
        """One line for people."""
        parts = []
        if self.reference is not None:
            tasks = len(self.reference.present_tasks)
            weight = self.config.reference_weight
            parts.append(f"{len(self.reference)} decisions of the base on {tasks} other tasks, weight {weight:g}")
        if self.config.own_weight:
            parts.append(f"own successes of earlier tasks, weight {self.config.own_weight:g}")
        return "held by " + " and ".join(parts) if parts else "held by nothing"

    # -- inside ----------------------------------------------------------------------------------------------

    def _targets(self, decisions: Decisions) -> Tensor:
        assert self._divergence is not None
        parts = []
        for start in range(0, len(decisions), FORWARD_ROWS):
            rows = np.arange(start, min(start + FORWARD_ROWS, len(decisions)))
            parts.append(self._divergence.targets(decisions.policy_input(rows), decisions.sampled_at(rows)))
        return torch.cat(parts)

    def _base_targets(self, decisions: Decisions) -> Tensor:
        assert self._lora is not None
        with self._lora.disabled():
            return self._targets(decisions)

    def _decisions_that_fit(self, example: Decisions) -> int:
        """How many decisions like this one the budget holds, targets included."""
        each = example.nbytes + self._targets(example).nbytes
        return max(1, int(self.config.own_megabytes * 1e6 / each))

    def _keep_within_budget(self) -> None:
        """Thin out all earlier tasks to equal shares of the budget."""
        share = self.config.own_megabytes * 1e6 / len(self._own)
        for task, held in self._own.items():
            fits = max(1, int(share / (held.nbytes / len(held.decisions))))
            self._own[task] = held.thinned(fits, derive_seed(self._seed, "own", task, len(self._own)))


def reference_for(decisions: Decisions | None, learned: Sequence[str], held_out: Sequence[str]) -> Decisions | None:
    """The reference set without the tasks that are learned and those that are held out.

    It would pull the former back to the base, and the latter would no longer be an example of what nobody trained.
    """
    return None if decisions is None else decisions.without([*learned, *held_out])


def _packed(decisions: Decisions) -> dict[str, Any]:
    return {
        "images": torch.from_numpy(decisions.images),
        "state": torch.from_numpy(decisions.state),
        "instruction": torch.from_numpy(decisions.instruction),
        "sampled": torch.from_numpy(decisions.sampled),
        "instructions": list(decisions.instructions),
        "tasks": list(decisions.tasks),
    }


def _unpacked(part: dict[str, Any]) -> Decisions:
    return Decisions(
        images=part["images"].numpy(),
        state=part["state"].numpy(),
        instruction=part["instruction"].numpy(),
        instructions=tuple(part["instructions"]),
        tasks=tuple(part["tasks"]),
        sampled=part["sampled"].numpy(),
    )
