"""Reading episodes: what a file says about itself, its records, and whole episodes as they were written.

Knows finished and cut-off files; a cut-off one is read up to its last whole chunk. Changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from mcap.exceptions import McapError
from mcap.records import Channel, DataEnd, Message, Metadata, Schema
from mcap.stream_reader import StreamReader
from mcap_ros2.decoder import DecoderFactory
from zstandard import ZstdError

from agent.episodes import format as fmt
from agent.episodes.disk import file_hash
from agent.episodes.format import Codec, EpisodeEnding, EpisodeInfo
from agent.episodes.frames import Decoder
from agent.errors import RatchetError
from agent.records import ActionChunk, ControlTick, Episode, Float32, Mark, Observation, SafetyEvent, Step, UInt8

RECORD_LIMIT = 1 << 30
# What the libraries raise on bytes that are cut off or changed.
TORN = (McapError, ZstdError, struct.error, ValueError, LookupError, TypeError, EOFError, MemoryError)


@dataclass(frozen=True)
class Item:
    """One message. index: counts messages of its topic, from 0. time: UTC, nanoseconds."""

    topic: str
    index: int
    time: int
    body: Any


@dataclass
class _Scan:
    """State of one pass over a file. torn: why it ended before its end; empty for a whole file."""

    info: EpisodeInfo | None = None
    ending: EpisodeEnding | None = None
    torn: str = ""
    counts: dict[str, int] = field(default_factory=dict)


class EpisodeReader:
    """One file. cut_off: accept a file that was never finished, and read what is whole in it."""

    def __init__(self, path: Path | str, *, cut_off: bool = False) -> None:
        """Raises RatchetError episode.missing, episode.damaged, episode.unknown_format."""
        self.path = Path(path)
        self._cut_off = cut_off
        if not self.path.is_file():
            raise RatchetError("episode.missing", "no such episode file", where=str(path), fix="see the episode list")
        scan = _Scan()
        with suppress(StopIteration):
            next(self._pass(scan, None, stop_at_info=True))
        if scan.info is None:
            raise self._damaged(scan.torn or "the file does not say what it is")
        self.info: EpisodeInfo = scan.info

    @property
    def id(self) -> str:
        """SHA-256 of the file's content."""
        return file_hash(self.path)

    def ending(self) -> EpisodeEnding | None:
        """How it ended; None for a file that was cut off. Reads the whole file."""
        scan = _Scan()
        for _ in self._pass(scan, ()):
            pass
        return scan.ending

    def items(self, topics: Iterable[str] | None = None) -> Iterator[Item]:
        """Messages in the order in which they were written; of these topics only, where given."""
        yield from self._pass(_Scan(), topics)

    def frames(self, camera: str, group: str = "stream") -> Iterator[tuple[float, UInt8]]:
        """(stamp in seconds, (H, W, 3) uint8 RGB) of one camera, in order. group: "stream" or "decisions"."""
        decoder = Decoder(self.codec(group), str(self.path))
        for item in self.items([self.topic(camera, group)]):
            yield self.stamp(item), decode_frame(decoder, item.body)

    def encoded_frames(self, camera: str, group: str = "stream") -> Iterator[tuple[float, bytes]]:
        """(stamp in seconds, bytes as recorded) of one camera."""
        for item in self.items([self.topic(camera, group)]):
            yield self.stamp(item), bytes(item.body.data)

    def codec(self, group: str = "stream") -> Codec:
        return cast(Codec, self.info.stream if group == "stream" else self.info.decisions)

    def topic(self, camera: str, group: str = "stream") -> str:
        """Raises RatchetError episode.no_camera."""
        known = self.info.topics.get(group, {})
        if camera not in known:
            raise RatchetError(
                "episode.no_camera",
                f"no camera {camera!r} in this episode",
                where=str(self.path),
                fix=f"cameras: {', '.join(known) or 'none'}",
            )
        return known[camera]

    def stamp(self, item: Item) -> float:
        """Seconds on the robot's clock, to the nanosecond of the message."""
        return item.time / 1e9 - self.info.clock_offset

    def episode(self, images: bool = True) -> Episode:
        """The whole episode. images: False leaves every `Observation.images` empty.

        Steps whose frames were lost while recording are left out. `meta` is what was given, and under "recording"
        what happened to the file, where anything did.
        """
        scan = _Scan()
        collected = _Collected(self, images)
        for item in self._pass(scan, None if images else self._small_topics()):
            collected.take(item)
        return collected.episode(scan.ending)

    # -- inside -------------------------------------------------------------------------------------------------

    def _small_topics(self) -> list[str]:
        return [fmt.OBSERVATION, fmt.CHUNK, fmt.STEP, fmt.TICK, fmt.EVENT]

    def _pass(self, scan: _Scan, topics: Iterable[str] | None, stop_at_info: bool = False) -> Iterator[Item]:
        wanted = None if topics is None else set(topics)
        schemas: dict[int, Schema] = {}
        channels: dict[int, Channel] = {}
        decoders = DecoderFactory()
        whole = False
        try:
            with self.path.open("rb") as file:
                reader = StreamReader(file, validate_crcs=True, record_size_limit=RECORD_LIMIT)
                for record in reader.records:
                    if isinstance(record, Metadata):
                        self._metadata(record, scan)
                        if stop_at_info and scan.info:
                            return
                    elif isinstance(record, Schema):
                        schemas[record.id] = record
                    elif isinstance(record, Channel):
                        channels[record.id] = record
                    elif isinstance(record, DataEnd):
                        whole = True
                    elif isinstance(record, Message):
                        channel = channels[record.channel_id]
                        index = scan.counts.get(channel.topic, 0)
                        scan.counts[channel.topic] = index + 1
                        if wanted is None or channel.topic in wanted:
                            decode = decoders.decoder_for(channel.message_encoding, schemas[channel.schema_id])
                            if decode is not None:
                                yield Item(channel.topic, index, record.log_time, decode(record.data))
        except TORN as error:
            scan.torn = str(error) or type(error).__name__
        if not whole and not scan.torn:
            scan.torn = "the file ends early"
        if not self._cut_off and (scan.torn or scan.ending is None):
            raise self._damaged(scan.torn or "it was never finished")

    def _metadata(self, record: Metadata, scan: _Scan) -> None:
        if record.name == fmt.BEGIN_RECORD:
            scan.info = EpisodeInfo.from_record(record.metadata, str(self.path))
        elif record.name == fmt.END_RECORD:
            scan.ending = EpisodeEnding.from_record(record.metadata, str(self.path))

    def _damaged(self, what: str) -> RatchetError:
        return RatchetError(
            "episode.damaged",
            what,
            where=str(self.path),
            fix="recover it with `ratchet episodes verify --recover`",
        )


