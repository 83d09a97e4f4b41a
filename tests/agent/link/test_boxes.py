"""Outbox and inbox: what one accepted is never forgotten before the other has it on its disk, and never counted twice.

Pinned: a kill at every system call of `put`, `delivered` and of receiving leaves the same end; a full disk leaves no
trace; equal keys and equal contents count once; pieces may come doubled, early or after a restart; torn and changed
bytes are found. Deterministic: kills are an exception at a counted system call, then the folder is opened anew.
"""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from ratchet_vla.errors import RatchetError
from ratchet_vla.link.learner.inbox import Inbox, OfferedFile
from ratchet_vla.link.robot.outbox import Outbox, history
from ratchet_vla.storage.files import Files
from ratchet_vla.storage.journal import Journal


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs in this life."""


class Dying(Files):
    """Dies (or finds the disk full) at a system call."""

    def __init__(self, at: int, full: bool = False) -> None:
        self.left = at
        self.full = full

    def step(self, call: str, path: Path) -> None:
        self.left -= 1
        if self.left == 0:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            raise Killed


CONTENT = bytes(range(256)) * 8
SHA = hashlib.sha256(CONTENT).hexdigest()


def offered(key: str = "k", sequence: int = 1, content: bytes = CONTENT) -> OfferedFile:
    return OfferedFile("r", hashlib.sha256(content).hexdigest(), len(content), "episode", key, sequence, {"a": 1})


# -- outbox ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_put_happens_or_leaves_no_trace_wherever_it_ends(tmp_path: Path, full: bool, from_file: bool) -> None:
    at = 1
    refused = True
    codes = set()
    while refused:
        root = tmp_path / f"{at}"
        source = tmp_path / f"source-{at}"
        Outbox(root, reserve=0).close()
        source.write_bytes(CONTENT)
        files = Dying(10**6, full)
        box = Outbox(root, reserve=0, files=files)
        files.left = at
        refused = False
        try:
            box.put(source if from_file else CONTENT, "episode", "k", {"n": 1})
        except Killed:
            refused = True
        except RatchetError as error:
            codes.add(error.code)
            refused = True
        box.close()
        reopened = Outbox(root, reserve=0)
        assert [i.key for i in reopened.waiting()] in ([], ["k"])
        if not reopened.knows("k"):
            if not source.exists():
                source.write_bytes(CONTENT)  # the collector runs the episode again
            reopened.put(source if from_file else CONTENT, "episode", "k", {"n": 1})
        [item] = reopened.waiting()
        assert reopened.path(item).read_bytes() == CONTENT
        assert reopened.put(b"other bytes", "episode", "k") is None
        assert len(list((root / "data").iterdir())) == 1
        reopened.close()
        at += 1
    assert at > 5
    assert codes == ({"link.disk_full"} if full else set())


def test_delivery_is_remembered_wherever_it_ends(tmp_path: Path) -> None:
    at = 1
    killed = True
    while killed:
        root = tmp_path / str(at)
        first = Outbox(root, reserve=0)
        first.put(CONTENT, "episode", "a")
        first.put(CONTENT + b"2", "episode", "b")
        first.close()
        files = Dying(10**6)
        box = Outbox(root, reserve=0, files=files)
        files.left = at
        killed = False
        try:
            box.delivered(box.waiting()[0])
        except Killed:
            killed = True
        box.close()
        reopened = Outbox(root, reserve=0)
        if len(reopened) == 2:
            reopened.delivered(reopened.waiting()[0])  # the learner says again that it has it
        assert [i.key for i in reopened.waiting()] == ["b"]
        assert reopened.done == {"stored": 1}
        assert reopened.knows("a")
        assert reopened.put(CONTENT, "episode", "a") is None
        assert [i.key for i in history(root)] == ["a", "b"]
        reopened.close()
        at += 1
    assert at > 2


def test_sequence_goes_on_and_refused_files_are_kept_for_a_person(tmp_path: Path) -> None:
    box = Outbox(tmp_path, reserve=0)
    box.put(b"a", "episode", "a")
    box.refused(box.waiting()[0], "link.too_large")
    box.close()
    reopened = Outbox(tmp_path, reserve=0)
    item = reopened.put(b"b", "episode", "b")
    assert item is not None
    assert item.sequence == 2
    assert reopened.done == {"link.too_large": 1}
    assert (tmp_path / "refused" / hashlib.sha256(b"a").hexdigest()).read_bytes() == b"a"
    reopened.close()


def test_a_full_outbox_refuses_and_keeps_the_file(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "o", limit=3000, reserve=0)
    box.put(CONTENT, "episode", "a")
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    with pytest.raises(RatchetError, match=r"link\.outbox_full"):
        box.put(source, "episode", "b")
    assert source.read_bytes() == CONTENT
    assert not box.knows("b")
    box.close()
    nearly = Outbox(tmp_path / "p", reserve=1 << 60)
    with pytest.raises(RatchetError, match=r"link\.disk_full"):
        nearly.put(CONTENT, "episode", "a")
    nearly.close()


def test_a_missing_file_and_a_second_process_are_named(tmp_path: Path) -> None:
    box = Outbox(tmp_path, reserve=0)
    item = box.put(CONTENT, "episode", "a")
    assert item is not None
    with pytest.raises(RatchetError, match=r"link\.journal_busy"):
        Outbox(tmp_path, reserve=0)
    box.close()
    box.path(item).unlink()
    with pytest.raises(RatchetError, match=r"link\.outbox_damaged"):
        Outbox(tmp_path, reserve=0)


@pytest.mark.parametrize(("kind", "key", "meta"), [("../x", "k", {}), ("e", "", {}), ("e", "k", {"x": b"bytes"})])
def test_what_could_never_be_sent_is_not_accepted(tmp_path: Path, kind: str, key: str, meta: dict[str, object]) -> None:
    box = Outbox(tmp_path, reserve=0)
    with pytest.raises(RatchetError, match=r"link\.bad_item"):
        box.put(CONTENT, kind, key, meta)
    assert not len(box)
    box.close()


# -- inbox -------------------------------------------------------------------------------------------------------------


def receive(inbox: Inbox, file: OfferedFile, content: bytes, piece: int = 700) -> None:
    """What the server does, from wherever the inbox says."""
    start = inbox.offer(file)
    while start is not None and start < len(content):
        start = inbox.write(file.sha, start, memoryview(content)[start : start + piece])
    if start is not None:
        inbox.finish(file.sha)


@pytest.mark.parametrize("full", [False, True])
def test_receiving_ends_the_same_wherever_it_was_cut_off(tmp_path: Path, full: bool) -> None:
    at = 1
    cut = True
    while cut:
        root = tmp_path / str(at)
        Inbox(root / "inbox", journal := Journal(root / "j.jsonl"), reserve=0).close()
        journal.close()
        files = Dying(10**6, full)
        journal = Journal(root / "j.jsonl", files)
        inbox = Inbox(root / "inbox", journal, reserve=0, files=files)
        files.left = at
        cut = False
        try:
            receive(inbox, offered(), CONTENT)
        except (Killed, RatchetError):
            cut = True
        if not full:
            inbox.close()
            journal.close()
            journal = Journal(root / "j.jsonl")
            inbox = Inbox(root / "inbox", journal, reserve=0)
        receive(inbox, offered(), CONTENT)
        assert [e.data["sha"] for e in journal.of("received")] == [SHA]
        assert inbox.path(SHA).read_bytes() == CONTENT
        inbox.close()
        journal.close()
        at += 1
    assert at > 10


def test_pieces_may_come_doubled_early_and_after_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    inbox = Inbox(tmp_path / "inbox", journal, reserve=0)
    view = memoryview(CONTENT)
    assert inbox.write(SHA, 0, view[:10]) is None
    assert inbox.offer(offered()) == 0
    assert inbox.write(SHA, 0, view[:100]) == 100
    assert inbox.write(SHA, 0, view[:100]) == 100
    assert inbox.write(SHA, 300, view[300:400]) == 100
    inbox.close()
    inbox = Inbox(tmp_path / "inbox", journal, reserve=0)
    assert inbox.offer(offered()) == 100
    assert inbox.write(SHA, 100, view[100:]) == len(CONTENT)
    with pytest.raises(RatchetError, match=r"link\.too_large"):
        inbox.write(SHA, len(CONTENT), view[:1])
    inbox.finish(SHA)
    assert inbox.offer(offered()) is None
    assert len(list(journal.of("received"))) == 1
    inbox.close()
    journal.close()


def test_changed_bytes_are_found_and_sent_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    inbox = Inbox(tmp_path / "inbox", journal, reserve=0)
    changed = b"X" + CONTENT[1:]
    assert inbox.offer(offered()) == 0
    inbox.write(SHA, 0, memoryview(changed))
    with pytest.raises(RatchetError, match=r"link\.hash_mismatch"):
        inbox.finish(SHA)
    assert not journal.events
    receive(inbox, offered(), CONTENT)
    assert inbox.path(SHA).read_bytes() == CONTENT
    inbox.close()
    journal.close()


def test_a_partial_file_torn_by_a_power_cut_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    inbox = Inbox(tmp_path / "inbox", journal, reserve=0)
    inbox.offer(offered())
    inbox.write(SHA, 0, memoryview(CONTENT)[:1000])
    inbox.close()
    path = tmp_path / "inbox" / "partial" / SHA
    path.write_bytes(bytes(1000))  # the size reached the disk, the data did not
    inbox = Inbox(tmp_path / "inbox", journal, reserve=0)
    with pytest.raises(RatchetError, match=r"link\.hash_mismatch"):
        receive(inbox, offered(), CONTENT)
    receive(inbox, offered(), CONTENT)
    assert inbox.path(SHA).read_bytes() == CONTENT
    inbox.close()
    journal.close()


def test_a_sidecar_that_cannot_be_read_is_asked_for_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    files = tmp_path / "inbox" / "files"
    files.mkdir(parents=True)
    (files / SHA).write_bytes(CONTENT)
    (files / f"{SHA}.json").write_text("{torn")
    inbox = Inbox(tmp_path / "inbox", journal, reserve=0)
    assert not journal.events
    assert inbox.offer(offered()) is None
    assert [e.data["key"] for e in journal.of("received")] == ["k"]
    inbox.close()
    journal.close()


def test_one_key_counts_once_whatever_its_bytes(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    inbox = Inbox(tmp_path / "inbox", journal, reserve=0)
    receive(inbox, offered(), CONTENT)
    assert inbox.offer(offered(content=CONTENT + b"again", sequence=2)) is None
    receive(inbox, offered(key="other", sequence=3), CONTENT)
    assert [e.data["key"] for e in journal.of("received")] == ["k", "other"]
    inbox.close()
    journal.close()


def test_no_space_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    inbox = Inbox(tmp_path / "inbox", journal, reserve=1 << 60)
    with pytest.raises(RatchetError, match=r"link\.disk_full"):
        inbox.offer(offered())
    inbox.close()
    journal.close()
