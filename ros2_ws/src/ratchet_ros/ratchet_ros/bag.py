"""One episode's messages in one MCAP file that Foxglove and `ros2 bag` open: bytes as they came off the wire.

Knows MCAP and message definitions. Knows no node. Chunks are written as they fill, so a cut-off file is readable up to
the last one; a finished file appears under its final name only when it is complete and on disk.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from mcap.writer import CompressionType, Writer

from ratchet_ros import dds

CHUNK = 1 << 20
SEPARATOR = "=" * 80


def type_name(kind: type[Any]) -> str:
    """`sensor_msgs/msg/Image` for a message class."""
    package, part = kind.__module__.split(".")[:2]
    return f"{package}/{part}/{kind.__name__}"


def definition(name: str) -> str:
    """The .msg text of a type with those it is made of, in the layout that MCAP calls ros2msg."""
    parts, seen, todo = [], {name}, [name]
    while todo:
        current = todo.pop(0)
        package, _, stem = current.partition("/msg/")
        text = (dds.share(package) / "msg" / f"{stem}.msg").read_text()
        short = f"{package}/{stem}"
        parts.append(text if current == name else f"{SEPARATOR}\nMSG: {short}\n{text}")
        for line in text.splitlines():
            word = line.split("#")[0].strip().split(" ")[0].split("[")[0].split("<")[0]
            if "/" in word:
                found = word if "/msg/" in word else word.replace("/", "/msg/", 1)
            elif word[:1].isupper():
                found = f"{package}/msg/{word}"
            else:
                continue
            if found not in seen:
                seen.add(found)
                todo.append(found)
    return "\n".join(parts)


class Bag:
    """An MCAP file under way. Not thread-safe."""

    def __init__(self, path: Path, metadata: dict[str, dict[str, str]]) -> None:
        self.path, self._partial = path, path.with_suffix(".mcap.part")
        self._file: BinaryIO = self._partial.open("wb")
        self._writer = Writer(self._file, chunk_size=CHUNK, compression=CompressionType.ZSTD)
        self._writer.start(profile="ros2", library="ratchet")
        self._channels: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        for name, values in metadata.items():
            self._writer.add_metadata(name, values)

    def write(self, topic: str, kind: type[Any], data: bytes, stamp: int) -> None:
        """data: the serialised message; stamp: ns, when it was received."""
        if topic not in self._channels:
            name = type_name(kind)
            schema = self._writer.register_schema(name, "ros2msg", definition(name).encode())
            self._channels[topic] = self._writer.register_channel(topic, "cdr", schema)
        sequence = self._counts.get(topic, 0)
        self._counts[topic] = sequence + 1
        self._writer.add_message(self._channels[topic], stamp, data, stamp, sequence)

    def finish(self, metadata: dict[str, dict[str, str]]) -> Path:
        """Close, sync, rename; the final path."""
        for name, values in metadata.items():
            self._writer.add_metadata(name, values)
        self._writer.finish()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self.path)
        return self.path
