"""Export to robomimic's HDF5 layout, which LIBERO's tools read too: one file, atomic, compared with the recordings.

Knows the layout. Frames are stored as they are, without loss.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.exchange.exported import FORMAT, facts_of
from ratchet_vla.episodes.exchange.lerobot_check import Progress
from ratchet_vla.episodes.exchange.lerobot_export import choose, empty_episode
from ratchet_vla.episodes.exchange.rows import Rate, Row, best_rate, rows
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.documents import sync_folder
from ratchet_vla.storage.growing import disk_refusals

__all__ = ["Hdf5Report", "export_hdf5"]


@dataclass(frozen=True)
class Hdf5Report:
    """What was written. Every value and pixel was compared with the recordings."""

    target: str
    episodes: int
    frames: int
    rate: Rate
    bytes: int
    seconds: float


def export_hdf5(
    annotations: Annotations,
    target: Path,
    references: Sequence[str] = (),
    *,
    unverified: bool = False,
    compress: bool = True,
    progress: Progress | None = None,
) -> Hdf5Report:
    """Write one robomimic HDF5 file: data/demo_N with actions, rewards, dones and obs/<camera>_image, obs/<state>.

    Raises:
        RatchetError: export.exists, export.differs, and what `lerobot_export.choose` raises; nothing is left behind
        then.
    """
    report_progress = progress or (lambda stage, count, total_count: None)
    chosen = choose(annotations, references, unverified)
    if target.exists():
        raise RatchetError("export.exists", "there is something already", where=str(target), fix="name a new file")
    began_s = time.monotonic()
    readers = [annotations.store.open(card.id) for card, _ in chosen]
    contract = readers[0].info.robot()
    rate: Rate = "control" if all(best_rate(reader) == "control" for reader in readers) else "decisions"
    scratch = target.with_name(f".{target.name}.writing-{os.getpid()}")
    row_count = 0
    with disk_refusals(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with h5py.File(scratch, "w") as file:
                data = file.create_group("data")
                for position, ((card, status), reader) in enumerate(zip(chosen, readers, strict=True)):
                    success = status.success if status.state == "verified" else card.success
                    episode_rows = list(rows(reader, rate, success))
                    if not episode_rows:
                        raise empty_episode(card, rate)
                    demo = data.create_group(f"demo_{position}")
                    _write(demo, episode_rows, contract, compress)
                    demo.attrs["num_samples"] = len(episode_rows)
                    demo.attrs["episode_id"] = card.id
                    demo.attrs["adapter_id"] = card.adapter_id
                    demo.attrs["facts"] = json.dumps(facts_of(card, status, reader))
                    row_count += len(episode_rows)
                    report_progress("written", position + 1, len(chosen))
                data.attrs["total"] = row_count
                data.attrs["env_args"] = json.dumps({"env_name": contract.name, "type": 1, "env_kwargs": {}})
                data.attrs["problem_info"] = json.dumps({"language_instruction": chosen[0][0].instruction})
                data.attrs["contract"] = json.dumps(contract.to_dict())
                data.attrs["rate"] = rate
                data.attrs["ratchet_format"] = FORMAT
                file.create_dataset(
                    "mask/train", data=np.array([f"demo_{position}" for position in range(len(chosen))], "S")
                )
            _compare(annotations, scratch, rate, contract, chosen, report_progress)
            with scratch.open("rb") as written_file:
                os.fsync(written_file.fileno())
            scratch.rename(target)
            sync_folder(target.parent)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    return Hdf5Report(str(target), len(chosen), row_count, rate, target.stat().st_size, time.monotonic() - began_s)


def _write(demo: Any, episode_rows: list[Row], contract: RobotContract, compress: bool) -> None:
    demo.create_dataset("actions", data=np.stack([row.action for row in episode_rows]))
    demo.create_dataset("rewards", data=np.array([row.reward for row in episode_rows]))
    demo.create_dataset("dones", data=np.array([row.done for row in episode_rows], np.int64))
    demo.create_dataset("is_intervention", data=np.array([row.human for row in episode_rows], np.int64))
    demo.create_dataset("executed", data=np.array([row.executed for row in episode_rows], np.int64))
    demo.create_dataset("marks", data=np.array([row.marks for row in episode_rows], np.int64))
    demo.create_dataset("stamps", data=np.array([row.stamp for row in episode_rows], np.float64))
    if episode_rows[0].chunk is not None:
        _write_chunks(demo, episode_rows, contract.action.size)
    observations = demo.create_group("obs")
    options: dict[str, Any] = {"compression": "gzip", "compression_opts": 1} if compress else {}
    for camera in contract.cameras:
        frames = np.stack([row.images[camera.name] for row in episode_rows])
        observations.create_dataset(f"{camera.name}_image", data=frames, chunks=(1, *frames.shape[1:]), **options)
    for state in contract.state:
        observations.create_dataset(state.name, data=np.stack([row.state[state.name] for row in episode_rows]))


def _write_chunks(demo: Any, episode_rows: list[Row], size: int) -> None:
    """Chunks side by side, shorter ones padded with NaN behind their own length."""
    lengths = [0 if row.chunk is None else len(row.chunk) for row in episode_rows]
    chunks = np.full((len(episode_rows), max(lengths), size), np.nan, np.float32)
    executed = np.zeros((len(episode_rows), max(lengths)), np.int64)
    for position, row in enumerate(episode_rows):
        if row.chunk is not None and row.flags is not None:
            chunks[position, : lengths[position]] = row.chunk
            executed[position, : lengths[position]] = row.flags
    demo.create_dataset("action_chunks", data=chunks)
    demo.create_dataset("chunk_executed", data=executed)
    demo.create_dataset("chunk_lengths", data=np.array(lengths, np.int64))
    demo.create_dataset("chunk_steps_run", data=np.array([row.ran for row in episode_rows], np.int64))


def _compare(
    annotations: Annotations,
    path: Path,
    rate: Rate,
    contract: RobotContract,
    chosen: Sequence[Any],
    report_progress: Progress,
) -> None:
    with h5py.File(path, "r") as file:
        for position, (card, status) in enumerate(chosen):
            demo = file[f"data/demo_{position}"]
            success = status.success if status.state == "verified" else card.success
            count = 0
            for row in rows(annotations.store.open(card.id), rate, success):
                is_equal = np.array_equal(demo["actions"][count], row.action) and demo["rewards"][count] == row.reward
                is_equal &= all(
                    np.array_equal(demo[f"obs/{name}_image"][count], image) for name, image in row.images.items()
                )
                is_equal &= all(
                    np.array_equal(demo[f"obs/{state.name}"][count], row.state[state.name]) for state in contract.state
                )
                if not is_equal:
                    raise RatchetError("export.differs", f"read back: row {count} is not equal", where=card.id[:12])
                count += 1
            if count != len(demo["actions"]):
                raise RatchetError("export.differs", f"{len(demo['actions'])} rows, not {count}", where=card.id[:12])
            report_progress("compared", position + 1, len(chosen))
