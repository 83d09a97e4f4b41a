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
from ratchet_vla.episodes.exchange.lerobot_export import OWN_FILE
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
        episodes = (_hdf5_episode(data[name], data.attrs["rate"], robot, source) for name in names)
        return take_in(episodes, len(names), store, robot, frames, progress)


# -- HDF5 --------------------------------------------------------------------------------------------------------


def _hdf5_episode(demo: Any, rate: Rate, contract: RobotContract, source: Path) -> tuple[Episode, dict[str, Any]]:
    details = json.loads(demo.attrs["facts"])
    return episode_of(details, rate, _hdf5_rows(demo, contract), source.name), details


def _hdf5_rows(demo: Any, contract: RobotContract) -> Iterator[Row]:
    chunks = np.asarray(demo["action_chunks"], np.float32) if "action_chunks" in demo else None
    lengths = np.asarray(demo["chunk_lengths"]) if chunks is not None else None
    steps_run = lengths
    if "chunk_steps_run" in demo:  # not in the first exports
        steps_run = np.asarray(demo["chunk_steps_run"])
    for position in range(len(demo["actions"])):
        length = 0 if lengths is None else int(lengths[position])
        yield Row(
            stamp=float(demo["stamps"][position]),
            images={
                camera.name: np.asarray(demo[f"obs/{camera.name}_image"][position], np.uint8)
                for camera in contract.cameras
            },
            state={state.name: np.asarray(demo[f"obs/{state.name}"][position], np.float32) for state in contract.state},
            action=np.asarray(demo["actions"][position], np.float32),
            chunk=None if chunks is None else chunks[position, :length],
            executed=bool(demo["executed"][position]),
            human=bool(demo["is_intervention"][position]),
            reward=float(demo["rewards"][position]),
            done=bool(demo["dones"][position]),
            marks=int(demo["marks"][position]),
            flags=None if chunks is None else np.asarray(demo["chunk_executed"][position, :length], np.bool_),
            ran=1 if steps_run is None else int(steps_run[position]),
        )


# -- LeRobot -----------------------------------------------------------------------------------------------------


def _lerobot_facts(folder: Path) -> dict[str, Any] | None:
    try:
        own_data = json.loads((folder / OWN_FILE).read_text())
    except (OSError, ValueError):
        return None
    return own_data if isinstance(own_data, dict) and own_data.get("format") == FORMAT else None


def _import_lerobot(
    folder: Path, store: EpisodeStore, contract: RobotContract | None, frames: Codec, progress: Progress | None
) -> list[Card]:
    own_data = _lerobot_facts(folder)
    assert own_data is not None
    robot = contract_of(own_data["contract"], str(folder / OWN_FILE), contract)
    source = LeRobotSet(folder, robot, NameMapping(), rate=float(own_data["fps"]))
    if len(source.listing) != len(own_data["episodes"]):
        raise RatchetError(
            "import.changed_export",
            f"the set has {len(source.listing)} episodes, and {len(own_data['episodes'])} were exported",
            where=str(folder),
            fix=f"another tool has changed it: remove {OWN_FILE} to import it as a set of others, with --contract",
        )
    episodes = _lerobot_episodes(source, own_data, robot, folder.name)
    return take_in(episodes, len(source.listing), store, robot, frames, progress)


def _lerobot_episodes(
    source: LeRobotSet, own_data: dict[str, Any], contract: RobotContract, name: str
) -> Iterator[tuple[Episode, dict[str, Any]]]:
    for details, dataset_episode in zip(own_data["episodes"], source.read(), strict=True):
        table, states, actions, images = dataset_episode
        yield (
            episode_of(details, own_data["rate"], _lerobot_rows(table, states, actions, images, contract), name),
            details,
        )


def _lerobot_rows(
    table: Any,
    states: list[dict[str, Float32]],
    actions: Float32,
    images: list[dict[str, Any]],
    contract: RobotContract,
) -> Iterator[Row]:
    columns = {name: table[name].to_pylist() for name in ("stamp", "executed", "is_intervention", "marks")}
    columns |= {name: table[f"next.{name}"].to_pylist() for name in ("reward", "done")}
    chunks = flags = None
    if lerobot.CHUNK in table.column_names:
        flat = np.array(table[lerobot.CHUNK].to_pylist(), np.float32)
        chunks = flat.reshape(len(flat), -1, contract.action.size)
        flags = np.array(table[lerobot.CHUNK_EXECUTED].to_pylist(), np.bool_).reshape(len(flat), -1)
    steps_run = [1] * len(actions) if chunks is None else [chunks.shape[1]] * len(actions)
    if lerobot.CHUNK_RAN in table.column_names:  # not in the first exports
        steps_run = table[lerobot.CHUNK_RAN].to_pylist()
    starts = np.arange(len(actions))
    if lerobot.IS_DECISION in table.column_names:
        starts = np.flatnonzero(table[lerobot.IS_DECISION].to_pylist())
    for start, end in zip(starts, [*starts[1:], len(actions)], strict=True):
        yield Row(
            stamp=columns["stamp"][start],
            images=images[start],
            state=states[start],
            action=actions[start],
            chunk=None if chunks is None else chunks[start],
            executed=columns["executed"][start],
            human=columns["is_intervention"][start],
            reward=sum(columns["reward"][start:end]),
            done=any(columns["done"][start:end]),
            marks=columns["marks"][start],
            flags=None if flags is None else flags[start],
            ran=steps_run[start],
        )
