"""A file that only grows, knows its own hash, and is whole on the disk when it gets its final name.

Knows POSIX: exclusive creation, fsync, rename, advisory locks. Knows nothing of episodes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.disk import DiskWording
from ratchet_vla.storage.documents import PIECE, sync_folder


class GrowingFile:
    """A new file under a scratch name, locked while this process lives; `finish` gives it its final name."""

    def __init__(self, scratch: Path, final: Path) -> None:
        self.scratch = scratch
        self.final = final
        self._hash = hashlib.sha256()
        self._size = 0
        self._descriptor = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        # Held until the process dies: `in_use` tells a recording in progress from one that a crash left behind.
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        sync_folder(scratch.parent)

    def write(self, data: bytes) -> int:
        """Append bytes; returns how many, all of them."""
        remaining = memoryview(data)
        while remaining:
            # os.write may take fewer bytes than it was given; hash and size count what the disk has.
            written_bytes = os.write(self._descriptor, remaining[:PIECE])
            self._hash.update(remaining[:written_bytes])
            self._size += written_bytes
            remaining = remaining[written_bytes:]
        return len(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Nothing waits in this process; see `sync` for the disk."""

    def sync(self) -> None:
        """On the disk when this returns."""
        os.fsync(self._descriptor)

    def hexdigest(self) -> str:
        """SHA-256 of everything written so far."""
        return self._hash.hexdigest()

    def finish(self) -> None:
        """Whole on the disk under its final name when this returns; an existing file there is never replaced."""
        self.sync()
        # A rename would replace an existing file silently; a link fails on one.
        os.link(self.scratch, self.final)
        sync_folder(self.final.parent)
        os.unlink(self.scratch)
        self.close()

    def close(self) -> None:
        """Leave the file as it is; safe to call more than once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        """Remove the unfinished file."""
        self.scratch.unlink(missing_ok=True)
        self.close()


def in_use(path: Path) -> bool:
    """Whether a living process holds the lock of an unfinished file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return True
        raise
    else:
        return False
    finally:
        os.close(descriptor)


EPISODE_DISK = DiskWording(
    full_code="episode.disk_full",
    full_what="no space left",
    full_fix="free space; finished episodes are unharmed",
    io_code="episode.io",
    io_fix="check that the folder is writable",
)


@contextmanager
def disk_refusals(where: Path) -> Iterator[None]:
    """Turn the operating system's refusals into coded ones: as `disk_errors`, and episode.exists."""
    try:
        yield
    except FileExistsError as error:
        raise RatchetError(
            "episode.exists", "there is a file already", where=str(where), fix="episodes are never overwritten"
        ) from error
    except OSError as error:
        raise EPISODE_DISK.coded(error, str(where)) from error
