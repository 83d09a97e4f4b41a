"""Durable file operations: every one either happened and survives a power cut, or did not.

Knows POSIX: exclusive creation, fsync of files and folders, rename, advisory locks. Knows nothing of adapters.
Each system call is announced to `step` first, where the tests fail it or kill the process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ratchet_vla.storage.disk import DiskWording, locked
from ratchet_vla.storage.documents import sync_folder

PIECE = 1 << 20  # bytes per write call

ADAPTER_DISK = DiskWording(
    full_code="adapter.disk_full",
    full_what="no space left; nothing was stored and the store is unharmed",
    full_fix="free space on that disk, or remove untagged adapters, and store it again",
    io_code="adapter.store_io",
    io_fix="check that the store's folder exists and is writable",
)


class Files:
    """The file system as the store uses it."""

    def step(self, call: str, path: Path) -> None:
        """Called before each system call that changes something; does nothing outside tests."""

    def folder(self, path: Path) -> None:
        """Make a folder and those above it; one that exists is left as it is."""
        self.step("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path, data: bytes) -> None:
        """A new file with this content, on the disk when this returns."""
        self._write(path, data, os.O_CREAT | os.O_EXCL | os.O_WRONLY)

    def append(self, path: Path, data: bytes) -> None:
        """Add to the end of a file (created if need be), on the disk when this returns."""
        self._write(path, data, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def truncate(self, path: Path, size: int) -> None:
        """Cut a file to so many bytes."""
        self.step("truncate", path)
        os.truncate(path, size)

    def rename(self, source: Path, target: Path) -> None:
        """Atomic: readers see the old target or the new one; on the disk when this returns."""
        self.step("rename", target)
        os.rename(source, target)
        self.sync_folder(target.parent)

    # A rename or a new name is durable only when its folder was synced too; syncing the file alone does not do that.
    def sync_folder(self, path: Path) -> None:
        """Make the folder's names survive a power cut."""
        self.step("fsync", path)
        sync_folder(path)

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens where there is none."""
        self.step("remove", path)
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()

    @contextmanager
    def lock(self, path: Path, exclusive: bool = True) -> Iterator[None]:
        """Hold `disk.locked`; a method, so that the store names its file system only."""
        with locked(path, exclusive):
            yield

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
