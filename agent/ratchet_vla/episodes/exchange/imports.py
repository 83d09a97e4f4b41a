"""Demonstrations of others into the store: LeRobot data sets (v3.0 and v2.1) and LIBERO's HDF5 files, for warm starts.

Knows their layouts and how their numbers become the contract's. Every imported action counts as a person's: it enters
supervised training, never the policy gradient. Nothing is guessed: what does not fit the contract by name is refused.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import cv2
import h5py
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.episodes.exchange import lerobot_layout as lerobot
from ratchet_vla.episodes.exchange.lerobot_check import Progress
from ratchet_vla.episodes.exchange.rows import state_names
from ratchet_vla.episodes.exchange.video import read_video
from ratchet_vla.episodes.file.format import Codec
from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.store import Card, EpisodeStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, ControlTick, Episode, Float32, Mark, Observation, Step, UInt8

__all__ = ["NameMapping", "import_lerobot", "import_libero"]

LIBERO_STATE = {"eef_position": "ee_pos", "eef_rotation": "ee_ori", "gripper": "gripper_states"}
LIBERO_CAMERAS = {"agentview": "agentview_rgb", "wrist": "eye_in_hand_rgb"}


@dataclass(frozen=True)
class NameMapping:
    """How a foreign data set's names map to the contract's.

    cameras: contract camera -> their name; the same names where absent. actions: whether theirs are in the contract's
    physical units, or commands to the driver, to be multiplied by `command_scale`. same_order: take action and state
    values by position although their names differ or are missing.
    """

    cameras: Mapping[str, str] = field(default_factory=dict)
    actions: Literal["physical", "command"] = "physical"
    same_order: bool = False


def import_lerobot(
    folder: Path,
    store: EpisodeStore,
    contract: RobotContract,
    mapping: NameMapping | None = None,
    *,
    frames: Codec = "png",
    progress: Progress | None = None,
) -> list[Card]:
    """Every episode of a LeRobot data set as an episode of the store.

    Raises:
        RatchetError: import.not_lerobot, import.other_actions, import.other_state, import.other_camera,
            import.other_rate, import.other_size; nothing has been imported then.
    """
    mapping = mapping or NameMapping()
    source = LeRobotSet(folder, contract, mapping)
    written = (folder / "meta/info.json").stat().st_mtime
    return take_in(source.episodes(), len(source.listing), store, contract, frames, progress, written)


def import_libero(
    file: Path,
    store: EpisodeStore,
    contract: RobotContract,
    *,
    frames: Codec = "png",
    progress: Progress | None = None,
) -> list[Card]:
    """Every demonstration of one LIBERO (or robomimic) HDF5 file. Frames are turned upright as the contract says.

    Raises:
        RatchetError: import.not_hdf5, import.other_state, import.other_camera, import.other_actions,
            import.other_size; nothing has been imported then.
    """
    if not h5py.is_hdf5(file):
        raise RatchetError("import.not_hdf5", "no HDF5 file", where=str(file), fix="name a LIBERO demonstration file")
    with h5py.File(file, "r") as data:
        names = sorted(data.get("data", {}), key=lambda n: int(n.removeprefix("demo_") or 0))
        if not names:
            raise RatchetError(
                "import.not_hdf5", "it holds no demonstrations", where=str(file), fix="expected data/demo_N"
            )
        _check_libero(data["data"][names[0]], contract, str(file))
        found = _libero(data, names, file, contract)
        return take_in(found, len(names), store, contract, frames, progress, file.stat().st_mtime)


def demonstration(
    contract: RobotContract,
    instruction: str,
    task: str,
    images: Sequence[Mapping[str, UInt8]],
    states: Sequence[Mapping[str, Float32]],
    actions: Float32,
    meta: dict[str, Any],
    *,
    human: Sequence[bool] | None = None,
) -> Episode:
    """An episode of N control steps, each a decision of one action that a person made.

    images, states: N of each. actions: (N, D) float32, physical units. human: which of them were; all if absent.
    """
    steps = []
    ticks = []
    for i, action in enumerate(np.asarray(actions, np.float32)):
        stamp = i / contract.control_hz
        state = {name: np.asarray(values, np.float32) for name, values in states[i].items()}
        seen = Observation(dict(images[i]), state, instruction, stamp, i)
        chunk = ActionChunk(action[None].copy(), None, None, "", 0.0, stamp, i)
        mark = Mark.HUMAN if human is None or human[i] else Mark.NONE
        steps.append(Step(seen, chunk, np.zeros(1, np.bool_), 0.0, i == len(actions) - 1, 1))
        ticks.append(ControlTick(stamp, stamp, i, None, action.copy(), mark, i, 0, "", state))
    return Episode(task=task, instruction=instruction, steps=steps, ticks=ticks, meta=meta)


def take_in(
    found: Iterator[tuple[Episode, dict[str, Any]]],
    count: int,
    store: EpisodeStore,
    contract: RobotContract,
    frames: Codec,
    progress: Progress | None,
    written: float = 0.0,
) -> list[Card]:
    """Write all beside the store first, so that a refusal in the middle leaves nothing behind.

    found: episodes, each with what is known of it (session, created, clock_offset, calibrations) or nothing. written:
        when the source was, in seconds UTC; it dates episodes of which nothing is known, so that importing again gives
        the same ids.
    """
    created = datetime.fromtimestamp(written, UTC).isoformat(timespec="milliseconds")
    unknown = {"session": "imported", "created": created, "clock_offset": written, "calibrations": {}}
    tell = progress or (lambda what, done, of: None)
    waiting = Path(tempfile.mkdtemp(prefix=".importing-", dir=store.root))
    try:
        for i, (episode, known) in enumerate(found):
            path = waiting / f"{i:06d}.mcap"
            facts = {name: known.get(name, value) for name, value in unknown.items()}
            write_episode(path, episode, contract, frames=frames, mode="import", **facts)
            tell("read", i + 1, count)
        return [store.copy_in(path) for path in sorted(waiting.iterdir())]
    finally:
        shutil.rmtree(waiting)


# -- LIBERO ------------------------------------------------------------------------------------------------------


def _check_libero(demo: Any, contract: RobotContract, where: str) -> None:
    obs = demo["obs"]
    for state in contract.state:
        theirs = LIBERO_STATE.get(state.name, state.name)
        if theirs not in obs or obs[theirs].shape[1:] != (state.size,):
            raise _other("state", f"no {theirs!r} of {state.size} values for state {state.name!r}", where, sorted(obs))
    for camera in contract.cameras:
        theirs = LIBERO_CAMERAS.get(camera.name, camera.name)
        if theirs not in obs:
            raise _other("camera", f"no {theirs!r} for camera {camera.name!r}", where, sorted(obs))
        _check_size(upright(np.asarray(obs[theirs][0]), camera), camera, where)
    if demo["actions"].shape[1] != contract.action.size:
        text = f"{demo['actions'].shape[1]} action values, the contract has {contract.action.size}"
        raise _other("actions", text, where, [d.name for d in contract.action.dims])


def _libero(
    data: Any, names: list[str], file: Path, contract: RobotContract
) -> Iterator[tuple[Episode, dict[str, Any]]]:
    attributes = data["data"].attrs
    problem = json.loads(attributes.get("problem_info", "{}"))
    instruction = " ".join(str(problem.get("language_instruction", file.stem.replace("_", " "))).split())
    scale = np.array([d.command_scale for d in contract.action.dims], np.float32)
    for name in names:
        demo = data["data"][name]
        obs = demo["obs"]
        count = len(demo["actions"])
        images: list[dict[str, UInt8]] = [{} for _ in range(count)]
        states: list[dict[str, Float32]] = [{} for _ in range(count)]
        for camera in contract.cameras:
            taken = np.asarray(obs[LIBERO_CAMERAS.get(camera.name, camera.name)])
            for i in range(count):
                images[i][camera.name] = upright(taken[i], camera)
        for state in contract.state:
            values = np.asarray(obs[LIBERO_STATE.get(state.name, state.name)], np.float32)
            for i in range(count):
                states[i][state.name] = values[i]
        actions = np.asarray(demo["actions"], np.float32) * scale
        meta = {"imported_from": file.name, "demonstration": name, "claims_success": bool(np.any(demo["dones"]))}
        yield demonstration(contract, instruction, file.stem.removesuffix("_demo"), images, states, actions, meta), {}


def upright(image: npt.NDArray[Any], camera: CameraSpec) -> UInt8:
    """A raw image turned and mirrored as the contract says."""
    out = np.rot90(image, camera.rotate // 90)
    out = out[:, ::-1] if camera.mirror else out
    return np.ascontiguousarray(out, np.uint8)


# -- LeRobot -----------------------------------------------------------------------------------------------------


class LeRobotSet:
    """One data set of version 3.0 or 2.1, held against the contract. rate: frames per second, or the contract's."""

    def __init__(self, folder: Path, contract: RobotContract, mapping: NameMapping, rate: float | None = None) -> None:
        self._folder = folder
        self._contract = contract
        self._mapping = mapping
        self._rate = contract.control_hz if rate is None else rate
        try:
            self._info = json.loads((folder / "meta/info.json").read_text())
            self._version = str(self._info["codebase_version"])
            self._features: dict[str, Any] = self._info["features"]
        except (OSError, ValueError, KeyError) as error:
            raise RatchetError(
                "import.not_lerobot", str(error), where=str(folder), fix="name the folder that holds meta/info.json"
            ) from None
        if self._version not in ("v3.0", "v2.1"):
            raise RatchetError(
                "import.not_lerobot",
                f"version {self._version}",
                where=str(folder),
                fix="convert it with LeRobot's own script",
            )
        self._check()
        self.listing = self._list()

    def episodes(self) -> Iterator[tuple[Episode, dict[str, Any]]]:
        scale = np.array([d.command_scale for d in self._contract.action.dims], np.float32)
        for row, (table, states, actions, images) in zip(self.listing, self.read(), strict=True):
            if self._mapping.actions == "command":
                actions = actions * scale
            human = table["is_intervention"].to_pylist() if "is_intervention" in table.column_names else None
            text = row["tasks"][0]
            meta = {"imported_from": self._folder.name, "episode": row["episode_index"]}
            yield demonstration(self._contract, text, text, images, states, actions, meta, human=human), {}

    def read(self) -> Iterator[tuple[Any, list[dict[str, Float32]], Float32, list[dict[str, UInt8]]]]:
        """Table, N states, actions (N, D) float32 as they are written, and N times the frames of each episode."""
        videos: dict[Path, Iterator[UInt8]] = {}
        names = [s.name for s in self._contract.state]
        ends = np.cumsum([s.size for s in self._contract.state])[:-1]
        for row in self.listing:
            table = self._table(row)
            count = len(table["index"])
            state = np.array(table["observation.state"].to_pylist(), np.float32).reshape(count, -1)
            actions = np.array(table["action"].to_pylist(), np.float32).reshape(count, -1)
            states = [dict(zip(names, np.split(values, ends), strict=True)) for values in state]
            yield table, states, actions, self._images(row, table, count, videos)

    # -- inside -------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        contract = self._contract
        where = str(self._folder)
        for key, names, code in (
            ("action", [d.name for d in contract.action.dims], "actions"),
            ("observation.state", state_names(contract), "state"),
        ):
            theirs = self._features.get(key)
            if theirs is None:
                raise _other(code, f"no {key!r}", where, list(self._features))
            given = theirs.get("names")
            given = next(iter(given.values())) if isinstance(given, dict) else given
            fits = theirs["shape"] == [len(names)] and (given == names or self._mapping.same_order)
            if not fits:
                raise _other(code, f"{key} is {given} of shape {theirs['shape']}, the contract has {names}", where, [])
        if abs(self._info["fps"] - self._rate) > 1e-6:
            raise _other("rate", f"{self._info['fps']} fps, the contract runs at {self._rate:g} Hz", where, [])
        for camera in contract.cameras:
            key = self._key(camera)
            if self._features.get(key, {}).get("dtype") not in ("video", "image"):
                have = [k for k, f in self._features.items() if f["dtype"] in ("video", "image")]
                raise _other("camera", f"no frames {key!r}", where, have)

    def _key(self, camera: CameraSpec) -> str:
        name = self._mapping.cameras.get(camera.name, camera.name)
        return name if name.startswith("observation.") else lerobot.IMAGES + name

    def _list(self) -> list[dict[str, Any]]:
        meta = self._folder / "meta"
        if self._version == "v3.0":
            found: list[dict[str, Any]] = []
            for path in sorted((meta / "episodes").glob("*/*.parquet")):
                wanted = [c for c in pq.read_schema(path).names if not c.startswith("stats/")]
                found += pq.read_table(path, columns=wanted).to_pylist()
        else:
            found = [json.loads(line) for line in (meta / "episodes.jsonl").read_text().splitlines() if line.strip()]
        return sorted(found, key=lambda row: int(row["episode_index"]))

    def _path(self, template: str, row: dict[str, Any], prefix: str, key: str = "") -> Path:
        number = row["episode_index"]
        if self._version == "v3.0":
            chunk = row[f"{prefix}/chunk_index"]
            file = row[f"{prefix}/file_index"]
            return self._folder / template.format(chunk_index=chunk, file_index=file, video_key=key)
        chunk = number // self._info["chunks_size"]
        return self._folder / template.format(episode_chunk=chunk, episode_index=number, video_key=key)

    def _table(self, row: dict[str, Any]) -> Any:
        path = self._path(self._info["data_path"], row, "data")
        return pq.read_table(path, filters=[("episode_index", "=", row["episode_index"])]).sort_by("frame_index")

    def _images(
        self, row: dict[str, Any], table: Any, count: int, videos: dict[Path, Iterator[UInt8]]
    ) -> list[dict[str, UInt8]]:
        images: list[dict[str, UInt8]] = [{} for _ in range(count)]
        for camera in self._contract.cameras:
            key = self._key(camera)
            take = self._from_video if self._features[key]["dtype"] == "video" else self._from_table
            for i, image in enumerate(take(key, row, table, count, videos)):
                _check_size(image, camera, str(self._folder))
                images[i][camera.name] = image
        return images

    def _from_table(self, key: str, row: Any, table: Any, count: int, videos: Any) -> Iterator[UInt8]:
        for cell in table[key].to_pylist():
            raw = np.frombuffer(cell["bytes"], np.uint8)
            yield np.asarray(cv2.cvtColor(cv2.imdecode(raw, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), np.uint8)

    def _from_video(
        self, key: str, row: Any, table: Any, count: int, videos: dict[Path, Iterator[UInt8]]
    ) -> Iterator[UInt8]:
        """The next `count` frames of the file: episodes lie in it one after the other, in the listing's order."""
        path = self._path(self._info["video_path"], row, f"videos/{key}", key)
        if path not in videos:
            videos[path] = read_video(path)
        for _ in range(count):
            image = next(videos[path], None)
            if image is None:
                raise _other("camera", f"{key} has too few frames for episode {row['episode_index']}", str(path), [])
            yield image


def _check_size(image: UInt8, camera: CameraSpec, where: str) -> None:
    if image.shape != (camera.height, camera.width, 3):
        text = f"{camera.name!r} has frames of shape {image.shape}, the contract says {camera.width}x{camera.height}"
        raise _other("size", text, where, [])


def _other(what: str, text: str, where: str, have: list[str]) -> RatchetError:
    fix = f"it has {', '.join(have)}" if have else "give a mapping, or a contract that fits"
    return RatchetError(f"import.other_{what}", text, where=where, fix=fix)
