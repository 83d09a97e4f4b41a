"""Artifact server of the link: the files of an adapter store, read in pieces.

Knows the files of a stored adapter. Knows no message; which adapter a robot should have is somebody else's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ratchet_vla.adapters.peft_format import CONFIG, WEIGHTS
from ratchet_vla.adapters.store.folder import CARD, FolderStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.disk import disk_errors
from ratchet_vla.storage.documents import hash_file

FILES = (WEIGHTS, CONFIG, CARD)


class ArtifactServer:
    """`server.ArtifactSource` over a `FolderStore`."""

    def __init__(self, store: FolderStore) -> None:
        self._store = store
        self._weights: dict[str, str] = {}  # adapter -> hash of its weights file, which never changes

    def files(self, adapter: str) -> list[dict[str, Any]]:
        file_list = []
        with disk_errors(self._store.root):
            for file_name in FILES:
                file_path = self._path(adapter, file_name)
                sha = self._weights.get(adapter) if file_name == WEIGHTS else None
                sha = sha or hash_file(file_path)
                if file_name == WEIGHTS:
                    self._weights[adapter] = sha
                file_list.append({"name": file_name, "size": file_path.stat().st_size, "sha": sha})
        return file_list

    def read(self, adapter: str, name: str, offset: int, size: int) -> bytes:
        """Bytes of one file, fewer at its end. Raises RatchetError adapter.unknown, link.io."""
        with disk_errors(self._store.root), self._path(adapter, name).open("rb") as adapter_file:
            adapter_file.seek(offset)
            return adapter_file.read(size)

    def _path(self, adapter: str, name: str) -> Path:
        file_path = self._store.root / "objects" / adapter / name
        if name not in FILES or not file_path.is_file():
            raise RatchetError("adapter.unknown", f"no file {name} of adapter {adapter[:12]}", fix="ask for the state")
        return file_path
