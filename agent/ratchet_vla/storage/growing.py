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
from ratchet_vla.storage.documents import sync_folder

PIECE = 1 << 20


class GrowingFile:
    """A new file under a scratch name, locked while this process lives; `finish` gives it its final name."""

    def __init__(self, scratch: Path, final: Path) -> None:
        self.scratch, self.final = scratch, final
        self._hash = hashlib.sha256()
        self._size = 0
        self._descriptor = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        sync_folder(scratch.parent)

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            done = os.write(self._descriptor, view[:PIECE])
            self._hash.update(view[:done])
            self._size += done
            view = view[done:]
        return len(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing waits in this process; see `sync` for the disk."""

    def sync(self) -> None:
        """On the disk when this returns."""
        os.fsync(self._descriptor)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def finish(self) -> None:
        """Whole on the disk under its final name when this returns; an existing file there is never replaced."""
        self.sync()
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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Exclusive among threads and processes; the kernel frees it when the holder dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def disk_refusals(where: Path) -> Iterator[None]:
    """Turn the operating system's refusals into coded ones."""
    try:
        yield
    except FileExistsError as error:
        raise RatchetError(
            "episode.exists", "there is a file already", where=str(where), fix="episodes are never overwritten"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RatchetError(
                "episode.disk_full",
                "no space left",
                where=str(where),
                fix="free space; finished episodes are unharmed",
            ) from error
        raise RatchetError(
            "episode.io", error.strerror or str(error), where=str(where), fix="check that the folder is writable"
        ) from error
