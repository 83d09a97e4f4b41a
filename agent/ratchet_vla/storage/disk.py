"""What every store on a disk needs: coded disk errors, free space, and locks among threads and processes.

Knows POSIX. Knows neither messages nor what the files hold.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ratchet_vla.errors import RatchetError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class DiskWording:
    """How one kind of store words the operating system's errors.

    full_code, full_what, full_fix: no space is left. io_code, io_fix: anything else, in the system's own words.
    """

    full_code: str
    full_what: str
    full_fix: str
    io_code: str
    io_fix: str

    def coded(self, error: OSError, where: str) -> RatchetError:
        """Return the error as the user sees it."""
        if error.errno in _NO_SPACE:
            return RatchetError(self.full_code, self.full_what, where=where, fix=self.full_fix)
        return RatchetError(self.io_code, error.strerror or str(error), where=where, fix=self.io_fix)


LINK_DISK = DiskWording(
    full_code="link.disk_full",
    full_what="no space left; nothing was accepted",
    full_fix="free space on that disk",
    io_code="link.io",
    io_fix="check that the folder exists and is writable",
)


@contextmanager
def disk_errors(root: Path, wording: DiskWording = LINK_DISK) -> Iterator[None]:
    """Turn OSError into RatchetError, with the codes of a box or journal of the link unless another store is named."""
    try:
        yield
    except OSError as error:
        raise wording.coded(error, str(error.filename or root)) from error


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


@contextmanager
def locked(lock_path: Path, exclusive: bool = True) -> Iterator[None]:
    """Wait for an advisory lock across threads and processes; the kernel releases it when the holder dies."""
    # Closing the descriptor releases the lock; the lock file itself stays, because removing it would race with the
    # next holder.
    descriptor = os.open(lock_path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)
