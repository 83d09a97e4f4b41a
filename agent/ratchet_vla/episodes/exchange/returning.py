"""Our own exports back into a store: LeRobotDataset v3 and HDF5, row by row what was recorded.

Knows the files that `lerobot_export` and `hdf5` write. Data sets of others are `imports`' business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.exchange import lerobot_layout as lerobot
from ratchet_vla.episodes.exchange.exported import FORMAT, contract_of, episode_of
from ratchet_vla.episodes.exchange.imports import LeRobotSet, NameMapping, take_in
from ratchet_vla.episodes.exchange.lerobot_check import Progress
from ratchet_vla.episodes.exchange.lerobot_export import OURS
from ratchet_vla.episodes.exchange.rows import Rate, Row
from ratchet_vla.episodes.file.format import Codec
from ratchet_vla.episodes.library.store import Card, EpisodeStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Episode, Float32


def is_own(source: Path) -> bool:
    """Whether a data set or file was exported here, by a version that left enough beside it to bring it back equal."""
    if source.is_dir():
        return _lerobot_facts(source) is not None
    if not h5py.is_hdf5(source):
        return False
    with h5py.File(source, "r") as file:
        return "data" in file and file["data"].attrs.get("ratchet_format") == FORMAT


def import_own(
    source: Path,
    store: EpisodeStore,
    contract: RobotContract | None = None,
    *,
    frames: Codec = "png",
    progress: Progress | None = None,
) -> list[Card]:
    """Every episode of an export for which `is_own` holds.

    contract: what the user takes it for; the export holds its own.

    Raises:
        RatchetError: import.other_contract, import.changed_export, import.damaged; nothing has been imported then.
    """
    if source.is_dir():
        return _import_lerobot(source, store, contract, frames, progress)
    with h5py.File(source, "r") as file:
        data = file["data"]
        robot = contract_of(data.attrs["contract"], str(source), contract)
        names = [f"demo_{i}" for i in range(len(data))]
        found = (_hdf5_episode(data[name], data.attrs["rate"], robot, source) for name in names)
        return take_in(found, len(names), store, robot, frames, progress)


# -- HDF5 --------------------------------------------------------------------------------------------------------


def _hdf5_episode(demo: Any, rate: Rate, contract: RobotContract, source: Path) -> tuple[Episode, dict[str, Any]]:
    facts = json.loads(demo.attrs["facts"])
    return episode_of(facts, rate, _hdf5_rows(demo, contract), source.name), facts


def _hdf5_rows(demo: Any, contract: RobotContract) -> Iterator[Row]:
    chunks = np.asarray(demo["action_chunks"], np.float32) if "action_chunks" in demo else None
    lengths = np.asarray(demo["chunk_lengths"]) if chunks is not None else None
    ran = np.asarray(demo["chunk_steps_run"]) if "chunk_steps_run" in demo else lengths  # not in the first exports
    for i in range(len(demo["actions"])):
        length = 0 if lengths is None else int(lengths[i])
        yield Row(
            stamp=float(demo["stamps"][i]),
            images={c.name: np.asarray(demo[f"obs/{c.name}_image"][i], np.uint8) for c in contract.cameras},
            state={s.name: np.asarray(demo[f"obs/{s.name}"][i], np.float32) for s in contract.state},
            action=np.asarray(demo["actions"][i], np.float32),
            chunk=None if chunks is None else chunks[i, :length],
            executed=bool(demo["executed"][i]),
            human=bool(demo["is_intervention"][i]),
            reward=float(demo["rewards"][i]),
            done=bool(demo["dones"][i]),
            marks=int(demo["marks"][i]),
            flags=None if chunks is None else np.asarray(demo["chunk_executed"][i, :length], np.bool_),
            ran=1 if ran is None else int(ran[i]),
        )


# -- LeRobot -----------------------------------------------------------------------------------------------------


def _lerobot_facts(folder: Path) -> dict[str, Any] | None:
    try:
        raw = json.loads((folder / OURS).read_text())
    except (OSError, ValueError):
        return None
    return raw if isinstance(raw, dict) and raw.get("format") == FORMAT else None


def _import_lerobot(
    folder: Path, store: EpisodeStore, contract: RobotContract | None, frames: Codec, progress: Progress | None
) -> list[Card]:
    ours = _lerobot_facts(folder)
    assert ours is not None
    robot = contract_of(ours["contract"], str(folder / OURS), contract)
    source = LeRobotSet(folder, robot, NameMapping(), rate=float(ours["fps"]))
    if len(source.listing) != len(ours["episodes"]):
        raise RatchetError(
            "import.changed_export",
            f"the set has {len(source.listing)} episodes, and {len(ours['episodes'])} were exported",
            where=str(folder),
            fix=f"another tool has changed it: remove {OURS} to import it as a set of others, with --contract",
        )
    found = _lerobot_episodes(source, ours, robot, folder.name)
    return take_in(found, len(source.listing), store, robot, frames, progress)


def _lerobot_episodes(
    source: LeRobotSet, ours: dict[str, Any], contract: RobotContract, name: str
) -> Iterator[tuple[Episode, dict[str, Any]]]:
    for facts, read in zip(ours["episodes"], source.read(), strict=True):
        table, states, actions, images = read
        yield episode_of(facts, ours["rate"], _lerobot_rows(table, states, actions, images, contract), name), facts


def _lerobot_rows(
    table: Any,
    states: list[dict[str, Float32]],
    actions: Float32,
    images: list[dict[str, Any]],
    contract: RobotContract,
) -> Iterator[Row]:
    columns = {n: table[n].to_pylist() for n in ("stamp", "executed", "is_intervention", "marks")}
    columns |= {n: table[f"next.{n}"].to_pylist() for n in ("reward", "done")}
    chunks = flags = None
    if lerobot.CHUNK in table.column_names:
        flat = np.array(table[lerobot.CHUNK].to_pylist(), np.float32)
        chunks = flat.reshape(len(flat), -1, contract.action.size)
        flags = np.array(table[lerobot.CHUNK_EXECUTED].to_pylist(), np.bool_).reshape(len(flat), -1)
    ran = [1] * len(actions) if chunks is None else [chunks.shape[1]] * len(actions)
    if lerobot.CHUNK_RAN in table.column_names:  # not in the first exports
        ran = table[lerobot.CHUNK_RAN].to_pylist()
    starts = np.arange(len(actions))
    if lerobot.FRESH in table.column_names:
        starts = np.flatnonzero(table[lerobot.FRESH].to_pylist())
    for i, end in zip(starts, [*starts[1:], len(actions)], strict=True):
        yield Row(
            stamp=columns["stamp"][i],
            images=images[i],
            state=states[i],
            action=actions[i],
            chunk=None if chunks is None else chunks[i],
            executed=columns["executed"][i],
            human=columns["is_intervention"][i],
            reward=sum(columns["reward"][i:end]),
            done=any(columns["done"][i:end]),
            marks=columns["marks"][i],
            flags=None if flags is None else flags[i],
            ran=ran[i],
        )
