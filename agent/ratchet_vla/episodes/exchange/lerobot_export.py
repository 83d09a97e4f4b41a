"""Export to LeRobotDataset v3: written beside, read back and compared, and only then given its name.

Knows which episodes may leave, and how their rows become tables and videos. The format itself is `lerobot_layout`'s.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.exchange import lerobot_layout as lerobot
from ratchet_vla.episodes.exchange import statistics
from ratchet_vla.episodes.exchange.exported import FORMAT, facts_of
from ratchet_vla.episodes.exchange.lerobot_check import Progress, compare
from ratchet_vla.episodes.exchange.rows import Rate, Row, best_rate, rows, state_vector
from ratchet_vla.episodes.exchange.video import VideoCodec, VideoFile
from ratchet_vla.episodes.library.annotations import Annotations, LabelStatus
from ratchet_vla.episodes.library.store import Card
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.documents import sync_folder
from ratchet_vla.storage.growing import disk_refusals

__all__ = ["ExportOptions", "ExportReport", "export_lerobot"]

OWN_FILE = "meta/ratchet.json"  # what LeRobot has no place for, and what brings the set back


@dataclass(frozen=True)
class ExportOptions:
    """How a data set is written."""

    codec: VideoCodec = "h264"
    """Video codec. av1 is smaller, but its encoder takes real-time priority where it may: not beside a running arm."""
    crf: int = 20
    """Quality of the video: lower is better and larger."""
    rate: Rate | None = None
    """Rows per control step, per decision, or spread: per control step of each decision, repeating its frames. If
    absent, per control step where every episode has the frames, else per decision where that is a whole rate."""
    unverified: bool = False
    """Take episodes that nobody has labelled, too."""
    tolerance: float = 12.0
    """Mean absolute error of a frame's pixels, of 255, above which the export is refused."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compared when read back. mean_error, worst_error: of frames, of 255."""

    target: str
    episodes: int
    frames: int
    rate: Rate
    fps: int
    bytes: int
    seconds: float
    mean_error: float
    worst_error: float
    values_checked: int


def choose(annotations: Annotations, references: Sequence[str], unverified: bool) -> list[tuple[Card, LabelStatus]]:
    """The episodes to take, oldest first; all that may be taken, where none is named.

    Raises:
        RatchetError: export.not_verified for a named one; export.nothing; export.mixed_contracts.
    """
    store = annotations.store
    episode_ids = [store.resolve(r) for r in references] or list(store.cards())
    chosen = []
    for episode in episode_ids:
        status = annotations.status(episode)
        if status.state == "verified" or (unverified and status.state != "discarded"):
            chosen.append((store.cards()[episode], status))
        elif references:
            raise RatchetError(
                "export.not_verified",
                f"it is {status.state}",
                where=episode[:12],
                fix="label it with `ratchet review`, or ask for unverified ones too",
            )
    if not chosen:
        raise RatchetError("export.nothing", "no verified episode", where=str(store.root), fix="label some first")
    if len({card.contract_id for card, _ in chosen}) > 1:
        raise RatchetError(
            "export.mixed_contracts", "the episodes are of several robots", fix="export one robot's at a time"
        )
    return chosen


def empty_episode(card: Card, rate: Rate) -> RatchetError:
    fix = "leave --options.rate out: it was recorded decision by decision" if rate == "control" and card.steps else ""
    return RatchetError("export.empty_episode", "it has no step with an action", where=card.id[:12], fix=fix)


