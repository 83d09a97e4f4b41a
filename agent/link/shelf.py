"""An adapter store as files to give out: what the learner's end of the link serves.

Knows the files of a stored adapter. Knows no message; which adapter a robot should have is somebody else's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.adapters.peft_format import CONFIG, WEIGHTS
from agent.adapters.store import CARD, FolderStore
from agent.errors import RatchetError
from agent.link.disk import disk_errors, hash_file

FILES = (WEIGHTS, CONFIG, CARD)


class AdapterShelf:
    """`server.Shelf` over a `FolderStore`."""

    def __init__(self, store: FolderStore) -> None:
        self._store = store
        self._weights: dict[str, str] = {}  # adapter -> hash of its weights file, which never changes

    def files(self, adapter: str) -> list[dict[str, Any]]:
        found = []
        with disk_errors(self._store.root):
            for name in FILES:
                path = self._path(adapter, name)
                sha = self._weights.get(adapter) if name == WEIGHTS else None
                sha = sha or hash_file(path)
                if name == WEIGHTS:
                    self._weights[adapter] = sha
                found.append({"name": name, "size": path.stat().st_size, "sha": sha})
        return found

    def read(self, adapter: str, name: str, offset: int, size: int) -> bytes:
        """Bytes of one file, fewer at its end. Raises RatchetError adapter.unknown, link.io."""
        with disk_errors(self._store.root), self._path(adapter, name).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _path(self, adapter: str, name: str) -> Path:
        path = self._store.root / "objects" / adapter / name
        if name not in FILES or not path.is_file():
            raise RatchetError("adapter.unknown", f"no file {name} of adapter {adapter[:12]}", fix="ask for the state")
        return path
