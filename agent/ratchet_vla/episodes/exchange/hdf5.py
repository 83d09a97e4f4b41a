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
    tell = progress or (lambda what, done, of: None)
    chosen = choose(annotations, references, unverified)
    if target.exists():
        raise RatchetError("export.exists", "there is something already", where=str(target), fix="name a new file")
    began = time.monotonic()
    readers = [annotations.store.open(card.id) for card, _ in chosen]
    contract = readers[0].info.robot()
    rate: Rate = "control" if all(best_rate(r) == "control" for r in readers) else "decisions"
    scratch = target.with_name(f".{target.name}.writing-{os.getpid()}")
    total = 0
    with disk_refusals(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with h5py.File(scratch, "w") as file:
                data = file.create_group("data")
                for i, ((card, status), reader) in enumerate(zip(chosen, readers, strict=True)):
                    success = status.success if status.state == "verified" else card.success
                    kept = list(rows(reader, rate, success))
                    if not kept:
                        raise empty_episode(card, rate)
                    demo = data.create_group(f"demo_{i}")
                    _write(demo, kept, contract, compress)
                    demo.attrs["num_samples"] = len(kept)
                    demo.attrs["episode_id"] = card.id
                    demo.attrs["adapter_id"] = card.adapter_id
                    demo.attrs["facts"] = json.dumps(facts_of(card, status, reader))
                    total += len(kept)
                    tell("written", i + 1, len(chosen))
                data.attrs["total"] = total
                data.attrs["env_args"] = json.dumps({"env_name": contract.name, "type": 1, "env_kwargs": {}})
                data.attrs["problem_info"] = json.dumps({"language_instruction": chosen[0][0].instruction})
                data.attrs["contract"] = json.dumps(contract.to_dict())
                data.attrs["rate"] = rate
                data.attrs["ratchet_format"] = FORMAT
                file.create_dataset("mask/train", data=np.array([f"demo_{i}" for i in range(len(chosen))], "S"))
            _compare(annotations, scratch, rate, contract, chosen, tell)
            with scratch.open("rb") as whole:
                os.fsync(whole.fileno())
            scratch.rename(target)
            sync_folder(target.parent)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    return Hdf5Report(str(target), len(chosen), total, rate, target.stat().st_size, time.monotonic() - began)


def _write(demo: Any, kept: list[Row], contract: RobotContract, compress: bool) -> None:
    demo.create_dataset("actions", data=np.stack([r.action for r in kept]))
    demo.create_dataset("rewards", data=np.array([r.reward for r in kept]))
    demo.create_dataset("dones", data=np.array([r.done for r in kept], np.int64))
    demo.create_dataset("is_intervention", data=np.array([r.human for r in kept], np.int64))
    demo.create_dataset("executed", data=np.array([r.executed for r in kept], np.int64))
    demo.create_dataset("marks", data=np.array([r.marks for r in kept], np.int64))
    demo.create_dataset("stamps", data=np.array([r.stamp for r in kept], np.float64))
    if kept[0].chunk is not None:
        _write_chunks(demo, kept, contract.action.size)
    obs = demo.create_group("obs")
    options: dict[str, Any] = {"compression": "gzip", "compression_opts": 1} if compress else {}
    for camera in contract.cameras:
        frames = np.stack([r.images[camera.name] for r in kept])
        obs.create_dataset(f"{camera.name}_image", data=frames, chunks=(1, *frames.shape[1:]), **options)
    for state in contract.state:
        obs.create_dataset(state.name, data=np.stack([r.state[state.name] for r in kept]))


def _write_chunks(demo: Any, kept: list[Row], size: int) -> None:
    """Chunks side by side, shorter ones padded with NaN behind their own length."""
    lengths = [0 if r.chunk is None else len(r.chunk) for r in kept]
    chunks = np.full((len(kept), max(lengths), size), np.nan, np.float32)
    executed = np.zeros((len(kept), max(lengths)), np.int64)
    for i, row in enumerate(kept):
        if row.chunk is not None and row.flags is not None:
            chunks[i, : lengths[i]] = row.chunk
            executed[i, : lengths[i]] = row.flags
    demo.create_dataset("action_chunks", data=chunks)
    demo.create_dataset("chunk_executed", data=executed)
    demo.create_dataset("chunk_lengths", data=np.array(lengths, np.int64))
    demo.create_dataset("chunk_steps_run", data=np.array([r.ran for r in kept], np.int64))


def _compare(
    annotations: Annotations, path: Path, rate: Rate, contract: RobotContract, chosen: Sequence[Any], tell: Progress
) -> None:
    with h5py.File(path, "r") as file:
        for i, (card, status) in enumerate(chosen):
            demo = file[f"data/demo_{i}"]
            success = status.success if status.state == "verified" else card.success
            count = 0
            for row in rows(annotations.store.open(card.id), rate, success):
                same = np.array_equal(demo["actions"][count], row.action) and demo["rewards"][count] == row.reward
                same &= all(np.array_equal(demo[f"obs/{n}_image"][count], im) for n, im in row.images.items())
                same &= all(np.array_equal(demo[f"obs/{s.name}"][count], row.state[s.name]) for s in contract.state)
                if not same:
                    raise RatchetError("export.differs", f"read back: row {count} is not equal", where=card.id[:12])
                count += 1
            if count != len(demo["actions"]):
                raise RatchetError("export.differs", f"{len(demo['actions'])} rows, not {count}", where=card.id[:12])
            tell("compared", i + 1, len(chosen))
