"""Supervised warm start: an adapter trained on demonstrations of a new task, with replay of the earlier ones.

Knows samples, their mixture and the adapter. Knows neither where demonstrations come from nor when the result is
promoted: it is a candidate like any other and passes the same gate. Supervised training forgets where on-policy
training does not (arXiv 2603.11653, section on supervised fine-tuning), so replay is on unless somebody turns it off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ratchet_vla.adapters.lora.layers import Lora
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.supervised.training import PretrainConfig, Pretrainer, Progress, Samples
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.records import Float32


@dataclass(frozen=True)
class WarmStartConfig:
    """How the adapter is trained."""

    train: PretrainConfig = field(
        default_factory=lambda: PretrainConfig(steps=300, learning_rate=1e-3, weight_decay=0.0, smoothing=4.0)
    )
    replay_share: float = 0.5
    """Share of every batch that comes from earlier tasks, in [0, 1); 0 turns replay off."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.replay_share < 1.0:
            raise RatchetError("learn.bad_replay", f"replay_share {self.replay_share} is not in [0, 1)")


def mixture(samples: Samples, new_task: str, earlier: Sequence[str], replay_share: float) -> Float32:
    """(M,) weights: `share` of the draws over earlier tasks, evenly by task, the rest on the new one.

    Raises:
        RatchetError: learn.no_samples_of_task, learn.no_replay where an earlier task has no samples.
    """
    index_of_task = {task_name: position for position, task_name in enumerate(samples.tasks)}
    counts = np.bincount(samples.task, minlength=len(samples.tasks))

    def count(task_name: str) -> int:
        return int(counts[index_of_task[task_name]]) if task_name in index_of_task else 0

    if not count(new_task):
        raise RatchetError(
            "learn.no_samples_of_task",
            f"no demonstrations of '{new_task}'",
            fix=f"there are some of: {', '.join(filter(count, samples.tasks)) or 'nothing'}",
        )
    replayed = [name for name in dict.fromkeys(earlier) if name != new_task] if replay_share else []
    missing_tasks = [name for name in replayed if not count(name)]
    if missing_tasks:
        raise RatchetError(
            "learn.no_replay",
            f"no demonstrations of the earlier tasks {', '.join(missing_tasks)}",
            fix="add them, or turn replay off with a replay share of 0 and expect forgetting",
        )
    # Evenly by task and not by sample: a task with many demonstrations must not crowd out the others.
    weights = np.zeros(len(samples.task), np.float32)
    new_share = 1.0 - replay_share if replayed else 1.0
    weights[samples.task == index_of_task[new_task]] = new_share / count(new_task)
    for task_name in replayed:
        weights[samples.task == index_of_task[task_name]] = replay_share / len(replayed) / count(task_name)
    return weights


def warm_start(
    policy: PrismaticPolicy | FlowPolicy,
    lora: Lora,
    samples: Samples,
    new_task: str,
    earlier: Sequence[str],
    config: WarmStartConfig,
    folder: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    every: int = 50,
) -> Pretrainer:
    """Train the adapter that `policy` carries; resumable where a folder is given. Returns the finished trainer.

    samples: demonstrations of the new task and, for replay, of the earlier ones; human or scripted, never mixed with
        sampled actions.
    """
    weights = mixture(samples, new_task, earlier, config.replay_share)
    trainer = Pretrainer(policy, lora.trainable(), samples, config.train, folder, weights)
    trainer.run(on_progress, every)
    return trainer
