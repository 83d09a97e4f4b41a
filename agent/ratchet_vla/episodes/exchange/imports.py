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
    written_s = (folder / "meta/info.json").stat().st_mtime
    return take_in(source.episodes(), len(source.listing), store, contract, frames, progress, written_s)


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
        names = sorted(data.get("data", {}), key=lambda demo_name: int(demo_name.removeprefix("demo_") or 0))
        if not names:
            raise RatchetError(
                "import.not_hdf5", "it holds no demonstrations", where=str(file), fix="expected data/demo_N"
            )
        _check_libero(data["data"][names[0]], contract, str(file))
        demonstrations = _libero(data, names, file, contract)
        return take_in(demonstrations, len(names), store, contract, frames, progress, file.stat().st_mtime)


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
    for position, action in enumerate(np.asarray(actions, np.float32)):
        stamp = position / contract.control_hz
        state = {name: np.asarray(values, np.float32) for name, values in states[position].items()}
        observation = Observation(dict(images[position]), state, instruction, stamp, position)
        chunk = ActionChunk(action[None].copy(), None, None, "", 0.0, stamp, position)
        mark = Mark.HUMAN if human is None or human[position] else Mark.NONE
        steps.append(Step(observation, chunk, np.zeros(1, np.bool_), 0.0, position == len(actions) - 1, 1))
        ticks.append(ControlTick(stamp, stamp, position, None, action.copy(), mark, position, 0, "", state))
    return Episode(task=task, instruction=instruction, steps=steps, ticks=ticks, meta=meta)


def take_in(
    episodes: Iterator[tuple[Episode, dict[str, Any]]],
    count: int,
    store: EpisodeStore,
    contract: RobotContract,
    frames: Codec,
    progress: Progress | None,
    written_s: float = 0.0,
) -> list[Card]:
    """Write all beside the store first, so that a refusal in the middle leaves nothing behind.

    episodes: each with what is known of it (session, created, clock_offset, calibrations), or nothing.
    written_s: when the source was written, in seconds UTC; it dates episodes of which nothing is known, so that
        importing again gives the same ids.
    """
    created = datetime.fromtimestamp(written_s, UTC).isoformat(timespec="milliseconds")
    defaults = {"session": "imported", "created": created, "clock_offset": written_s, "calibrations": {}}
    report_progress = progress or (lambda stage, done_count, total: None)
    staging_folder = Path(tempfile.mkdtemp(prefix=".importing-", dir=store.root))
    try:
        for position, (episode, details) in enumerate(episodes):
            path = staging_folder / f"{position:06d}.mcap"
            fields = {name: details.get(name, value) for name, value in defaults.items()}
            write_episode(path, episode, contract, frames=frames, mode="import", **fields)
            report_progress("read", position + 1, count)
        return [store.copy_in(path) for path in sorted(staging_folder.iterdir())]
    finally:
        shutil.rmtree(staging_folder)


# -- LIBERO ------------------------------------------------------------------------------------------------------


def _check_libero(demo: Any, contract: RobotContract, location: str) -> None:
    observations = demo["obs"]
    for state in contract.state:
        dataset_name = LIBERO_STATE.get(state.name, state.name)
        if dataset_name not in observations or observations[dataset_name].shape[1:] != (state.size,):
            raise _other(
                "state",
                f"no {dataset_name!r} of {state.size} values for state {state.name!r}",
                location,
                sorted(observations),
            )
    for camera in contract.cameras:
        dataset_name = LIBERO_CAMERAS.get(camera.name, camera.name)
        if dataset_name not in observations:
            raise _other("camera", f"no {dataset_name!r} for camera {camera.name!r}", location, sorted(observations))
        _check_size(upright(np.asarray(observations[dataset_name][0]), camera), camera, location)
    if demo["actions"].shape[1] != contract.action.size:
        problem = f"{demo['actions'].shape[1]} action values, the contract has {contract.action.size}"
        raise _other("actions", problem, location, [dim.name for dim in contract.action.dims])


def _libero(
    data: Any, names: list[str], file: Path, contract: RobotContract
) -> Iterator[tuple[Episode, dict[str, Any]]]:
    attributes = data["data"].attrs
    problem = json.loads(attributes.get("problem_info", "{}"))
    instruction = " ".join(str(problem.get("language_instruction", file.stem.replace("_", " "))).split())
    scale = np.array([dim.command_scale for dim in contract.action.dims], np.float32)
    for name in names:
        demo = data["data"][name]
        observations = demo["obs"]
        count = len(demo["actions"])
        images: list[dict[str, UInt8]] = [{} for _ in range(count)]
        states: list[dict[str, Float32]] = [{} for _ in range(count)]
        for camera in contract.cameras:
            camera_frames = np.asarray(observations[LIBERO_CAMERAS.get(camera.name, camera.name)])
            for position in range(count):
                images[position][camera.name] = upright(camera_frames[position], camera)
        for state in contract.state:
            values = np.asarray(observations[LIBERO_STATE.get(state.name, state.name)], np.float32)
            for position in range(count):
                states[position][state.name] = values[position]
        actions = np.asarray(demo["actions"], np.float32) * scale
        meta = {"imported_from": file.name, "demonstration": name, "claims_success": bool(np.any(demo["dones"]))}
        yield demonstration(contract, instruction, file.stem.removesuffix("_demo"), images, states, actions, meta), {}


