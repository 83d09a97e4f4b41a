"""What persons did, as samples for supervised training: frames, state and the K actions that followed.

Knows verified episodes and human segments. Knows no model. A sample never spans the end of a segment or a hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ratchet_vla.episodes.exchange.rows import Row, best_rate, rows
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, Int64, UInt8


@dataclass
class HumanSamples:
    """M samples.

    images (M, V, H, W, 3) uint8; state (M, S) float32; actions (M, K, D) float32, physical units;
    task (M,) int64 index into `tasks` and `instructions`; start (M,) int64, which episode it is from.

    Has what `ratchet_vla.learner.supervised.training.Samples` asks for.
    """

    images: UInt8
    state: Float32
    actions: Float32
    task: Int64
    start: Int64
    tasks: list[str]
    instructions: list[str]

    def __len__(self) -> int:
        return len(self.task)


def human_samples(
    annotations: Annotations,
    cameras: Sequence[str],
    state: Sequence[str],
    chunk: int,
    references: Sequence[str] = (),
    *,
    stride: int = 1,
) -> HumanSamples:
    """Samples of every human segment in verified, successful episodes.

    cameras, state: contract names in the policy's order. chunk: K. references: these episodes only, all if empty.
    stride: control steps between two samples.

    Raises:
        RatchetError: warmstart.nothing where no segment is long enough; episode.not_verified for a named episode.
    """
    store = annotations.store
    episode_ids = [store.resolve(reference) for reference in references]
    for episode in episode_ids:
        if annotations.status(episode).state != "verified":
            raise RatchetError(
                "episode.not_verified", "nobody has verified it", where=episode[:12], fix="label it first"
            )
    images = []
    states = []
    actions = []
    task = []
    start = []
    tasks: dict[str, str] = {}
    for number, (card, status) in enumerate(annotations.verified()):
        if not status.success or (episode_ids and card.id not in episode_ids):
            continue
        reader = store.open(card.id)
        if not card.human_share or best_rate(reader) != "control":
            continue
        tasks.setdefault(card.task, card.instruction)
        for segment in _segments(list(rows(reader, "control")), 1.0 / reader.info.robot().control_hz):
            for start_index in range(0, len(segment) - chunk + 1, stride):
                row = segment[start_index]
                images.append(np.stack([row.images[camera] for camera in cameras]))
                states.append(
                    np.concatenate([row.state[field_name] for field_name in state] + [np.zeros(0, np.float32)])
                )
                actions.append(np.stack([step.action for step in segment[start_index : start_index + chunk]]))
                task.append(list(tasks).index(card.task))
                start.append(number)
    if not images:
        raise RatchetError(
            "warmstart.nothing",
            f"no verified, successful episode has {chunk} human steps in a row with frames",
            where=str(store.root),
            fix="record demonstrations with camera streams, or import some, and label them",
        )
    return HumanSamples(
        images=np.stack(images),
        state=np.stack(states),
        actions=np.stack(actions),
        task=np.array(task),
        start=np.array(start),
        tasks=list(tasks),
        instructions=list(tasks.values()),
    )


def _segments(rows: list[Row], period_s: float) -> list[list[Row]]:
    """Runs of human steps without a gap in time."""
    segments: list[list[Row]] = []
    previous: Row | None = None
    for row in rows:
        if row.human:
            begins = previous is None or not previous.human or row.stamp - previous.stamp > 1.5 * period_s
            if begins:
                segments.append([])
            segments[-1].append(row)
        previous = row
    return segments
