"""The folder store: a power cut, a full disk or a flipped bit must never put a wrong adapter on a robot.

Pinned: the conformance suite; at every system call of every writing operation, a killed process or a full disk leaves
the state before or the state after, and the store goes on working; every kind of damage is named by `verify` and
refused by `get`. Processes are killed by themselves at a counted call, so no test depends on time.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ratchet_vla.adapters.peft_format import CONFIG, WEIGHTS
from ratchet_vla.adapters.protocol import AdapterStore, Provenance
from ratchet_vla.adapters.store.folder import CARD, FolderStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage import files as files_module
from ratchet_vla.storage.files import Files
from ratchet_vla.testing.conformance.store import StoreSuite, refused, same
from ratchet_vla.testing.tiny_policy import made

ONE = made(1)
TWO = made(2)
THREE = made(3)


class TestFolderStore(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> FolderStore:
        return FolderStore(tmp_path / "store", create=True)


class Faulty(Files):
    """Fails at the n-th system call: dies there, or gets an error from the operating system."""

    def __init__(self, at: int = -1, error: int | None = None) -> None:
        self.at = at
        self.error = error
        self.calls = [("", Path())][:0]

    def step(self, call: str, path: Path) -> None:
        if len(self.calls) == self.at:
            if self.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            elif call != "remove":  # a full disk still deletes
                raise OSError(self.error, os.strerror(self.error), str(path))
        self.calls.append((call, path))


def prepare(root: Path, third: bool = False) -> FolderStore:
    store = FolderStore(root, create=True)
    if third:
        store.put(THREE)
    store.put(ONE)
    store.put(TWO, Provenance(parent=ONE.id))
    store.promote(ONE.id)
    store.promote(TWO.id)
    return store


Operation = Callable[[AdapterStore], object]
OPERATIONS: dict[str, Operation] = {
    "put": lambda store: store.put(THREE, Provenance(parent=TWO.id)),
    "tag": lambda store: store.tag("candidate", ONE.id),
    "promote": lambda store: store.promote(ONE.id),
    "rollback": lambda store: store.rollback(),
    "annotate": lambda store: store.annotate(TWO.id, {"success": 1.0}),
    "remove": lambda store: store.remove(THREE.id),
}


def state(store: AdapterStore) -> tuple[object, ...]:
    """What a reader sees of what the operations change; `previous` moves just before `active` does."""
    tags = {name: target for name, target in store.tags().items() if name != "previous"}
    return (store.ids(), tags, store.card(TWO.id).provenance.metrics)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written in several calls, so that some are cut in the middle."""
    monkeypatch.setattr(files_module, "PIECE", 2000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("error", [None, errno.ENOSPC], ids=["killed", "disk full"])
def test_a_fault_at_any_call_leaves_before_or_after(tmp_path: Path, name: str, error: int | None) -> None:
    operation = OPERATIONS[name]
    prepare(tmp_path / "prepared", third=name == "remove")
    shutil.copytree(tmp_path / "prepared", tmp_path / "dry")
    counter = Faulty()
    before = state(FolderStore(tmp_path / "dry"))
    operation(FolderStore(tmp_path / "dry", files=counter))
    after = state(FolderStore(tmp_path / "dry"))
    assert len(counter.calls) >= 3
    outcomes = []
    for at in range(len(counter.calls)):
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "prepared", root)
        faulty = FolderStore(root, files=Faulty(at, error))
        if error is None:
            child = os.fork()
            if child == 0:
                operation(faulty)
                os._exit(0)  # only reached where the fault never came
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        elif counter.calls[at][0] != "remove":
            refused("adapter.disk_full", operation, faulty)
        store = FolderStore(root)
        assert [p for p in store.verify() if p.fatal] == []
        assert same(store.get("active"), ONE) or same(store.get("active"), TWO)
        outcomes.append(state(store))
        assert outcomes[-1] in (before, after)
        if error is not None and counter.calls[at][0] in ("mkdir", "open", "write", "rename"):
            assert outcomes[-1] == before  # what was refused did not happen
        if name not in ("rollback", "remove") or outcomes[-1] == before:  # the others may be repeated
            operation(store)
        store.tag("after", "active")
        assert store.verify() == []  # leftovers are swept, the log is whole
        assert [m.sequence for m in store.history()] == list(range(1, len(store.history()) + 1))
    assert before in outcomes


def test_files_are_synced_before_and_their_folder_after_the_rename(tmp_path: Path) -> None:
    """What a power cut needs; a killed process cannot show it."""
    files = Faulty()
    FolderStore(tmp_path, create=True, files=files).put(ONE)
    calls = [(call, path.name if path.name in (WEIGHTS, CONFIG, CARD) else "") for call, path in files.calls]
    rename = calls.index(("rename", ""))
    for name in (WEIGHTS, CONFIG, CARD):
        writes = [i for i, c in enumerate(calls) if c == ("write", name)]
        assert writes[-1] < calls.index(("fsync", name)) < rename
    assert calls[rename - 1] == calls[rename + 1] == ("fsync", "")