def upright(image: npt.NDArray[Any], camera: CameraSpec) -> UInt8:
    """A raw image turned and mirrored as the contract says."""
    turned = np.rot90(image, camera.rotate // 90)
    turned = turned[:, ::-1] if camera.mirror else turned
    return np.ascontiguousarray(turned, np.uint8)


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
        scale = np.array([dim.command_scale for dim in self._contract.action.dims], np.float32)
        for row, (table, states, actions, images) in zip(self.listing, self.read(), strict=True):
            if self._mapping.actions == "command":
                actions = actions * scale
            human = table["is_intervention"].to_pylist() if "is_intervention" in table.column_names else None
            instruction = row["tasks"][0]
            meta = {"imported_from": self._folder.name, "episode": row["episode_index"]}
            yield (
                demonstration(self._contract, instruction, instruction, images, states, actions, meta, human=human),
                {},
            )

    def read(self) -> Iterator[tuple[Any, list[dict[str, Float32]], Float32, list[dict[str, UInt8]]]]:
        """Table, N states, actions (N, D) float32 as they are written, and N times the frames of each episode."""
        videos: dict[Path, Iterator[UInt8]] = {}
        names = [spec.name for spec in self._contract.state]
        split_points = np.cumsum([spec.size for spec in self._contract.state])[:-1]
        for row in self.listing:
            table = self._table(row)
            count = len(table["index"])
            state = np.array(table["observation.state"].to_pylist(), np.float32).reshape(count, -1)
            actions = np.array(table["action"].to_pylist(), np.float32).reshape(count, -1)
            states = [dict(zip(names, np.split(values, split_points), strict=True)) for values in state]
            yield table, states, actions, self._images(row, table, count, videos)

    # -- inside -------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        contract = self._contract
        location = str(self._folder)
        for key, names, code in (
            ("action", [dim.name for dim in contract.action.dims], "actions"),
            ("observation.state", state_names(contract), "state"),
        ):
            feature = self._features.get(key)
            if feature is None:
                raise _other(code, f"no {key!r}", location, list(self._features))
            feature_names = feature.get("names")
            feature_names = next(iter(feature_names.values())) if isinstance(feature_names, dict) else feature_names
            matches = feature["shape"] == [len(names)] and (feature_names == names or self._mapping.same_order)
            if not matches:
                raise _other(
                    code,
                    f"{key} is {feature_names} of shape {feature['shape']}, the contract has {names}",
                    location,
                    [],
                )
        if abs(self._info["fps"] - self._rate) > 1e-6:
            raise _other("rate", f"{self._info['fps']} fps, the contract runs at {self._rate:g} Hz", location, [])
        for camera in contract.cameras:
            key = self._key(camera)
            if self._features.get(key, {}).get("dtype") not in ("video", "image"):
                image_keys = [
                    image_key
                    for image_key, image_feature in self._features.items()
                    if image_feature["dtype"] in ("video", "image")
                ]
                raise _other("camera", f"no frames {key!r}", location, image_keys)

    def _key(self, camera: CameraSpec) -> str:
        name = self._mapping.cameras.get(camera.name, camera.name)
        return name if name.startswith("observation.") else lerobot.IMAGES + name

    def _list(self) -> list[dict[str, Any]]:
        meta = self._folder / "meta"
        if self._version == "v3.0":
            listing: list[dict[str, Any]] = []
            for path in sorted((meta / "episodes").glob("*/*.parquet")):
                columns = [c for c in pq.read_schema(path).names if not c.startswith("stats/")]
                listing += pq.read_table(path, columns=columns).to_pylist()
        else:
            listing = [json.loads(line) for line in (meta / "episodes.jsonl").read_text().splitlines() if line.strip()]
        return sorted(listing, key=lambda row: int(row["episode_index"]))

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
            encoded = np.frombuffer(cell["bytes"], np.uint8)
            yield np.asarray(cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), np.uint8)

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


def _check_size(image: UInt8, camera: CameraSpec, location: str) -> None:
    if image.shape != (camera.height, camera.width, 3):
        problem = f"{camera.name!r} has frames of shape {image.shape}, the contract says {camera.width}x{camera.height}"
        raise _other("size", problem, location, [])


def _other(aspect: str, problem: str, location: str, available: list[str]) -> RatchetError:
    fix = f"it has {', '.join(available)}" if available else "give a mapping, or a contract that fits"
    return RatchetError(f"import.other_{aspect}", problem, where=location, fix=fix)
