"""Sequential fine-tuning, and the hooks by which every other method differs from it.

Knows one policy, its adapter and the list of tasks. Knows no rollouts, no store and no schedule:
`sequence.SequentialRun` calls the hooks. A method's whole state is in `state_dict`, so that a killed run goes on to
the same numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ratchet_vla.adapters.identity import Adapter, binding_of
from ratchet_vla.adapters.lora.layers import Lora
from ratchet_vla.adapters.protocol import AdapterStore, Provenance
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.retention.regulariser import Retention
from ratchet_vla.learner.supervised.training import Samples
from ratchet_vla.learner.update.ranks import Ranks
from ratchet_vla.learner.update.step import UpdateConfig, Updater
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.protocol import Policy

__all__ = ["SeqFT", "TaskUpdater"]


class TaskUpdater(Protocol):
    """Takes optimiser steps for the length of one task; `update.Updater` is the on-policy one."""

    def update(self, batch: Any) -> dict[str, float]:
        """batch: the stage's `RolloutBatch`, None for a method that needs no rollouts."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, besides the weights: tensors and plain data."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        ...


class SeqFT:
    """Seq. FT: one adapter, carried from task to task, never merged, never initialised again.

    demonstrations: samples for the methods that replay or imitate; None for those that need none.
    """

    name = "seq_ft"
    needs_demonstrations = False
    needs_rollouts = True
    sequential = True
    """Whether tasks come one after the other, so that transfer and forgetting mean something."""
    can_retain = True
    """Whether a reference set can hold what is trained: the base is there beside it, and `Updater` takes the steps."""
    whole_model = False
    """Whether all weights move: they need smaller steps than an adapter's."""

    def __init__(self, demonstrations: Samples | None = None) -> None:
        if self.needs_demonstrations and demonstrations is None:
            raise RatchetError(
                "learn.no_demonstrations", f"method {self.name} needs demonstrations", fix="record or name some"
            )
        self.demonstrations = demonstrations
        self.retention: Retention | None = None

    def bind(self, policy: Policy, lora: Lora, tasks: Sequence[str], seed: int) -> None:
        """Called once, before anything else. `self.policy` is from then on the one that is trained."""
        self.policy = policy
        self.lora = lora
        self.tasks = tuple(tasks)
        self.seed = seed

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own parameters by name, those that differ from their defaults; part of a run's identity."""
        changed = {}
        for parameter in inspect.signature(type(self).__init__).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                value = getattr(self, parameter.name)
                if value != parameter.default:
                    changed[parameter.name] = value
        return changed

    @classmethod
    def serving_rank(cls, rank: int, tasks: int) -> int:
        """Rank that the adapter of the policy in use must have room for."""
        return rank

    # -- a run -----------------------------------------------------------------------------------------------

    def start(self, seed: int) -> None:
        """Before the first task."""
        self.lora.reset(seed % 2**31)

    def begin_task(self, stage: int, seed: int) -> None:
        """Before the first update of the task at index `stage`."""

    def end_task(self, stage: int) -> None:
        """After its last update, before the result is published."""

    def tasks_of(self, stage: int) -> tuple[str, ...]:
        """Tasks whose episodes are learned from at this stage."""
        return (self.tasks[stage],)

    def begin_update(self) -> None:
        """Before each update of a task."""

    # -- an update -------------------------------------------------------------------------------------------

    def make_updater(self, config: UpdateConfig, generator: torch.Generator, ranks: Ranks | None = None) -> TaskUpdater:
        """A fresh optimiser for one task. ranks: the processes that share each step, None for one."""
        return Updater(
            self.policy,
            self.parameters(),
            config,
            generator,
            ranks,
            groups=self.parameter_groups(config.learning_rate),
            on_gradient=self.on_gradient,
            extra_losses=self.extra_losses,
        )

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return self.lora.trainable()

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Groups for the optimiser, with learning rates of their own where the method has them."""
        return [{"params": self.parameters()}]

    def on_gradient(self) -> None:
        """The gradients of one optimiser step are complete; they may be read, not changed."""

    def extra_loss(self, generator: torch.Generator) -> Tensor | None:
        """Added to the loss of each optimiser step; `generator` is part of the resumable state."""
        return None

    def extra_losses(self, generator: torch.Generator) -> Iterator[Tensor]:
        """All terms beside the policy's own, one after the other: the method's, then what holds the adapter."""
        own = self.extra_loss(generator)
        if own is not None:
            yield own
        if self.retention is not None:
            yield from self.retention.losses(generator)

    # -- the result ------------------------------------------------------------------------------------------

    def identity(self) -> str:
        """Id of what is being trained, as it is now: every episode carries it."""
        return self.adapter().id

    def adapter(self) -> Adapter:
        """What a policy in use must load to act as the one being trained."""
        return self.lora.adapter(binding_of(self.policy))

    def publish(self, store: AdapterStore, provenance: Provenance) -> str:
        """Store the result of a stage; returns its id."""
        return store.put(self.adapter(), provenance).id

    def serve(self, serve: Callable[[str], Policy], ids: Sequence[str], stage: int, task: str) -> Policy:
        """The policy that acts on `task` after `stage` tasks; ids: what was published, by stage, "" for the base."""
        return serve(self.acting(ids, stage, task))

    def acting(self, ids: Sequence[str], stage: int, task: str) -> str:
        """Id of what `serve` returns, "" for the base: policies of equal id act alike."""
        return ids[stage]

    # -- resuming --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data; the adapter's own tensors are kept by the run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, after `bind`."""


def require_discrete(policy: Policy) -> PrismaticPolicy:
    """The policy, where a method needs its logits.

    Raises:
        RatchetError: learn.no_logits.
    """
    if not isinstance(policy, PrismaticPolicy):
        raise RatchetError("learn.no_logits", "this method needs a policy with action tokens", fix="use seq_ft")
    return policy