def test_other_errors_of_the_disk_have_their_own_code(tmp_path: Path) -> None:
    prepare(tmp_path)
    refused("adapter.store_io", FolderStore(tmp_path, files=Faulty(2, errno.EIO)).put, THREE)
    assert FolderStore(tmp_path).verify() == []
    refused("adapter.no_store", FolderStore, tmp_path / "mistyped")


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("code", "damage"),
    [
        ("adapter.hash_mismatch", lambda d: flip(d / WEIGHTS, -1)),
        ("adapter.truncated", lambda d: os.truncate(d / WEIGHTS, 700)),
        ("adapter.truncated", lambda d: os.truncate(d / WEIGHTS, 0)),
        ("adapter.missing_file", lambda d: (d / WEIGHTS).unlink()),
        ("adapter.missing_file", lambda d: (d / CARD).unlink()),
        ("adapter.hash_mismatch", lambda d: edit(d / CONFIG, lora_alpha=9)),
        ("adapter.bad_config", lambda d: os.truncate(d / CONFIG, 20)),
        ("adapter.unsupported_config", lambda d: edit(d / CONFIG, use_dora=True)),
        ("adapter.bad_card", lambda d: edit(d / CARD, base_hash="00" * 32)),
        ("adapter.bad_card", lambda d: os.truncate(d / CARD, 30)),
    ],
)
def test_damage_is_named_refused_and_healed_by_storing_again(tmp_path: Path, code: str, damage: Operation) -> None:
    store = prepare(tmp_path)
    damage(store.root / "objects" / TWO.id)  # type: ignore[arg-type]
    assert [p.code for p in store.verify()] == [code]
    refused(code, store.get, "active")
    assert same(store.get(ONE.id), ONE)
    store.put(TWO)
    assert store.verify() == []
    assert same(store.get("active"), TWO)


def test_damaged_tags_and_logs_are_named(tmp_path: Path) -> None:
    store = prepare(tmp_path)
    moves = store.history()
    with (tmp_path / "history.jsonl").open("ab") as log:
        log.write(b'{"sequence": 4, "ta')
    (tmp_path / "objects" / "notes.txt").write_text("x")
    assert {(p.code, p.fatal) for p in store.verify()} == {
        ("adapter.torn_history", False),
        ("adapter.stray_file", False),
    }
    assert store.history() == moves
    os.truncate(tmp_path / "tags" / "active", 10)
    assert "adapter.bad_tag" in [p.code for p in store.verify() if p.fatal]
    refused("adapter.unknown", store.get, "active")
    store.promote(TWO.id)
    (tmp_path / "objects" / "notes.txt").unlink()
    assert store.verify() == []


def test_a_store_that_came_without_its_empty_scratch_folder_works(tmp_path: Path) -> None:
    """As git and archives copy it: an empty folder does not travel."""
    FolderStore(tmp_path / "store", create=True).put(ONE)
    FolderStore(tmp_path / "store").promote(ONE.id)
    (tmp_path / "store" / "scratch").rmdir()
    store = FolderStore(tmp_path / "store")
    assert same(store.get("active"), ONE)
    assert store.verify() == []
    assert not (tmp_path / "store" / "scratch").exists(), "reading writes nothing"
    store.put(TWO)
    assert store.ids() == sorted([ONE.id, TWO.id])


def test_a_tag_that_points_nowhere_is_refused(tmp_path: Path) -> None:
    store = prepare(tmp_path)
    (store.root / "objects" / TWO.id).rename(tmp_path / "away")
    assert [p.code for p in store.verify()] == ["adapter.dangling_tag"]
    refused("adapter.unknown", store.get, "active")


def _writer(root: Path, seed: int, start: object) -> None:
    store = FolderStore(root)
    start.wait()  # type: ignore[attr-defined]
    for turn in range(4):
        name = store.put(made(10 + (seed + turn) % 3)).id
        store.tag(f"writer-{seed}", name)
        store.promote(name)


def test_processes_write_at_the_same_time(tmp_path: Path) -> None:
    FolderStore(tmp_path, create=True)
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(4)
    writers = [fork.Process(target=_writer, args=(tmp_path, seed, start)) for seed in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [w.exitcode for w in writers] == [0] * 4
    store = FolderStore(tmp_path)
    assert store.verify() == []
    assert len(store.ids()) == 3
    moves = store.history()
    assert [m.sequence for m in moves] == list(range(1, len(moves) + 1))
    for tag in store.tags():
        line = store.history(tag)
        assert [m.old for m in line] == [None, *(m.new for m in line[:-1])]  # no move was lost or doubled


def test_errors_are_ratchets(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RatchetError, match=r"adapter\.store_io"):
        FolderStore(tmp_path / "file", create=True)
