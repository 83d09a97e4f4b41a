"""Writing a whole episode in one call: checked first, then written, whole under its name or not there at all.

Knows the order of an episode's records. Knows no live recording.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.file.checking import check_step, check_tick
from ratchet_vla.episodes.file.format import Codec
from ratchet_vla.episodes.file.recording import EpisodeWriter, make_info
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Episode, Step

__all__ = ["write_episode"]


def write_episode(
    path: Path | str,
    episode: Episode,
    contract: RobotContract,
    *,
    frames: Codec = "raw",
    quality: int = 90,
    mode: str = "rollout",
    session: str = "",
    name: str = "",
    calibrations: dict[str, str] | None = None,
    created: str | None = None,
    clock_offset: float | None = None,
) -> str:
    """Write a whole episode to `path` (new, ends in .mcap) and return its id, the SHA-256 of the file.

    frames: "raw" and "png" keep every pixel; "jpeg" and "h264" do not, and learning on-policy from them is not exact.
    created, clock_offset: UTC of the episode and what turns its stamps into UTC; now, if absent. With both given, the
        same episode gives the same id. calibrations: camera -> id, beside those that the contract names. name: unique,
        what a store may be asked for it by.

    Raises:
        RatchetError: episode.bad_record, episode.bad_meta, contract.unknown_camera before anything is written;
            episode.exists, episode.disk_full, episode.io.
    """
    path = Path(path)
    for step in episode.steps:
        check_step(step, contract)
    for tick in episode.ticks:
        check_tick(tick, contract)
    stamps = [step.observation.stamp for step in episode.steps] + [tick.stamp for tick in episode.ticks]
    if clock_offset is None:
        clock_offset = time.time() - max(stamps, default=0.0)
    info = make_info(
        contract,
        episode.task,
        episode.instruction,
        adapter_id=episode.adapter_id,
        session=session,
        name=name,
        mode=mode,
        seed=episode.seed,
        initial_state=episode.initial_state,
        calibrations=calibrations or {},
        clock_offset=clock_offset,
        stream=frames,
        decisions="",
        meta=episode.meta,
        **({"created": created} if created else {}),
    )
    scratch = path.with_name(path.name + ".open")
    if path.exists():
        raise RatchetError(
            "episode.exists", "there is a file already", where=str(path), fix="episodes are never overwritten"
        )
    writer = EpisodeWriter(scratch, path, info, quality=quality)
    try:
        _write_records(writer, episode)
        digest, _ = writer.finish(episode.success, episode.success_source, episode.termination, ended=info.created)
    except BaseException:
        writer.discard()
        raise
    return digest


def _write_records(writer: EpisodeWriter, episode: Episode) -> None:
    """Steps, ticks and events, merged by time; of equal stamps, steps first."""
    records: list[tuple[float, int, int, Any]] = []
    records += [(step.observation.stamp, 0, position, step) for position, step in enumerate(episode.steps)]
    records += [(tick.stamp, 1, position, tick) for position, tick in enumerate(episode.ticks)]
    records += [(event.stamp, 2, position, event) for position, event in enumerate(episode.events)]
    # Each kind keeps its own order even where stamps do not rise: the reader gives records back in the file's order.
    latest_stamps: dict[int, float] = {}
    sortable = []
    for stamp, kind, index, record in records:
        latest_stamps[kind] = max(latest_stamps.get(kind, -math.inf), stamp)
        sortable.append((latest_stamps[kind], kind, index, record))
    for _, kind, _, record in sorted(sortable, key=lambda entry: entry[:3]):
        if kind == 0:
            _write_step(writer, record)
            if not episode.ticks:
                writer.plots(record.observation.state, None, record.observation.stamp)
        elif kind == 1:
            writer.tick(record)
        else:
            writer.event(record)


def _write_step(writer: EpisodeWriter, step: Step) -> None:
    observation_index = writer.observation(step.observation)
    chunk_index = writer.chunk(step.chunk)
    writer.step(
        observation_index,
        chunk_index,
        step.executed.tolist(),
        [],
        float(step.reward),
        step.done,
        step.steps_run,
        step.observation.stamp,
    )
