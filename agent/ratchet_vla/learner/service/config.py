"""Settings of the learner service: what is learned in which order, from how much, and when the gate is asked.

Knows numbers and what they change against the published recipe. Knows no policy and no robot.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.defaults import PAPER
from ratchet_vla.learner.update.grpo import GrpoConfig
from ratchet_vla.learner.update.step import UpdateConfig


@dataclass(frozen=True)
class ServiceConfig:
    """One line of learning. The defaults are the published recipe's where it has one."""

    tasks: tuple[str, ...]
    """The queue: learned in this order."""
    held_out: tuple[str, ...] = ()
    """Never trained; compared by the gate."""
    mode: Literal["simulation", "robot"] = "simulation"
    """simulation: the learner requests exact episodes (initial state, seed) and waits for all of them. robot: it takes
    what the robot brings, grouped by task."""
    updates: int = PAPER.updates
    """Updates per task before the gate is asked (simulation), or at most (robot)."""
    groups: int = PAPER.groups
    """Initial states per update; simulation only."""
    group_size: int = PAPER.group_size
    """Episodes from each initial state; simulation only."""
    batch: int = 24
    """Least verified on-policy episodes of an update; robot only."""
    batch_when: Literal["full", "session"] = PAPER.batch_when
    """When a robot's batch is complete: as soon as `batch` episodes are here, or when a session has ended with at
    least so many (then all of them are used)."""
    temperature: float = PAPER.temperature
    """Sampling temperature of training episodes."""
    noise_correlation: float = PAPER.noise_correlation
    """Correlation of the sampling noise within a chunk, in [0, 1)."""
    horizon: int = 0
    """Longest training episode in control steps; 0 takes each task's own."""
    seed: int = 0
    """Root of every random number."""
    gate_each: Literal["task", "update"] = "task"
    """When a candidate goes before the gate. On a robot every update does: it never moves under an unmeasured one."""
    attempts: int = 2
    """How often a task is trained for `updates` and brought before the gate until the learner goes on without it."""
    on_hold: Literal["retry", "wait"] = "retry"
    """What a gate that neither promotes nor rejects means: another attempt, or waiting for a person's decision."""
    tolerance: float = 0.05
    """Largest mean difference, nats per token, between recorded log-probabilities and the learner's own under the same
    adapter; more means that robot and learner do not run the same policy, and the batch is refused."""
    keep_updates: int = 3
    """Intermediate adapters kept besides promoted ones and candidates."""
    keep_batches: int = 0
    """Batches whose episode files are kept after their update; 0 keeps all."""
    update: UpdateConfig = field(default_factory=UpdateConfig)

    def __post_init__(self) -> None:
        good = {
            "tasks": bool(self.tasks) and len(set(self.tasks)) == len(self.tasks),
            "updates": self.updates >= 1,
            "groups": self.groups >= 1,
            "group_size": self.group_size >= 1,
            "batch": self.batch >= 2,
            "temperature": self.temperature > 0,
            "noise_correlation": 0 <= self.noise_correlation < 1,
            "attempts": self.attempts >= 1,
            "tolerance": self.tolerance > 0,
            "keep_updates": self.keep_updates >= 1,
            "keep_batches": self.keep_batches >= 0,
        }
        for name, fine in good.items():
            if not fine:
                raise RatchetError("learner.bad_config", f"{name} = {getattr(self, name)!r} is out of range")
        if self.mode == "robot" and self.gate_each != "update":
            raise RatchetError(
                "learner.bad_config",
                "on a robot every update goes before the gate",
                where="gate_each",
                fix='use gate_each "update"',
            )

    @property
    def slots(self) -> int:
        """Episodes of one rollout request; 0 where the learner requests no exact episodes."""
        return self.groups * self.group_size if self.mode == "simulation" else 0


def real_robot(tasks: tuple[str, ...], **changes: object) -> ServiceConfig:
    """The small-budget settings for a real robot; `CHANGES` says what differs from the paper and why."""
    base = ServiceConfig(
        tasks=tasks,
        mode="robot",
        updates=8,
        batch=24,
        batch_when="full",
        temperature=1.0,
        gate_each="update",
        attempts=1,
        on_hold="wait",
        update=UpdateConfig(
            algorithm="grpo",
            minibatches=2,
            passes=2,
            target_kl=0.02,
            warmup_steps=2,
            success_reward=1.0,
            grpo=GrpoConfig(estimator="leave_one_out"),
        ),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


# What the real-robot settings change against the paper (arXiv 2603.11653), and why: told at the start and in the docs.
CHANGES: tuple[tuple[str, str, str, str], ...] = (
    ("episodes per update", "1,024", "24 or more", "24 episodes are about half an hour at a robot; 1,024 are days"),
    (
        "comparison group",
        "8 from one initial state",
        "all episodes of the task",
        "a person cannot repeat a scene exactly",
    ),
    ("baseline", "group mean / deviation", "leave-one-out mean", "unbiased in one group; few successes do not explode"),
    ("temperature", "1.6", "1.0", "wide sampling is hard on an arm; the start success has to carry exploration"),
    (
        "optimiser steps",
        "1 pass of 8",
        "at most 2 passes of 2, stopped at KL 0.02",
        "few samples must not be overfitted",
    ),
    ("reward", "5, simulator", "1, a person's label", "scale cancels only in normalised groups; labels are verified"),
    (
        "masking",
        "after first success",
        "also interventions, clipped, skipped, blended",
        "only what was sampled has a gradient",
    ),
    ("gate", "none", "before every adapter that moves the arm", "a bad update costs hardware, not a rollout"),
)
