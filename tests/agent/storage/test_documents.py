"""State files are read while they are written, by other processes and after a crash: half a file is a lost run.

Pinned: a file is exchanged whole or not at all, a failed write leaves the old file and nothing beside it, what is
called durable is synced before it gets its name and the name after it, and hashes are of the bytes. No clock, no
randomness.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from ratchet_vla.storage import documents


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of fsync (of a file or a folder) and rename happened, in order."""
    made: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        made.append("sync folder" if target.is_dir() else "sync file")
        fsync(descriptor)

    def noted_rename(self: Path, target: Path) -> Path:
        made.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    return made


def test_a_file_is_replaced_whole_and_synced_before_it_has_its_name(tmp_path: Path, calls: list[str]) -> None:
    path = tmp_path / "new" / "state.json"
    documents.write_json(path, {"a": 1}, indent=1)
    assert json.loads(path.read_text()) == {"a": 1}
    assert path.read_text().endswith("}\n")
    assert calls == ["sync file", "rename", "sync folder"]
    documents.write_text(path, "other")
    assert path.read_text() == "other"
    assert [p.name for p in path.parent.iterdir()] == ["state.json"]


def test_what_need_not_survive_a_power_cut_is_not_waited_for(tmp_path: Path, calls: list[str]) -> None:
    documents.write_json(tmp_path / "status.json", {}, durable=False)
    assert calls == ["rename"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with documents.replacing(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(TypeError):
        documents.write_json(path, {"not": object()})
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.bin"]


def test_a_reader_meanwhile_sees_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(b"old")
    with documents.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_lines_are_added_and_synced(tmp_path: Path, calls: list[str]) -> None:
    path = tmp_path / "log.jsonl"
    documents.append_line(path, "one")
    documents.append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"
    assert calls == ["sync file", "sync file"]


def test_a_hash_is_of_the_bytes_however_long(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    path = tmp_path / "data"
    path.write_bytes(data)
    assert documents.hash_file(path) == hashlib.sha256(data).hexdigest()
