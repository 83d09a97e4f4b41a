"""Reference sets recorded: the base's own decisions on tasks of a suite, or those of stored episodes, without experts.

Knows episodes, policies and how many decisions of each are kept. Knows no file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.retention.decisions import Decisions, decisions_of, joined
from ratchet_vla.learner.retention.reference_set import Origin
from ratchet_vla.learner.rollouts.collection import ChunkEnv, run_episodes
from ratchet_vla.learner.rollouts.samples import to_batch
from ratchet_vla.learner.rollouts.specs import Task, training_specs
from ratchet_vla.policy.noise import derive_seed
from ratchet_vla.policy.protocol import Policy
from ratchet_vla.records import Episode


@dataclass(frozen=True)
class RecordingConfig:
    """How the base's own rollouts become a reference set."""

    episodes: int = 6
    """Episodes per task, from its training states."""
    decisions_per_task: int = 40
    """Decisions kept per task, drawn at random."""
    horizon: int = 160
    """Longest episode in control steps; 0 takes each task's own."""
    temperature: float = 1.0
    """Sampling temperature, as in training; above 0."""
    noise_correlation: float = 0.9
    """Correlation of the sampling noise within a chunk, in [0, 1)."""
    seed: int = 77
    """Root of states and noise."""

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.decisions_per_task < 1 or not self.temperature > 0:
            raise RatchetError(
                "learn.bad_setting", "episodes, decisions per task and temperature must be above 0", fix="see --help"
            )


def record(
    policy: Policy,
    env: ChunkEnv,
    tasks: Sequence[Task],
    config: RecordingConfig,
    source: str,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> tuple[Decisions, Origin]:
    """Roll the base out on each task.

    policy: without an adapter in force. progress: called with (task, episodes finished, of how many).

    Raises:
        RatchetError: what `run_episodes` raises.
    """
    parts = []
    successes = 0
    for task in tasks:
        specs = training_specs(
            task,
            seed=config.seed,
            stage=0,
            update=0,
            groups=config.episodes,
            group_size=1,
            horizon=min(task.horizon, config.horizon or task.horizon),
        )

        def report(done: int, success: bool, name: str = task.name, total: int = len(specs)) -> None:
            progress(name, done, total)

        outcomes, batch = run_episodes(
            policy,
            env,
            specs,
            temperature=config.temperature,
            noise_correlation=config.noise_correlation,
            progress=report,
        )
        assert batch is not None
        successes += int(outcomes.success.sum())
        names = dict.fromkeys(batch.instructions, task.name)
        every = decisions_of(batch, np.arange(len(batch.tokens)), names)
        parts.append(thinned(every, config.decisions_per_task, derive_seed(config.seed, "reference", task.name)))
    episodes = config.episodes * len(tasks)
    origin = Origin(
        base_hash=policy.base_hash,
        source=source,
        episodes=episodes,
        success=successes / max(episodes, 1),
        temperature=config.temperature,
        noise_correlation=config.noise_correlation,
        seed=config.seed,
    )
    return joined(parts), origin


def from_episodes(
    policy: Policy, episodes: Iterable[Episode], decisions_per_task: int, seed: int, source: str
) -> tuple[Decisions, Origin]:
    """Decisions of stored episodes, whoever decided them: only what was seen and asked matters.

    Raises:
        RatchetError: reference.empty without an episode; learner.bad_episode for one that the policy does not take.
    """
    alike: dict[tuple[str, float, str], list[Episode]] = defaultdict(list)
    names: dict[str, str] = {}
    count = 0
    successes = 0
    for episode in episodes:
        if not episode.steps:
            continue
        chunk = episode.steps[0].chunk
        alike[chunk.adapter_id, chunk.temperature, chunk.compute_dtype].append(episode)
        names[episode.instruction] = episode.task or episode.instruction
        count += 1
        successes += bool(episode.success)
    if not alike:
        raise RatchetError(
            "reference.empty", "no episode with a decision of a policy", where=source, fix="record some first"
        )
    temperature = next(iter(alike))[1]
    batches = [to_batch(group, range(len(group)), policy) for group in alike.values()]
    every = joined([decisions_of(batch, np.arange(len(batch.tokens)), names) for batch in batches])
    parts = [
        thinned(_of_task(every, task), decisions_per_task, derive_seed(seed, "reference", task))
        for task in every.present_tasks
    ]
    origin = Origin(
        base_hash=policy.base_hash,
        source=source,
        episodes=count,
        success=successes / count,
        temperature=temperature,
        noise_correlation=0.0,
        seed=seed,
    )
    return joined(parts), origin


def thinned(decisions: Decisions, count: int, seed: int) -> Decisions:
    """At most `count` of the decisions, drawn at random, in their order."""
    rows = np.random.default_rng(seed).permutation(len(decisions))[:count]
    return decisions.at(np.sort(rows))


def decisions_by_task(decisions: Decisions) -> Mapping[str, int]:
    """How many decisions each task has."""
    return {task: len(_of_task(decisions, task)) for task in decisions.present_tasks}


def _of_task(decisions: Decisions, task: str) -> Decisions:
    numbers = [index for index, name in enumerate(decisions.tasks) if name == task]
    return decisions.at(np.flatnonzero(np.isin(decisions.instruction, numbers)))
