"""Reading episodes: what a file says about itself, its records, and whole episodes as they were written.

Knows finished and cut-off files; a cut-off one is read up to its last whole chunk. Changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mcap.exceptions import McapError
from mcap.records import Channel, DataEnd, Message, Metadata, Schema
from mcap.stream_reader import StreamReader
from mcap_ros2.decoder import DecoderFactory
from zstandard import ZstdError

from ratchet_vla.episodes.file import format as fmt
from ratchet_vla.episodes.file.assembly import Assembly, decode_frame
from ratchet_vla.episodes.file.format import Codec, EpisodeEnding, EpisodeInfo
from ratchet_vla.episodes.file.frames import Decoder
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Episode, UInt8
from ratchet_vla.storage.documents import hash_file

__all__ = ["EpisodeReader", "Item", "read_episode"]

RECORD_TOPICS = (fmt.OBSERVATION, fmt.CHUNK, fmt.STEP, fmt.TICK, fmt.EVENT)  # everything that is no image and no plot
RECORD_LIMIT = 1 << 30
# What the libraries raise on bytes that are cut off or changed.
TORN_ERRORS = (McapError, ZstdError, struct.error, ValueError, LookupError, TypeError, EOFError, MemoryError)


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
        """Raises RatchetError episode.missing, episode.damaged, episode.not_an_episode, episode.unknown_format."""
        self.path = Path(path)
        self._cut_off = cut_off
        if not self.path.is_file():
            raise RatchetError(
                "episode.missing",
                "no such episode file",
                where=str(path),
                fix="restore it from a copy; where there is none, `ratchet episodes judge discard ID` leaves it out",
            )
        self.info: EpisodeInfo = self._begin()

    @property
    def id(self) -> str:
        """SHA-256 of the file's content."""
        return hash_file(self.path)

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
        """How the frames of a group are kept. group: "stream" or "decisions"."""
        return cast(Codec, self.info.stream if group == "stream" else self.info.decisions)

    def topic(self, camera: str, group: str = "stream") -> str:
        """Raises RatchetError episode.no_camera."""
        topic_by_camera = self.info.topics.get(group, {})
        if camera not in topic_by_camera:
            raise RatchetError(
                "episode.no_camera",
                f"no camera {camera!r} in this episode",
                where=str(self.path),
                fix=f"cameras: {', '.join(topic_by_camera) or 'none'}",
            )
        return topic_by_camera[camera]

    def stamp(self, item: Item) -> float:
        """Seconds on the robot's clock, to the nanosecond of the message."""
        return item.time / 1e9 - self.info.clock_offset

    def episode(self, images: bool = True) -> Episode:
        """The whole episode. images: False leaves every `Observation.images` empty.

        Steps whose frames were lost while recording are left out. `meta` is what was given, and under "recording"
        what happened to the file, where anything did.
        """
        scan = _Scan()
        assembly = Assembly(self.info, {group: self.codec(group) for group in self.info.topics}, str(self.path), images)
        topics = [topic for group in self.info.topics.values() for topic in group.values()] if images else []
        for item in self._pass(scan, [*RECORD_TOPICS, *topics]):
            assembly.take(item.topic, item.index, item.body)
        return assembly.episode(scan.ending)

    # -- inside -------------------------------------------------------------------------------------------------

    def _begin(self) -> EpisodeInfo:
        """What the file says about itself; stands before its first message."""
        scan = _Scan()
        try:
            with self.path.open("rb") as file:
                reader = StreamReader(file, validate_crcs=True, record_size_limit=RECORD_LIMIT)
                for record in reader.records:
                    if isinstance(record, Metadata):
                        self._metadata(record, scan)
                    if scan.info is not None:
                        return scan.info
                    if isinstance(record, Message):
                        break
        except TORN_ERRORS as error:
            raise self._damaged(_torn(error)) from None
        raise RatchetError(
            "episode.not_an_episode",
            "an MCAP file of another recorder",
            where=str(self.path),
            fix="`ratchet episodes list --store FOLDER` tells what a folder holds",
        )

    def _pass(self, scan: _Scan, topics: Iterable[str] | None) -> Iterator[Item]:
        wanted_topics = None if topics is None else set(topics)
        schemas: dict[int, Schema] = {}
        channels: dict[int, Channel] = {}
        decoders = DecoderFactory()
        reached_end = False
        try:
            with self.path.open("rb") as file:
                reader = StreamReader(file, validate_crcs=True, record_size_limit=RECORD_LIMIT)
                for record in reader.records:
                    if isinstance(record, Metadata):
                        self._metadata(record, scan)
                    elif isinstance(record, Schema):
                        schemas[record.id] = record
                    elif isinstance(record, Channel):
                        channels[record.id] = record
                    elif isinstance(record, DataEnd):
                        reached_end = True
                    elif isinstance(record, Message):
                        channel = channels[record.channel_id]
                        index = scan.counts.get(channel.topic, 0)
                        scan.counts[channel.topic] = index + 1
                        if wanted_topics is None or channel.topic in wanted_topics:
                            decode = decoders.decoder_for(channel.message_encoding, schemas[channel.schema_id])
                            if decode is not None:
                                yield Item(channel.topic, index, record.log_time, decode(record.data))
        except TORN_ERRORS as error:
            scan.torn = _torn(error)
        if not reached_end and not scan.torn:
            scan.torn = "the file ends early"
        if not self._cut_off and (scan.torn or scan.ending is None):
            raise self._damaged(scan.torn or "it was never finished")

    def _metadata(self, record: Metadata, scan: _Scan) -> None:
        if record.name == fmt.BEGIN_RECORD:
            scan.info = EpisodeInfo.from_record(record.metadata, str(self.path))
        elif record.name == fmt.END_RECORD:
            scan.ending = EpisodeEnding.from_record(record.metadata, str(self.path))

    def _damaged(self, problem: str) -> RatchetError:
        fix = "restore the file from a copy; where there is none, `ratchet episodes judge discard ID` leaves it out"
        if self.path.name.endswith(fmt.OPEN_SUFFIX):
            fix = "finish it with `ratchet episodes verify --recover`"
        return RatchetError(
            "episode.damaged",
            problem,
            where=str(self.path),
            fix=fix,
        )


def _torn(error: Exception) -> str:
    return f"it can't be read to its end ({str(error) or type(error).__name__})"


def read_episode(path: Path | str, *, images: bool = True) -> Episode:
    """A finished episode as it was written; frames bit by bit where they were recorded raw or as PNG.

    Raises:
        RatchetError: episode.missing, episode.damaged, episode.unknown_format, episode.bad_frame.
    """
    return EpisodeReader(path).episode(images)
