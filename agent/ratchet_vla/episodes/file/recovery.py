"""Files that were being written when the recorder or the power died: made whole up to their last flush.

Knows unfinished files only. A recovered episode is a new, finished file; the remains are removed after it is safe.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from mcap.records import Channel, Chunk, Message, Metadata, Schema
from mcap.stream_reader import StreamReader, breakup_chunk
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from mcap_ros2.decoder import DecoderFactory

from ratchet_vla.episodes.file import format as fmt
from ratchet_vla.episodes.file.format import EpisodeEnding, EpisodeInfo
from ratchet_vla.episodes.file.reader import RECORD_LIMIT, TORN_ERRORS, EpisodeReader
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Mark
from ratchet_vla.storage.growing import GrowingFile, disk_refusals, in_use


@dataclass(frozen=True)
class Recovered:
    """What became of one unfinished file. path, id: the finished one, None where nothing of worth was in it.

    lost_bytes: behind the last whole chunk. seconds: how long it took.
    """

    remains: Path
    path: Path | None
    id: str | None
    lost_bytes: int
    seconds: float


def unfinished(folder: Path) -> Iterator[Path]:
    """Every unfinished file below `folder` whose writer is dead, oldest first."""
    for path in sorted(folder.rglob(f"*{fmt.OPEN_SUFFIX}"), key=lambda candidate: candidate.stat().st_mtime):
        if path.exists() and not in_use(path):
            yield path


def recover(remains: Path) -> Recovered:
    """Finish one file; the same file may be recovered again after a crash in here.

    Raises:
        RatchetError: episode.in_use while its recorder lives; episode.not_an_episode, episode.unknown_format;
            episode.disk_full, episode.io.
    """
    began_s = time.monotonic()
    if in_use(remains):
        raise RatchetError("episode.in_use", "it is still being recorded", where=str(remains), fix="stop the recorder")
    finished = remains.with_name(remains.name.removesuffix(".open"))
    size_bytes = remains.stat().st_size
    if finished.exists():
        # The link to the final name was made and the crash came before the scratch name was removed.
        if finished.samefile(remains):
            remains.unlink()
            return Recovered(remains, finished, None, 0, time.monotonic() - began_s)
        raise RatchetError("episode.exists", "a finished file has its name", where=str(finished), fix="move one away")
    try:
        info = EpisodeReader(remains, cut_off=True).info
    except RatchetError as error:
        if error.code != "episode.damaged":
            raise
        # Nothing had reached the disk, not even what the file is.
        remains.unlink()
        return Recovered(remains, None, None, size_bytes, time.monotonic() - began_s)
    scratch = finished.with_name(f".{finished.name}.recovering")
    scratch.unlink(missing_ok=True)
    with disk_refusals(scratch):
        growing = GrowingFile(scratch, finished)
        try:
            lost_bytes = _copy(remains, growing, info, size_bytes)
            digest = growing.hexdigest()
            growing.finish()
        except BaseException:
            growing.discard()
            raise
        remains.unlink()
    return Recovered(remains, finished, digest, lost_bytes, time.monotonic() - began_s)


def _copy(remains: Path, file: GrowingFile, info: EpisodeInfo, size_bytes: int) -> int:
    """Write every whole record of the remains into a finished file; returns how many bytes were behind them."""
    compression = CompressionType.ZSTD if "raw" in (info.stream, info.decisions) else CompressionType.NONE
    writer: Any = McapWriter(cast("IO[bytes]", file), compression=compression, chunk_size=4 << 20)
    writer.start(profile="ros2", library="ratchet")
    writer.add_metadata(fmt.BEGIN_RECORD, info.to_record())
    schemas: dict[int, Schema] = {}
    channels: dict[int, Channel] = {}
    new_channels: dict[int, int] = {}  # channel id there -> here
    counts: Counter[str] = Counter()
    decoders = DecoderFactory()
    ending_record: EpisodeEnding | None = None
    human_ticks = 0
    first_ns = 0
    last_ns = 0
    whole_bytes = 0
    with remains.open("rb") as stream:
        reader = StreamReader(stream, emit_chunks=True, record_size_limit=RECORD_LIMIT)
        try:
            for top_record in reader.records:
                if isinstance(top_record, Metadata) and top_record.name == fmt.END_RECORD:
                    ending_record = EpisodeEnding.from_record(top_record.metadata, str(remains))
                for record in breakup_chunk(top_record, validate_crc=True) if isinstance(top_record, Chunk) else ():
                    if isinstance(record, Schema):
                        schemas[record.id] = record
                    elif isinstance(record, Channel):
                        channels[record.id] = record
                    elif isinstance(record, Message):
                        channel = channels[record.channel_id]
                        schema = schemas[channels[record.channel_id].schema_id]
                        if channel.id not in new_channels:
                            schema_id = writer.register_schema(schema.name, schema.encoding, schema.data)
                            new_channels[channel.id] = writer.register_channel(
                                channel.topic, channel.message_encoding, schema_id
                            )
                        message_fields = (record.log_time, record.data, record.publish_time, record.sequence)
                        writer.add_message(new_channels[channel.id], *message_fields)
                        counts[channel.topic] += 1
                        first_ns = min(first_ns or record.log_time, record.log_time)
                        last_ns = max(last_ns, record.log_time)
                        decode = decoders.decoder_for("cdr", schema) if channel.topic == fmt.TICK else None
                        human_ticks += decode is not None and bool(decode(record.data).marks & Mark.HUMAN)
                whole_bytes = stream.tell()
        except TORN_ERRORS:
            pass  # the end that was torn off is what `lost_bytes` tells
    topics = {topic for group in info.topics.values() for topic in group.values()}
    ending = ending_record or EpisodeEnding(
        success=None,
        success_source="",
        reason="cut_off",
        ended=info.created,
        seconds=(last_ns - first_ns) / 1e9,
        steps=counts[fmt.STEP],
        ticks=counts[fmt.TICK],
        human_ticks=human_ticks,
        events=counts[fmt.EVENT],
        frames={topic: count for topic, count in sorted(counts.items()) if topic in topics},
    )
    writer.flush()
    lost_bytes = size_bytes - whole_bytes if ending_record is None else 0
    writer.add_metadata(fmt.END_RECORD, dataclasses.replace(ending, recovered=True, lost_bytes=lost_bytes).to_record())
    writer.finish()
    return lost_bytes
