"""One episode file being written: records in, in the order of time; append-only, readable up to the last flush.

Knows topics and message contents. Knows no threads, no loop and no folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from mcap.records import Schema
from mcap.writer import CompressionType
from mcap_ros2.writer import Writer as Ros2Writer

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.file import format as fmt
from ratchet_vla.episodes.file.checking import check_chunk, check_observation, check_tick
from ratchet_vla.episodes.file.format import Codec, EpisodeEnding, EpisodeInfo
from ratchet_vla.episodes.file.frames import Encoder
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, ControlTick, Float32, Mark, Observation, SafetyEvent, UInt8
from ratchet_vla.storage.growing import GrowingFile, disk_refusals

__all__ = ["EpisodeWriter", "make_info"]

CHUNK_BYTES = 4 << 20
NO_COMMAND_FILTER = -1  # in the place of marks: there is no command filter


def make_info(contract: RobotContract, task: str, instruction: str, **fields: Any) -> EpisodeInfo:
    """What is known when an episode begins. fields: the other fields of `EpisodeInfo`.

    Raises:
        RatchetError: episode.bad_meta.
    """
    calibrations = {camera.name: camera.calibration_id for camera in contract.cameras if camera.calibration_id}
    calibrations |= fields.pop("calibrations", {})
    fields.setdefault("created", datetime.now(UTC).isoformat(timespec="milliseconds"))
    fmt.check_meta(fields.get("meta", {}), task)
    return EpisodeInfo(
        task=task,
        instruction=instruction,
        contract=json.loads(json.dumps(dataclasses.asdict(contract))),
        contract_id=contract.id,
        calibrations=calibrations,
        software=_software(),
        **fields,
    )


def _software() -> str:
    try:
        return metadata.version("ratchet-vla")
    except metadata.PackageNotFoundError:
        return "source"


class EpisodeWriter:
    """One file being written. Call `flush` to make what was written so far readable; end with `finish`.

    stream, decisions of the info say how frames are kept; frames that decisions were made on may share the stream's.
    quality: of lossy codecs, 1..100. compress: False for live recording of compressed images, which gain nothing.
    """

    def __init__(
        self, scratch: Path, final: Path, info: EpisodeInfo, *, quality: int = 90, compress: bool = True
    ) -> None:
        self.contract = RobotContract.from_dict(info.contract, rules=False)
        self._quality = quality
        self._topics = {
            "stream": {
                camera.name: fmt.image_topic(camera.name, cast(Codec, info.stream), "cameras")
                for camera in _cameras(info)
            },
            "decisions": {
                camera.name: fmt.image_topic(camera.name, cast(Codec, info.decisions), "decisions")
                for camera in _cameras(info)
                if info.decisions
            },
        }
        topics = [topic for group in self._topics.values() for topic, _ in group.values()]
        if len(set(topics)) < len(topics):
            raise RatchetError(
                "episode.bad_name", "two cameras have the same name in ROS", fix="rename one in the contract"
            )
        topic_names = {
            group: {camera: topic for camera, (topic, _) in cameras.items()} for group, cameras in self._topics.items()
        }
        self.info = dataclasses.replace(info, topics=topic_names)
        with disk_refusals(scratch):
            self._file = GrowingFile(scratch, final)
        compression = CompressionType.ZSTD if compress else CompressionType.NONE
        self._mcap = _Mcap(cast("IO[Any]", self._file), chunk_size=CHUNK_BYTES, compression=compression)
        self._mcap.add_metadata(fmt.BEGIN_RECORD, self.info.to_record())
        self._schemas: dict[str, Schema] = {}
        self._encoders: dict[str, Encoder] = {}
        self.counts: Counter[str] = Counter()
        self._first = math.inf
        self._last = -math.inf
        self._human_ticks = 0

    # -- records, in the order of time --------------------------------------------------------------------------

    def frame(self, camera: str, image: UInt8, stamp: float, group: str = "stream") -> int:
        """One image of a camera; returns its index within its topic. group: "stream" or "decisions"."""
        topic, type_name = self._topics[group][camera]
        codec = cast(Codec, self.info.stream if group == "stream" else self.info.decisions)
        if topic not in self._encoders:
            self._encoders[topic] = Encoder(codec, self._quality, max(self.contract.control_hz, 1.0))
        data = self._encoders[topic].encode(image)
        ros_time = self._time(stamp)
        if codec == "raw":
            height, width = image.shape[:2]
            body: dict[str, Any] = {"height": height, "width": width, "encoding": "rgb8", "step": width * 3}
            self._put(
                topic, type_name, stamp, {"header": {"stamp": ros_time, "frame_id": camera}, **body, "data": data}
            )
        elif codec == "h264":
            self._put(
                topic, type_name, stamp, {"timestamp": ros_time, "frame_id": camera, "data": data, "format": "h264"}
            )
        else:
            format_name = f"rgb8; {codec} compressed bgr8"
            self._put(
                topic,
                type_name,
                stamp,
                {"header": {"stamp": ros_time, "frame_id": camera}, "format": format_name, "data": data},
            )
        return self.counts[topic] - 1

    def observation(self, observation: Observation, shared: Mapping[str, int] | None = None) -> int:
        """What a decision was made on; returns its index.

        shared: camera -> index of the image in the stream (-1 where the frame was lost), for images that are in the
        file already; the others are written first.
        """
        check_observation(observation, self.contract)
        frames = []
        topics = []
        for camera, image in observation.images.items():
            if shared is not None and camera in shared:
                group = "stream"
                index = shared[camera]
            else:
                group = "decisions" if self.info.decisions else "stream"
                index = self.frame(camera, image, observation.stamp, group)
            frames.append(index)
            topics.append(self._topics[group][camera][0])
        return self.observation_record(observation, list(observation.images), topics, frames)

    def observation_record(
        self, observation: Observation, cameras: list[str], topics: list[str], frames: list[int]
    ) -> int:
        """An observation whose images are in the file already, or lost (-1)."""
        return self._put(
            fmt.OBSERVATION,
            fmt.TYPES[fmt.OBSERVATION],
            observation.stamp,
            {
                "header": self._header(observation.stamp),
                "stamp": observation.stamp,
                "sequence": observation.sequence,
                "instruction": observation.instruction,
                "cameras": cameras,
                "topics": topics,
                "frames": frames,
                **_state(observation.state),
            },
        )

    def chunk(self, chunk: ActionChunk, stamp: float | None = None) -> int:
        """An answer of the policy; returns its index. stamp: when it was admitted, the observation's if unknown."""
        check_chunk(chunk, self.contract)
        admitted_s = chunk.observation_stamp if stamp is None else stamp
        bins = chunk.tokens if chunk.tokens is not None and chunk.tokens.dtype == np.int64 else None
        chain = chunk.tokens if bins is None else None
        return self._put(
            fmt.CHUNK,
            fmt.TYPES[fmt.CHUNK],
            admitted_s,
            {
                "header": self._header(admitted_s),
                "observation_stamp": chunk.observation_stamp,
                "observation_sequence": chunk.observation_sequence,
                "adapter_id": chunk.adapter_id,
                "temperature": chunk.temperature,
                "steps": chunk.actions.shape[0],
                "dims": chunk.actions.shape[1],
                "actions": chunk.actions.ravel().tolist(),
                "has_tokens": bins is not None,
                "tokens": [] if bins is None else bins.ravel().tolist(),
                "has_log_prob": chunk.log_prob is not None,
                "log_prob": [] if chunk.log_prob is None else chunk.log_prob.ravel().tolist(),
                "chain_shape": [] if chain is None else list(chain.shape),
                "chain": [] if chain is None else chain.ravel().tolist(),
                "compute_dtype": chunk.compute_dtype,
            },
        )

    def step(
        self,
        observation: int,
        chunk: int,
        executed: list[bool],
        marks: list[int],
        reward: float,
        done: bool,
        steps_run: int,
        stamp: float,
    ) -> int:
        """What became of a decision. observation, chunk: their indices. marks: `records.Mark` values, may be empty."""
        body = {
            "header": self._header(stamp),
            "observation": observation,
            "chunk": chunk,
            "executed": executed,
            "marks": marks,
            "reward": reward,
            "done": done,
            "steps_run": steps_run,
        }
        return self._put(fmt.STEP, fmt.TYPES[fmt.STEP], stamp, body)

    def tick(self, tick: ControlTick) -> None:
        """One control period; its state and command also go out under standard message types, for plots."""
        check_tick(tick, self.contract)
        sampled = tick.sampled
        command = tick.command
        body = {
            "header": self._header(tick.stamp),
            "stamp": tick.stamp,
            "deadline": tick.deadline,
            "index": tick.index,
            "has_sampled": sampled is not None,
            "sampled": [] if sampled is None else sampled.tolist(),
            "has_command": command is not None,
            "command": [] if command is None else command.tolist(),
            "marks": int(tick.marks),
            "chunk_sequence": tick.chunk_sequence,
            "chunk_offset": tick.chunk_offset,
            "adapter_id": tick.adapter_id,
            **_state(tick.state),
            "has_applied": tick.applied is not None,
            "applied": [] if tick.applied is None else tick.applied.tolist(),
            "applied_marks": NO_COMMAND_FILTER if tick.applied_marks is None else int(tick.applied_marks),
        }
        self._put(fmt.TICK, fmt.TYPES[fmt.TICK], tick.stamp, body)
        self._human_ticks += bool(tick.marks & Mark.HUMAN)
        self.plots(tick.state, tick.reached, tick.stamp)

    def wire(self, topic: str, channel: tuple[str, str], data: bytes, received: int) -> None:
        """A message as it came off the wire. channel: its type and that type's definition; received: ns, UTC."""
        with disk_refusals(self._file.scratch):
            self._mcap.write_raw(topic, channel, data, received)

    def event(self, event: SafetyEvent) -> None:
        """What the safety filter did."""
        body = {**dataclasses.asdict(event), "header": self._header(event.stamp)}
        self._put(fmt.EVENT, fmt.TYPES[fmt.EVENT], event.stamp, body)

    def plots(self, state: Mapping[str, Float32], command: Float32 | None, stamp: float) -> None:
        """State and command under standard message types, for viewers that know no others."""
        for name, values in state.items():
            self._array(fmt.state_topic(name), name, values, stamp)
        if command is not None:
            self._array(fmt.COMMAND, ",".join(d.name for d in self.contract.action.dims), command, stamp)

    # -- the file -----------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    @property
    def path(self) -> Path:
        """Where the finished file will lie."""
        return self._file.final

    def flush(self) -> None:
        """Everything so far survives a kill, and a power cut, when this returns."""
        with disk_refusals(self._file.scratch):
            self._mcap.flush()
            self._file.sync()

    def finish(
        self, success: bool | None, source: str, reason: str, *, dropped: dict[str, int] | None = None, **fields: Any
    ) -> tuple[str, EpisodeEnding]:
        """Complete the file under its final name; returns the episode's id and how it ended.

        fields: `ended` (now, if absent), `recovered` and `lost_bytes` of the ending, where they apply.
        """
        fields.setdefault("ended", datetime.now(UTC).isoformat(timespec="milliseconds"))
        topics = {topic for group in self.info.topics.values() for topic in group.values()}
        ending = EpisodeEnding(
            success=success,
            success_source=source,
            reason=reason,
            seconds=max(self._last - self._first, 0.0) if self.counts else 0.0,
            steps=self.counts[fmt.STEP],
            ticks=self.counts[fmt.TICK],
            human_ticks=self._human_ticks,
            events=self.counts[fmt.EVENT],
            frames={topic: self.counts[topic] for topic in sorted(topics) if self.counts[topic]},
            dropped=dropped or {},
            **fields,
        )
        with disk_refusals(self._file.final):
            self._mcap.flush()
            self._mcap.add_metadata(fmt.END_RECORD, ending.to_record())
            self._mcap.finish()  # type: ignore[no-untyped-call]
            digest = self._file.hexdigest()
            self._file.finish()
        return digest, ending

    def abandon(self) -> None:
        """Leave the unfinished file where it is, for recovery."""
        self._file.close()

    def discard(self) -> None:
        """Remove the unfinished file."""
        self._file.discard()

    # -- inside -------------------------------------------------------------------------------------------------

    def _array(self, topic: str, label: str, values: Float32, stamp: float) -> None:
        size = len(values)
        layout = {"dim": [{"label": label, "size": size, "stride": size}], "data_offset": 0}
        self._put(topic, "std_msgs/msg/Float64MultiArray", stamp, {"layout": layout, "data": values.tolist()})

    def _put(self, topic: str, type_name: str, stamp: float, body: dict[str, Any]) -> int:
        if type_name not in self._schemas:
            self._schemas[type_name] = self._mcap.register_msgdef(type_name, fmt.DEFINITIONS[type_name])
        ros_time = self._time(stamp)
        nanoseconds = ros_time["sec"] * 1_000_000_000 + ros_time["nanosec"]
        with disk_refusals(self._file.scratch):
            self._mcap.write_message(topic, self._schemas[type_name], body, log_time=nanoseconds)
        self.counts[topic] += 1
        self._first = min(self._first, stamp)
        self._last = max(self._last, stamp)
        return self.counts[topic] - 1

    def _time(self, stamp: float) -> dict[str, int]:
        nanoseconds = round((stamp + self.info.clock_offset) * 1e9)
        return {"sec": nanoseconds // 1_000_000_000, "nanosec": nanoseconds % 1_000_000_000}

    def _header(self, stamp: float) -> dict[str, Any]:
        return {"stamp": self._time(stamp), "frame_id": ""}


class _Mcap(Ros2Writer):
    """The library's writer, with what it keeps to itself: the flush, and messages that are serialised already."""

    def __init__(self, output: IO[Any], chunk_size: int, compression: CompressionType) -> None:
        super().__init__(output, chunk_size=chunk_size, compression=compression)
        self._raw: dict[str, int] = {}  # topic -> channel

    def write_raw(self, topic: str, channel: tuple[str, str], data: bytes, received: int) -> None:
        if topic not in self._raw:
            kind, definition = channel
            schema = self._writer.register_schema(kind, "ros2msg", definition.encode())
            self._raw[topic] = self._writer.register_channel(topic, "cdr", schema)
        self._writer.add_message(self._raw[topic], received, data, received)

    def flush(self) -> None:
        self._writer.flush()  # type: ignore[no-untyped-call]


def _state(state: Mapping[str, Float32]) -> dict[str, Any]:
    values = np.concatenate([*state.values(), np.zeros(0, np.float32)])
    return {
        "state_names": list(state),
        "state_sizes": [len(field_values) for field_values in state.values()],
        "state": values.tolist(),
    }


def _cameras(info: EpisodeInfo) -> Any:
    return RobotContract.from_dict(info.contract, rules=False).cameras
