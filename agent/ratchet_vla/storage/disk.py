"""Disk helpers of inbox and outbox: coded disk errors, free space and the one-process lock.

Knows POSIX. Knows neither messages nor what the files hold.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ratchet_vla.errors import RatchetError


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn OSError into RatchetError: link.disk_full where no space is left, link.io otherwise."""
    try:
        yield
    except OSError as error:
        error_path = str(error.filename or root)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RatchetError(
                "link.disk_full", "no space left; nothing was accepted", where=error_path, fix="free space on that disk"
            ) from error
        raise RatchetError(
            "link.io",
            error.strerror or str(error),
            where=error_path,
            fix="check that the folder exists and is writable",
        ) from error


def require_space(folder: Path, new_bytes: int, reserve_bytes: int) -> None:
    """Refuse what would leave less than `reserve_bytes` bytes free.

    Raises:
        RatchetError: link.disk_full.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes - new_bytes < reserve_bytes:
        raise RatchetError(
            "link.disk_full",
            f"{new_bytes} bytes would leave less than the {reserve_bytes} bytes that stay free ({free_bytes} free now)",
            where=str(folder),
            fix="free space on that disk",
        )


def hold(lock_path: Path) -> int:
    """Lock a folder for this process; the kernel releases it when the process dies. Returns the descriptor.

    Raises:
        RatchetError: link.journal_busy.
    """
    descriptor = os.open(lock_path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RatchetError(
            "link.journal_busy",
            "another process uses this folder",
            where=str(lock_path.parent),
            fix="stop it, or give this one a folder of its own",
        ) from None
    return descriptor
