"""What the link's two folders share: coded disk errors, free space, hashing and the one-process lock.

Knows POSIX. Knows neither messages nor what the files hold.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.errors import RatchetError

PIECE = 1 << 20  # bytes per read


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn the operating system's refusals into coded ones: link.disk_full, link.io."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or root)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RatchetError(
                "link.disk_full", "no space left; nothing was accepted", where=where, fix="free space on that disk"
            ) from error
        raise RatchetError(
            "link.io", error.strerror or str(error), where=where, fix="check that the folder exists and is writable"
        ) from error


def require_space(folder: Path, size: int, reserve: int) -> None:
    """Refuse what would leave less than `reserve` bytes free.

    Raises:
        RatchetError: link.disk_full.
    """
    free = shutil.disk_usage(folder).free
    if free - size < reserve:
        raise RatchetError(
            "link.disk_full",
            f"{size} bytes would leave less than the {reserve} bytes that stay free ({free} free now)",
            where=str(folder),
            fix="free space on that disk",
        )


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            sha.update(piece)
    return sha.hexdigest()


def hold(path: Path) -> int:
    """Lock a folder for this process; the kernel releases it when the process dies. Returns the descriptor.

    Raises:
        RatchetError: link.journal_busy.
    """
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise RatchetError(
            "link.journal_busy",
            "another process uses this folder",
            where=str(path.parent),
            fix="stop it, or give this one a folder of its own",
        ) from None
    return handle
