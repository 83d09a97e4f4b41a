"""Which episodes are run: those of an update, those of an evaluation; functions of their arguments alone.

Knows tasks by their states and seeds by what they are for. Knows no environment and no policy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ratchet_vla.learner.measures.metrics import Cell
from ratchet_vla.policy.noise import derive_seed

__all__ = ["EpisodeSpec", "Task", "evaluation_specs", "training_specs"]


class Task(Protocol):
    """What the learner needs to know of a task; `ratchet_sim.base.TaskInfo` has it."""

    @property
    def name(self) -> str:
        """What it is called in its suite."""
        ...

    @property
    def instruction(self) -> str:
        """What the policy is told."""
        ...

    @property
    def train_states(self) -> Sequence[int]:
        """Initial states of training episodes."""
        ...

    @property
    def evaluation_states(self) -> Sequence[int]:
        """Initial states of evaluations; none of them is a training state."""
        ...

    @property
    def horizon(self) -> int:
        """Longest episode, control steps."""
        ...


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to run: a task from an initial state, with the seed of its action noise.

    group: episodes of one group share task and initial state (GRPO's comparison group).
    """

    task: str
    instruction: str
    initial_state: int
    horizon: int
    seed: int
    group: int = 0


def training_specs(
    task: Task, *, seed: int, stage: int, update: int, groups: int, group_size: int, horizon: int = 0, pool: int = 0
) -> list[EpisodeSpec]:
    """The episodes of one update: `groups` initial states, each `group_size` times.

    States are drawn without repetition as far as they reach. A function of its arguments alone, so that two machines
    agree on them.

    stage, update: counted from 0. horizon: control steps, 0 takes the task's. pool: the first so many training states,
    0 takes all.
    """
    initial_states = list(task.train_states[:pool] if pool else task.train_states)
    generator = torch.Generator().manual_seed(derive_seed(seed, "states", stage, update))
    drawn: list[int] = []  # positions in `initial_states`
    while len(drawn) < groups:
        drawn += torch.randperm(len(initial_states), generator=generator).tolist()
    specs = []
    for group, position in enumerate(drawn[:groups]):
        for member in range(group_size):
            noise_seed = derive_seed(seed, "train", stage, update, group, member)
            state = initial_states[position]
            steps = horizon or task.horizon
            specs.append(EpisodeSpec(task.name, task.instruction, state, steps, noise_seed, group=group))
    return specs


def evaluation_specs(
    task: Task, count: int, seed: int, horizon: int = 0, purpose: str = "evaluation", draws: int = 1
) -> list[EpisodeSpec]:
    """`draws` episodes from each of the first `count` evaluation states, none of which is ever trained on.

    seed: of the run; episodes of equal seed, task and state get equal noise, so that evaluations can be compared in
    pairs. horizon: control steps, 0 takes the task's own. purpose: other noise for other purposes.
    """
    horizon_steps = horizon or task.horizon
    specs = []
    for draw in range(draws):
        for state in task.evaluation_states[:count]:
            # The first draw is the one that evaluations with a single draw have.
            seed_path = (purpose, task.name, state, draw) if draw else (purpose, task.name, state)
            specs.append(EpisodeSpec(task.name, task.instruction, state, horizon_steps, derive_seed(seed, *seed_path)))
    return specs


def episode_keys(specs: Sequence[EpisodeSpec]) -> list[str]:
    """One key per episode of `evaluation_specs`: its initial state, and after the first its draw."""
    keys = []
    drawn: Counter[int] = Counter()
    for spec in specs:
        draw = drawn[spec.initial_state]
        drawn[spec.initial_state] += 1
        keys.append(f"state-{spec.initial_state}" + (f"/draw-{draw}" if draw else ""))
    return keys


def evaluated(specs: Sequence[EpisodeSpec], success: Iterable[bool]) -> Cell:
    """The outcomes of `evaluation_specs`, by `episode_keys`."""
    return Cell.of(dict(zip(episode_keys(specs), map(bool, success), strict=True)))
