"""The journal is the learner's memory: what it says happened, happened, also after a crash at any byte.

Pinned: round trip, cuts in the last line, damage anywhere else refused, the clock without influence, a full disk that
leaves no half line, one process at a time. Deterministic: files in a temporary folder, no clock, no threads.
"""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.files import Files
from ratchet_vla.storage.journal import START, Journal, read


def written(path: Path, count: int = 3) -> list[str]:
    journal = Journal(path)
    for n in range(count):
        journal.append("event", number=n, text=f"line {n}")
    journal.close()
    return [e.hash for e in journal.events]


def test_what_was_appended_is_read_again(tmp_path: Path) -> None:
    hashes = written(tmp_path / "j.jsonl")
    journal = Journal(tmp_path / "j.jsonl")
    assert [e.hash for e in journal.events] == hashes
    assert [e.data["number"] for e in journal.of("event")] == [0, 1, 2]
    assert journal.append("other").n == 4
    journal.close()


def test_a_cut_last_line_never_happened(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    hashes = written(path)
    full_bytes = path.read_bytes()
    start = full_bytes[:-1].rindex(b"\n") + 1
    for cut in (start, start + 1, (start + len(full_bytes)) // 2, len(full_bytes) - 2, len(full_bytes) - 1):
        path.write_bytes(full_bytes[:cut])
        journal = Journal(path)
        assert [e.hash for e in journal.events] == hashes[:2]
        event = journal.append("event", number=2, text="line 2")
        assert event.hash == hashes[2]
        journal.close()
        assert [e.hash for e in read(path)] == hashes


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    written(path)
    full_bytes = path.read_bytes()
    end = full_bytes.index(b"\n") + 1
    for offset in (full_bytes.index(b"1"), full_bytes.index(b"line 0"), end - 5):  # its number, its data, its hash
        changed = bytearray(full_bytes)
        changed[offset] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(RatchetError, match=r"link\.journal_damaged"):
            Journal(path)
    path.write_bytes(full_bytes[end:])
    with pytest.raises(RatchetError, match=r"link\.journal_damaged"):
        Journal(path)
    lines = full_bytes.splitlines(keepends=True)
    path.write_bytes(lines[1] + lines[0] + lines[2])
    with pytest.raises(RatchetError, match=r"link\.journal_damaged"):
        Journal(path)


def test_a_clock_that_jumps_does_not_change_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = written(tmp_path / "a.jsonl")
    monkeypatch.setattr(time, "time", lambda: -1e9)
    assert written(tmp_path / "b.jsonl") == hashes


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    class Full(Files):
        left = 2

        def step(self, call: str, path: Path) -> None:
            if call == "fsync" and path.is_file():
                self.left -= 1
                if self.left == 0:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))

    path = tmp_path / "j.jsonl"
    journal = Journal(path, Full())
    journal.append("event", number=0)
    with pytest.raises(RatchetError, match=r"link\.disk_full"):
        journal.append("event", number=1)
    assert len(journal.events) == 1
    journal.append("event", number=1)
    journal.close()
    assert [e.data["number"] for e in read(path)] == [0, 1]


def test_two_processes_cannot_write_one_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.head == START
    with pytest.raises(RatchetError, match=r"link\.journal_busy"):
        Journal(tmp_path / "j.jsonl")
    journal.close()
    Journal(tmp_path / "j.jsonl").close()