def read_episode(path: Path | str, *, images: bool = True) -> Episode:
    """A finished episode as it was written; frames bit by bit where they were recorded raw or as PNG.

    Raises:
        RatchetError: episode.missing, episode.damaged, episode.unknown_format, episode.bad_frame.
    """
    return EpisodeReader(path).episode(images)


class _Collected:
    """Messages of one episode, being put together."""

    def __init__(self, reader: EpisodeReader, images: bool) -> None:
        self._reader, self._want = reader, images
        self._codecs: dict[str, Codec] = {}
        for group, cameras in reader.info.topics.items():
            self._codecs |= dict.fromkeys(cameras.values(), reader.codec(group))
        self._decoders: dict[str, Decoder] = {}
        self._encoded: dict[str, dict[int, Any]] = {}
        self._observations: list[tuple[Observation, dict[str, tuple[str, int]]]] = []
        self._images: list[dict[str, UInt8]] = []
        self._chunks: list[ActionChunk] = []
        self._steps: list[Any] = []
        self._ticks: list[ControlTick] = []
        self._events: list[SafetyEvent] = []

    def take(self, item: Item) -> None:
        body = item.body
        if item.topic in self._codecs:
            self._image(item)
        elif item.topic == fmt.OBSERVATION:
            self._observation(body)
        elif item.topic == fmt.CHUNK:
            shape = (body.steps, body.dims)
            self._chunks.append(
                ActionChunk(
                    actions=np.array(body.actions, np.float32).reshape(shape),
                    tokens=np.array(body.tokens, np.int64).reshape(shape) if body.has_tokens else None,
                    log_prob=np.array(body.log_prob, np.float32).reshape(shape) if body.has_log_prob else None,
                    adapter_id=body.adapter_id,
                    temperature=body.temperature,
                    observation_stamp=body.observation_stamp,
                    observation_sequence=body.observation_sequence,
                )
            )
        elif item.topic == fmt.STEP:
            self._steps.append(body)
        elif item.topic == fmt.TICK:
            self._ticks.append(tick_of(body))
        elif item.topic == fmt.EVENT:
            fields = ("stamp", "code", "message", "dim", "value", "limit", "latched")
            self._events.append(SafetyEvent(**{name: getattr(body, name) for name in fields}))

    def episode(self, ending: EpisodeEnding | None) -> Episode:
        info = self._reader.info
        meta = dict(info.meta)
        steps, lost = self._make_steps(ending)
        recording: dict[str, Any] = {}
        if lost:
            recording["steps_without_frames"] = lost
        if ending is None or ending.recovered:
            recording["cut_off"] = True
        if ending is not None and ending.dropped:
            recording["dropped"] = ending.dropped
        if recording:
            meta["recording"] = recording
        return Episode(
            task=info.task,
            instruction=info.instruction,
            steps=steps,
            success=ending.success if ending else None,
            success_source=ending.success_source if ending else "",
            initial_state=info.initial_state,
            seed=info.seed,
            adapter_id=info.adapter_id,
            meta=meta,
            ticks=self._ticks,
            events=self._events,
        )

    def _image(self, item: Item) -> None:
        if item.topic not in self._decoders:
            self._decoders[item.topic] = Decoder(self._codecs[item.topic], str(self._reader.path))
        kept = self._encoded.setdefault(item.topic, {})
        if self._codecs[item.topic] == "h264":  # depends on the frames before
            kept[item.index] = decode_frame(self._decoders[item.topic], item.body)
        else:
            kept[item.index] = item.body
        # An observation comes after its frames; older ones are nobody's any more.
        kept.pop(item.index - KEEP, None)

    def _observation(self, body: Any) -> None:
        images, lost = {}, False
        for camera, topic, index in zip(body.cameras, body.topics, body.frames, strict=True):
            if not self._want:
                lost |= index < 0
                continue
            found = self._encoded.get(topic, {}).get(index)
            if found is None:
                lost = True
            else:
                is_image = isinstance(found, np.ndarray)
                images[camera] = found if is_image else decode_frame(self._decoders[topic], found)
        seen = Observation(
            images=images,
            state=split_state(body),
            instruction=body.instruction,
            stamp=body.stamp,
            sequence=body.sequence,
        )
        self._observations.append((seen, {"lost": ("", 0)} if lost else {}))

    def _make_steps(self, ending: EpisodeEnding | None) -> tuple[list[Step], int]:
        steps, lost, told = [], 0, set()
        for body in self._steps:
            seen, missing = self._observations[body.observation]
            told.add(body.chunk)
            if missing:
                lost += 1
                continue
            steps.append(
                Step(
                    observation=seen,
                    chunk=self._chunks[body.chunk],
                    executed=np.array(body.executed, np.bool_),
                    reward=body.reward,
                    done=body.done,
                    steps_run=body.steps_run,
                )
            )
        for index, chunk in enumerate(self._chunks):
            if index in told:
                continue  # what follows was cut off before anybody told what became of the chunk: the ticks know
            derived = self._derive(chunk)
            if derived is None:
                lost += 1
            else:
                steps.append(derived)
        return steps, lost

    def _derive(self, chunk: ActionChunk) -> Step | None:
        sequence = chunk.observation_sequence
        seen = next((s for s, missing in self._observations if s.sequence == sequence and not missing), None)
        if seen is None:
            return None
        executed = np.zeros(len(chunk.actions), np.bool_)
        mine = [t for t in self._ticks if t.chunk_sequence == sequence]
        for tick in mine:
            executed[tick.chunk_offset] = tick.marks == Mark.NONE and tick.command is not None
        return Step(seen, chunk, executed, 0.0, False, len(mine))


KEEP = 64  # frames of one camera that an observation may look back to


def decode_frame(decoder: Decoder, body: Any) -> UInt8:
    return decoder.decode(bytes(body.data), getattr(body, "height", 0), getattr(body, "width", 0))


def tick_of(body: Any) -> ControlTick:
    return ControlTick(
        stamp=body.stamp,
        deadline=body.deadline,
        index=body.index,
        sampled=np.array(body.sampled, np.float32) if body.has_sampled else None,
        command=np.array(body.command, np.float32) if body.has_command else None,
        marks=Mark(body.marks),
        chunk_sequence=body.chunk_sequence,
        chunk_offset=body.chunk_offset,
        adapter_id=body.adapter_id,
        state=split_state(body),
    )


def split_state(body: Any) -> dict[str, Float32]:
    values = np.array(body.state, np.float32)
    ends = np.cumsum(body.state_sizes, dtype=int)
    return {
        name: values[end - size : end].copy()
        for name, size, end in zip(body.state_names, body.state_sizes, ends, strict=True)
    }