def export_lerobot(
    annotations: Annotations,
    target: Path,
    references: Sequence[str] = (),
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a LeRobotDataset v3 to `target` (new): whole and compared with the recordings, or not there at all.

    references: episodes, oldest first; all verified ones if empty.

    Raises:
        RatchetError: export.exists, export.differs where what was read back is not what was recorded, and what
            `choose` and the format raise; nothing is left behind then.
    """
    options = options or ExportOptions()
    report_progress = progress or (lambda stage, done_count, total: None)
    chosen = choose(annotations, references, options.unverified)
    if target.exists():
        raise RatchetError("export.exists", "there is something already", where=str(target), fix="name a new folder")
    began_s = time.monotonic()
    scratch = target.with_name(f".{target.name}.writing-{os.getpid()}")
    with disk_refusals(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
        try:
            writer = _Writer(annotations, scratch, chosen, options)
            for position, (card, status) in enumerate(chosen):
                writer.episode(card, status)
                report_progress("written", position + 1, len(chosen))
            writer.finish()
            compared = compare(
                annotations, scratch, chosen, writer.rows, writer.rate, options.tolerance, report_progress
            )
            _sync_tree(scratch)
            scratch.rename(target)
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    size_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return ExportReport(
        target=str(target),
        episodes=len(chosen),
        frames=writer.frames,
        rate=writer.rate,
        fps=writer.fps,
        bytes=size_bytes,
        seconds=time.monotonic() - began_s,
        **compared,
    )


class _Writer:
    """Tables and videos of one data set, episode after episode."""

    def __init__(
        self, annotations: Annotations, folder: Path, chosen: list[tuple[Card, LabelStatus]], options: ExportOptions
    ) -> None:
        self._annotations = annotations
        self._folder = folder
        self._options = options
        readers = [annotations.store.open(card.id) for card, _ in chosen]
        self.contract: RobotContract = readers[0].info.robot()
        control = options.rate == "control" or (
            options.rate is None and all(best_rate(r) == "control" for r in readers)
        )
        self._length = 0 if control else self._chunk_length(chosen)
        self.rate: Rate = options.rate or ("control" if control else self._rate_of_decisions())
        self.fps = lerobot.whole_rate(self.contract, self._length if self.rate == "decisions" else 1)
        self.columns = lerobot.features(
            self.contract, self.fps, options.codec, options.crf, self._length, spread=self.rate == "spread"
        )
        self._schema = lerobot.data_schema(self.columns)
        self._data: Any = None
        self._data_location = (0, 0)
        self._data_bytes = 0
        self._videos: dict[str, VideoFile] = {}
        self._video_locations: dict[str, tuple[int, int]] = {c.name: (0, 0) for c in self.contract.cameras}
        self._tasks: list[str] = []
        self.frames = 0
        self.rows: list[dict[str, Any]] = []
        self._stats: list[dict[str, dict[str, statistics.Array]]] = []
        self._own_details: list[dict[str, Any]] = []

    def episode(self, card: Card, status: LabelStatus) -> None:
        reader = self._annotations.store.open(card.id)
        success = status.success if status.state == "verified" else card.success
        if card.instruction not in self._tasks:
            self._tasks.append(card.instruction)
        self._rotate()
        expected_frames = card.steps * self._length if self.rate == "spread" else card.ticks or card.steps
        colours = {c.name: statistics.Colours(expected_frames) for c in self.contract.cameras}
        starts = {name: video.frames for name, video in self._videos.items()}
        episode_rows: list[Row] = []
        for row in rows(reader, self.rate, success):
            for name, image in row.images.items():
                self._videos[name].add(image)
                colours[name].add(image)
            episode_rows.append(Row(**{**row.__dict__, "images": {}}))
        if not episode_rows:
            raise empty_episode(card, self.rate)
        table = self._table(episode_rows, success, self._tasks.index(card.instruction))
        written = lerobot.data_table(table, self._schema)
        self._data.write_table(written)
        self._data_bytes += written.nbytes
        self._describe(card, table, colours, starts)
        self._own_details.append(facts_of(card, status, reader))
        self.frames += len(episode_rows)

    def finish(self) -> None:
        self._data.close()
        for video in self._videos.values():
            video.close()
        episodes = self._folder / lerobot.EPISODES_PATH.format(chunk_index=0, file_index=0)
        lerobot.write_episodes(episodes, self.rows)
        lerobot.write_tasks(self._folder / "meta/tasks.parquet", self._tasks)
        overall = {
            name: statistics.together([episode_stats[name] for episode_stats in self._stats]) for name in self._stats[0]
        }
        plain = {
            name: {statistic: values.tolist() for statistic, values in stats.items()} for name, stats in overall.items()
        }
        _json(self._folder / "meta/stats.json", plain)
        info = lerobot.info(self.columns, self.fps, self.contract.name, len(self.rows), self.frames, len(self._tasks))
        _json(self._folder / "meta/info.json", info)
        own_data = {"format": FORMAT, "rate": self.rate, "fps": self.fps, "contract": self.contract.to_dict()}
        _json(self._folder / OWN_FILE, {**own_data, "episodes": self._own_details})

    # -- inside -------------------------------------------------------------------------------------------------

    def _chunk_length(self, chosen: list[tuple[Card, LabelStatus]]) -> int:
        lengths = set()
        for card, _ in chosen:
            lengths |= {len(s.chunk.actions) for s in self._annotations.store.read(card.id, images=False).steps}
        if len(lengths) != 1:
            raise RatchetError(
                "export.mixed_chunks",
                f"decisions have chunks of {sorted(lengths)} actions",
                fix="ratchet episodes export OUT.hdf5 --format hdf5, or name episodes of one chunk length",
            )
        return lengths.pop()

    def _rate_of_decisions(self) -> Rate:
        return "decisions" if lerobot.is_whole(self.contract.control_hz / self._length) else "spread"

    def _rotate(self) -> None:
        """Begin the next file where the one before has its size; the first ones, at the beginning."""
        if self._data is None or self._data_bytes > lerobot.DATA_MB << 20:
            if self._data is not None:
                self._data.close()
                self._data_location = lerobot.next_file(*self._data_location)
                self._data_bytes = 0
            path = self._folder / lerobot.DATA_PATH.format(
                chunk_index=self._data_location[0], file_index=self._data_location[1]
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(path, self._schema, compression="snappy")
        for camera in self.contract.cameras:
            video = self._videos.get(camera.name)
            if video is not None:
                size = video.path.stat().st_size if video.path.exists() else 0
                if size < lerobot.VIDEO_MB << 20:
                    continue
                video.close()
                self._video_locations[camera.name] = lerobot.next_file(*self._video_locations[camera.name])
            chunk, file = self._video_locations[camera.name]
            key = lerobot.IMAGES + camera.name
            path = self._folder / lerobot.VIDEO_PATH.format(video_key=key, chunk_index=chunk, file_index=file)
            self._videos[camera.name] = VideoFile(
                path, camera.height, camera.width, self.fps, self._options.codec, self._options.crf
            )

    def _table(self, episode_rows: list[Row], success: bool | None, task_index: int) -> dict[str, Any]:
        count = len(episode_rows)
        index = np.arange(count)
        table: dict[str, Any] = {
            lerobot.STATE: np.stack([state_vector(row.state, self.contract) for row in episode_rows]),
            lerobot.ACTION: np.stack([row.action for row in episode_rows]),
            "next.reward": np.array([row.reward for row in episode_rows], np.float32),
            "next.done": np.array([row.done for row in episode_rows]),
            "next.success": np.array([bool(success) and row.done for row in episode_rows]),
            "is_intervention": np.array([row.human for row in episode_rows]),
            "executed": np.array([row.executed for row in episode_rows]),
            "marks": np.array([row.marks for row in episode_rows]),
            "stamp": np.array([row.stamp for row in episode_rows]),
            "timestamp": (index / self.fps).astype(np.float32),
            "frame_index": index,
            "episode_index": np.full(count, len(self.rows)),
            "index": self.frames + index,
            "task_index": np.full(count, task_index),
        }
        if self._length:
            table[lerobot.CHUNK] = np.stack([row.chunk.ravel() for row in episode_rows if row.chunk is not None])
            table[lerobot.CHUNK_EXECUTED] = np.stack([row.flags for row in episode_rows if row.flags is not None])
            table[lerobot.CHUNK_RAN] = np.array([row.ran for row in episode_rows])
        if self.rate == "spread":
            table[lerobot.IS_DECISION] = np.array([row.fresh for row in episode_rows])
        return table

    def _describe(
        self,
        card: Card,
        table: dict[str, Any],
        colours: dict[str, statistics.Colours],
        starts: dict[str, int],
    ) -> None:
        count = len(table["index"])
        row: dict[str, Any] = {
            "episode_index": len(self.rows),
            "tasks": [card.instruction],
            "length": count,
            "data/chunk_index": self._data_location[0],
            "data/file_index": self._data_location[1],
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + count,
        }
        for camera in self.contract.cameras:
            key = f"videos/{lerobot.IMAGES}{camera.name}"
            start = starts[camera.name]
            row[f"{key}/chunk_index"], row[f"{key}/file_index"] = self._video_locations[camera.name]
            row[f"{key}/from_timestamp"] = start / self.fps
            row[f"{key}/to_timestamp"] = (start + count) / self.fps
        stats = {lerobot.IMAGES + name: colour.result() for name, colour in colours.items()}
        stats |= {name: statistics.of_values(values) for name, values in table.items()}
        row |= {
            f"stats/{name}/{statistic}": stat_values
            for name, values in stats.items()
            for statistic, stat_values in values.items()
        }
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self.rows.append(row)
        self._stats.append(stats)


def _json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=4, ensure_ascii=False))


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
