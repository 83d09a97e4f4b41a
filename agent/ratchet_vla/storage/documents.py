"""Whole files replaced at once: a reader sees the old one or the new one, never half of it.

Knows POSIX: fsync, rename. Knows JSON. Where a file must outlive a power cut the writing is durable; a status page that
is written every second is not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

PIECE = 1 << 20  # bytes per read


@contextmanager
def replacing(path: Path, *, durable: bool = True, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write into; it becomes `path` when the block ends, and is gone if the block fails.

    durable: on the disk, name included, when the block has ended. scratch: where it is written meanwhile, in the same
    folder; by default one name per file, for a single writer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = scratch or path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        beside.rename(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a file by this text, UTF-8."""
    with replacing(path, durable=durable) as file:
        file.write(text.encode())


def write_json(
    path: Path,
    value: Any,
    *,
    indent: int | None = None,
    durable: bool = True,
    default: Callable[[Any], Any] | None = None,
) -> None:
    """Replace a file by a value as JSON and a line end. default: makes plain data of what JSON does not know."""
    write_text(path, json.dumps(value, indent=indent, default=default) + "\n", durable=durable)


def append_line(path: Path, text: str) -> None:
    """Add a line to the end of a file, on the disk when this returns."""
    with path.open("a") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the folder's names (files created, renamed, removed) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            sha.update(piece)
    return sha.hexdigest()
