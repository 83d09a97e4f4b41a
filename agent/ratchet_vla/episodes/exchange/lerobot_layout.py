"""LeRobotDataset v3 on the disk: paths, features, tables and their metadata, as LeRobot itself writes them.

Knows the format (checked against LeRobot 0.6.1). Knows no episode; `lerobot_export` and `imports` do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.exchange.rows import state_names
from ratchet_vla.errors import RatchetError

VERSION = "v3.0"
CHUNK_SIZE = 1000
DATA_MB = 100
VIDEO_MB = 200
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
IMAGES = "observation.images."
STATE = "observation.state"
ACTION = "action"
CHUNK = "action.chunk"
CHUNK_EXECUTED = "action.chunk.executed"
CHUNK_RAN = "action.chunk.steps_run"
IS_DECISION = "is_decision"  # of rows at control rate: frames and state are of this moment, not repeated
DEFAULTS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_ARROW = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}


def features(
    contract: RobotContract, fps: int, codec: str, crf: int, chunk: int = 0, *, spread: bool = False
) -> dict[str, dict[str, Any]]:
    """The data set's columns. chunk: K of decisions, 0 at control rate. spread: as in `rows.Rate`."""
    dims = [dim.name for dim in contract.action.dims]
    columns: dict[str, dict[str, Any]] = {}
    for camera in contract.cameras:
        columns[IMAGES + camera.name] = {
            "dtype": "video",
            "shape": [camera.height, camera.width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": camera.height,
                "video.width": camera.width,
                "video.codec": codec,
                "video.pix_fmt": "yuv420p",
                "video.fps": fps,
                "video.channels": 3,
                "has_audio": False,
                "video.g": 2,
                "video.crf": crf,
                "is_depth_map": False,
            },
        }
    columns[STATE] = {"dtype": "float32", "shape": [len(state_names(contract))], "names": state_names(contract)}
    columns[ACTION] = {"dtype": "float32", "shape": [len(dims)], "names": dims}
    if chunk:
        names = [f"{dim}.{offset}" for offset in range(chunk) for dim in dims]
        columns[CHUNK] = {"dtype": "float32", "shape": [len(names)], "names": names}
        columns[CHUNK_EXECUTED] = {"dtype": "bool", "shape": [chunk], "names": [str(offset) for offset in range(chunk)]}
        columns[CHUNK_RAN] = {"dtype": "int64", "shape": [1], "names": None}
    if spread:
        columns[IS_DECISION] = {"dtype": "bool", "shape": [1], "names": None}
    for name, dtype in (
        ("next.reward", "float32"),
        ("next.done", "bool"),
        ("next.success", "bool"),
        ("is_intervention", "bool"),
        ("executed", "bool"),
        ("marks", "int64"),
        ("stamp", "float64"),
    ):
        columns[name] = {"dtype": dtype, "shape": [1], "names": None}
    for name in DEFAULTS:
        columns[name] = {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
    return columns


def data_schema(columns: dict[str, dict[str, Any]]) -> pa.Schema:
    """Arrow schema of the data files, with the metadata that the `datasets` library leaves there."""
    fields = []
    described = {}
    for name, column in columns.items():
        if column["dtype"] == "video":
            continue
        feature = {"dtype": column["dtype"], "_type": "Value"}
        size = column["shape"][0]
        arrow_type = _ARROW[column["dtype"]]
        fields.append(pa.field(name, arrow_type if size == 1 else pa.list_(pa.field("element", arrow_type), size)))
        described[name] = feature if size == 1 else {"feature": feature, "length": size, "_type": "List"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": described}})})


def data_table(columns: dict[str, npt.NDArray[Any]], schema: pa.Schema) -> pa.Table:
    """Columns (N,) or (N, D) as a table of this schema."""
    arrays = []
    for field in schema:
        values = np.ascontiguousarray(columns[field.name])
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.array(values.reshape(-1), field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            arrays.append(pa.array(values.reshape(-1), field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def write_tasks(path: Path, tasks: list[str]) -> None:
    """Task index and text; the text is the index of the data frame that pandas makes of it."""
    column = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [
            {"name": None, "field_name": None, **column, "metadata": {"encoding": "UTF-8"}},
        ],
        "columns": [
            {
                "name": "task_index",
                "field_name": "task_index",
                "pandas_type": "int64",
                "numpy_type": "int64",
                "metadata": None,
            },
            {"name": "task", "field_name": "task", **column},
        ],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.3",
    }
    schema = pa.schema(
        [("task_index", pa.int64()), ("task", pa.string())], metadata={"pandas": json.dumps(pandas).encode()}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_arrays([list(range(len(tasks))), tasks], schema=schema), path)


def write_episodes(path: Path, episodes: list[dict[str, Any]]) -> None:
    """One row per episode: where its data and frames are, and its statistics."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain_rows = [
        {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in episode.items()}
        for episode in episodes
    ]
    pq.write_table(pa.Table.from_pylist(plain_rows), path)


def info(
    columns: dict[str, dict[str, Any]], fps: int, robot: str, episodes: int, frames: int, tasks: int
) -> dict[str, Any]:
    """The data set's `meta/info.json`. robot: the name of its contract."""
    return {
        "codebase_version": VERSION,
        "fps": fps,
        "features": columns,
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "chunks_size": CHUNK_SIZE,
        "data_files_size_in_mb": DATA_MB,
        "video_files_size_in_mb": VIDEO_MB,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "robot_type": robot,
        "splits": {"train": f"0:{episodes}"},
    }


def is_whole(rate: float) -> bool:
    """Whether LeRobot can say so many frames per second: `fps` is an integer there, and times are frames / fps."""
    return rate >= 1 and abs(rate - round(rate)) < 1e-6


def whole_rate(contract: RobotContract, divisor: int = 1) -> int:
    """Frames per second as LeRobot wants them: a whole number. divisor: control steps per row.

    Raises:
        RatchetError: export.bad_rate.
    """
    rate = contract.control_hz / divisor
    if not is_whole(rate):
        at_control_rate = divisor > 1 and is_whole(contract.control_hz)
        hdf5 = "ratchet episodes export OUT.hdf5 --format hdf5"
        raise RatchetError(
            "export.bad_rate",
            f"{rate:g} rows per second is no whole number, which LeRobotDataset needs",
            where=contract.name,
            fix="--options.rate spread: a row per control step of each decision" if at_control_rate else hdf5,
        )
    return round(rate)


def next_file(chunk: int, file: int) -> tuple[int, int]:
    """Indices of the file after this one."""
    return (chunk + 1, 0) if file == CHUNK_SIZE - 1 else (chunk, file + 1)
