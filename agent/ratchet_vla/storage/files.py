"""Durable file operations: every one either happened and survives a power cut, or did not.

Knows POSIX: exclusive creation, fsync of files and folders, rename, advisory locks. Knows nothing of adapters.
Each system call is announced to `step` first, where the tests fail it or kill the process.
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

PIECE = 1 << 20  # bytes per write call


class Files:
    """The file system as the store uses it."""

    def step(self, call: str, path: Path) -> None:
        """Called before each system call that changes something; does nothing outside tests."""

    def folder(self, path: Path) -> None:
        self.step("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path, data: bytes) -> None:
        """A new file with this content, on the disk when this returns."""
        self._write(path, data, os.O_CREAT | os.O_EXCL | os.O_WRONLY)

    def append(self, path: Path, data: bytes) -> None:
        """Add to the end of a file (created if need be), on the disk when this returns."""
        self._write(path, data, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def truncate(self, path: Path, size: int) -> None:
        self.step("truncate", path)
        os.truncate(path, size)

    def rename(self, source: Path, target: Path) -> None:
        """Atomic: readers see the old target or the new one; on the disk when this returns."""
        self.step("rename", target)
        os.rename(source, target)
        self.sync_folder(target.parent)

    # A rename or a new name is durable only when its folder was synced too; syncing the file alone does not do that.
    def sync_folder(self, path: Path) -> None:
        self.step("fsync", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        self.step("remove", path)
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()

    @contextmanager
    def lock(self, path: Path, exclusive: bool = True) -> Iterator[None]:
        """Advisory lock across threads and processes, released by the kernel when the holder dies."""
        # Closing the descriptor releases the lock; the lock file itself stays, because removing it would race with
        # the next holder.
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)

    # Every write is announced in pieces of PIECE bytes, so that a test can kill the process between two of them.
    def _write(self, path: Path, data: bytes, flags: int) -> None:
        self.step("open", path)
        descriptor = os.open(path, flags, 0o644)
        try:
            # os.write may take fewer bytes than it was given; the view moves on without a copy.
            remaining = memoryview(data)
            while remaining:
                self.step("write", path)
                remaining = remaining[os.write(descriptor, remaining[:PIECE]) :]
            self.step("fsync", path)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn OSError into RatchetError: adapter.disk_full where no space is left, adapter.store_io otherwise."""
    try:
        yield
    except OSError as error:
        error_path = str(error.filename or root)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RatchetError(
                "adapter.disk_full",
                "no space left; nothing was stored and the store is unharmed",
                where=error_path,
                fix="free space on that disk, or remove untagged adapters, and store it again",
            ) from error
        raise RatchetError(
            "adapter.store_io",
            error.strerror or str(error),
            where=error_path,
            fix="check that the store's folder exists and is writable",
        ) from error
