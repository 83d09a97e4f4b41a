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
from ratchet_vla.episodes.file.reader import RECORD_LIMIT, TORN, EpisodeReader
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
    for path in sorted(folder.rglob(f"*{fmt.OPEN_SUFFIX}"), key=lambda p: p.stat().st_mtime):
        if path.exists() and not in_use(path):
            yield path


def recover(remains: Path) -> Recovered:
    """Finish one file; the same file may be recovered again after a crash in here.

    Raises:
        RatchetError: episode.in_use while its recorder lives; episode.not_an_episode, episode.unknown_format;
            episode.disk_full, episode.io.
    """
    began = time.monotonic()
    if in_use(remains):
        raise RatchetError("episode.in_use", "it is still being recorded", where=str(remains), fix="stop the recorder")
    final = remains.with_name(remains.name.removesuffix(".open"))
    size = remains.stat().st_size
    if final.exists():
        # The link to the final name was made and the crash came before the scratch name was removed.
        if final.samefile(remains):
            remains.unlink()
            return Recovered(remains, final, None, 0, time.monotonic() - began)
        raise RatchetError("episode.exists", "a finished file has its name", where=str(final), fix="move one away")
    try:
        info = EpisodeReader(remains, cut_off=True).info
    except RatchetError as error:
        if error.code != "episode.damaged":
            raise
        # Nothing had reached the disk, not even what the file is.
        remains.unlink()
        return Recovered(remains, None, None, size, time.monotonic() - began)
    scratch = final.with_name(f".{final.name}.recovering")
    scratch.unlink(missing_ok=True)
    with disk_refusals(scratch):
        file = GrowingFile(scratch, final)
        try:
            lost = _copy(remains, file, info, size)
            digest = file.hexdigest()
            file.finish()
        except BaseException:
            file.discard()
            raise
        remains.unlink()
    return Recovered(remains, final, digest, lost, time.monotonic() - began)


def _copy(remains: Path, file: GrowingFile, info: EpisodeInfo, size: int) -> int:
    """Write every whole record of the remains into a finished file; returns how many bytes were behind them."""
    compression = CompressionType.ZSTD if "raw" in (info.stream, info.decisions) else CompressionType.NONE
    writer: Any = McapWriter(cast("IO[bytes]", file), compression=compression, chunk_size=4 << 20)
    writer.start(profile="ros2", library="ratchet")
    writer.add_metadata(fmt.BEGIN_RECORD, info.to_record())
    schemas: dict[int, Schema] = {}
    channels: dict[int, Channel] = {}
    named: dict[int, int] = {}  # channel id there -> here
    counts: Counter[str] = Counter()
    decoders = DecoderFactory()
    told: EpisodeEnding | None = None
    human, first, last, good = 0, 0, 0, 0
    with remains.open("rb") as stream:
        reader = StreamReader(stream, emit_chunks=True, record_size_limit=RECORD_LIMIT)
        try:
            for outer in reader.records:
                if isinstance(outer, Metadata) and outer.name == fmt.END_RECORD:
                    told = EpisodeEnding.from_record(outer.metadata, str(remains))
                for record in breakup_chunk(outer, validate_crc=True) if isinstance(outer, Chunk) else ():
                    if isinstance(record, Schema):
                        schemas[record.id] = record
                    elif isinstance(record, Channel):
                        channels[record.id] = record
                    elif isinstance(record, Message):
                        channel, schema = channels[record.channel_id], schemas[channels[record.channel_id].schema_id]
                        if channel.id not in named:
                            here = writer.register_schema(schema.name, schema.encoding, schema.data)
                            named[channel.id] = writer.register_channel(channel.topic, channel.message_encoding, here)
                        times = (record.log_time, record.data, record.publish_time, record.sequence)
                        writer.add_message(named[channel.id], *times)
                        counts[channel.topic] += 1
                        first, last = min(first or record.log_time, record.log_time), max(last, record.log_time)
                        decode = decoders.decoder_for("cdr", schema) if channel.topic == fmt.TICK else None
                        human += decode is not None and bool(decode(record.data).marks & Mark.HUMAN)
                good = stream.tell()
        except TORN:
            pass  # the end that was torn off is what `lost_bytes` tells
    topics = {t for group in info.topics.values() for t in group.values()}
    ending = told or EpisodeEnding(
        success=None,
        success_source="",
        reason="cut_off",
        ended=info.created,
        seconds=(last - first) / 1e9,
        steps=counts[fmt.STEP],
        ticks=counts[fmt.TICK],
        human_ticks=human,
        events=counts[fmt.EVENT],
        frames={t: n for t, n in sorted(counts.items()) if t in topics},
    )
    writer.flush()
    lost = size - good if told is None else 0
    writer.add_metadata(fmt.END_RECORD, dataclasses.replace(ending, recovered=True, lost_bytes=lost).to_record())
    writer.finish()
    return lost
