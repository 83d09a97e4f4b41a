"""Whether an exported data set says what the recordings say: every number equal, every frame near.

Knows the files that `lerobot_export` writes, and recordings. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ratchet_vla.episodes.exchange import lerobot_layout as lerobot
from ratchet_vla.episodes.exchange.rows import Rate, rows, state_vector
from ratchet_vla.episodes.exchange.video import read_video
from ratchet_vla.episodes.library.annotations import Annotations, LabelStatus
from ratchet_vla.episodes.library.store import Card
from ratchet_vla.errors import RatchetError

Progress = Callable[[str, int, int], None]


def compare(
    annotations: Annotations,
    folder: Path,
    chosen: Sequence[tuple[Card, LabelStatus]],
    written: Sequence[dict[str, Any]],
    rate: Rate,
    tolerance: float,
    report_progress: Progress,
) -> dict[str, Any]:
    """Read everything back, against the recordings: numbers must be equal, frames near.

    written: the rows of the episodes' table. tolerance: mean absolute error of a frame, of 255.
    Returns `mean_error`, `worst_error` and `values_checked`.

    Raises:
        RatchetError: export.differs.
    """
    videos: dict[Path, Any] = {}
    errors: list[float] = []
    values_checked = 0
    for position, ((card, status), row) in enumerate(zip(chosen, written, strict=True)):
        path = folder / lerobot.DATA_PATH.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        table = pq.read_table(path, filters=[("episode_index", "=", position)])
        states = np.array(table[lerobot.STATE].to_pylist(), np.float32)
        actions = np.array(table[lerobot.ACTION].to_pylist(), np.float32).reshape(len(states), -1)
        count = 0
        success = status.success if status.state == "verified" else card.success
        reader = annotations.store.open(card.id)
        contract = reader.info.robot()
        for recorded in rows(reader, rate, success):
            state_equal = np.array_equal(states[count].ravel(), state_vector(recorded.state, contract))
            if not state_equal or not np.array_equal(actions[count], recorded.action):
                raise _differs(card, f"state or action of row {count}")
            values_checked += states[count].size + actions[count].size
            for name, image in recorded.images.items():
                key = f"videos/{lerobot.IMAGES}{name}"
                file = folder / lerobot.VIDEO_PATH.format(
                    video_key=lerobot.IMAGES + name,
                    chunk_index=row[f"{key}/chunk_index"],
                    file_index=row[f"{key}/file_index"],
                )
                if file not in videos:
                    videos[file] = read_video(file)
                decoded = next(videos[file], None)
                if decoded is None or decoded.shape != image.shape:
                    raise _differs(card, f"frame {count} of {name} is missing")
                error = float(np.abs(decoded.astype(np.int16) - image).mean())
                errors.append(error)
                if error > tolerance:
                    raise _differs(card, f"frame {count} of {name} is {error:.1f} of 255 off, {tolerance} allowed")
            count += 1
        if count != len(states):
            raise _differs(card, f"{len(states)} rows instead of {count}")
        report_progress("compared", position + 1, len(chosen))
    if any(next(video, None) is not None for video in videos.values()):
        raise _differs(chosen[-1][0], "the videos hold more frames than were recorded")
    return {
        "mean_error": float(np.mean(errors)) if errors else 0.0,
        "worst_error": max(errors, default=0.0),
        "values_checked": values_checked,
    }


def _differs(card: Card, problem: str) -> RatchetError:
    return RatchetError(
        "export.differs", f"read back: {problem}", where=card.id[:12], fix="lower crf, or choose another codec"
    )
