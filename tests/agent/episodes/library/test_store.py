"""The store is where an afternoon of recording lies: it must say what is there, notice any change, and lose nothing.

Pinned: chained index among processes and over torn ends; ids resolve; copies are whole or absent; damage is named;
removing leaves a trace; recovery of cut-off files at any byte, again after a crash in the middle.
Deterministic: crashes are files cut at chosen bytes, and processes are joined before anything is checked.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from ratchet_vla.episodes.file import recovery
from ratchet_vla.episodes.file.reader import EpisodeReader, read_episode
from ratchet_vla.episodes.file.recording import EpisodeWriter, make_info
from ratchet_vla.episodes.file.recovery import recover
from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.index import NO_PREVIOUS_HASH, Index
from ratchet_vla.episodes.library.store import Card, Damage, EpisodeStore, Stock
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Mark
from ratchet_vla.storage.growing import GrowingFile
from tests.agent.episodes.samples import chunk, episode, observation, same, small_contract, tick

CONTRACT = small_contract(8)


def filled(root: Path, count: int = 3) -> EpisodeStore:
    store = EpisodeStore(root, create=True)
    for i in range(count):
        path = store.folder(f"session{i % 2}") / f"{i}.mcap"
        write_episode(path, episode(CONTRACT, seed=i, steps=2), CONTRACT, session=f"session{i % 2}")
        store.add(path)
    return store


# -- the index ---------------------------------------------------------------------------------------------------


def test_entries_are_chained_and_seen_by_others(tmp_path: Path) -> None:
    mine, theirs = Index(tmp_path / "log"), Index(tmp_path / "log")
    mine.append([("a", {"x": 1}), ("b", {})])
    theirs.append([("c", {})])
    entries = mine.entries()
    assert [e.kind for e in entries] == ["a", "b", "c"]
    assert [e.previous for e in entries] == [NO_PREVIOUS_HASH, *(e.hash for e in entries[:-1])]
    assert mine.head == theirs.head == entries[-1].hash


@pytest.mark.parametrize("line", [0, 1])
def test_a_changed_entry_is_noticed(tmp_path: Path, line: int) -> None:
    Index(tmp_path / "log").append([("label", {"verdict": "failure"}), ("b", {}), ("c", {})])
    lines = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    changed = lines.copy()
    changed[line] = changed[line].replace(b'"n"', b'"n" ')
    (tmp_path / "log").write_bytes(b"".join(changed))
    with pytest.raises(RatchetError, match=r"episode\.index_changed"):
        Index(tmp_path / "log").entries()
    (tmp_path / "log").write_bytes(b"".join(lines[:line] + lines[line + 1 :]))
    with pytest.raises(RatchetError, match=r"episode\.index_changed"):
        Index(tmp_path / "log").entries()


def test_a_torn_end_is_cut_and_nothing_else(tmp_path: Path) -> None:
    whole = Index(tmp_path / "log")
    whole.append([("a", {}), ("b", {})])
    data = (tmp_path / "log").read_bytes()
    first = data.index(b"\n") + 1
    for size in range(first, len(data)):
        (tmp_path / "log").write_bytes(data[:size])
        index = Index(tmp_path / "log")
        index.append([("c", {})])
        assert [e.kind for e in index.entries()] == ["a", "c"]


def _append_many(path: Path, name: str, count: int) -> None:
    index = Index(path)
    for i in range(count):
        index.append([(name, {"i": i})])


def test_processes_append_without_losing_any(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(tmp_path / "log", n, 25)) for n in "xyz"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    entries = Index(tmp_path / "log").entries()
    assert len(entries) == 75
    for name in "xyz":
        assert [e.body["i"] for e in entries if e.kind == name] == list(range(25))


# -- the store ---------------------------------------------------------------------------------------------------


def test_what_is_there(tmp_path: Path) -> None:
    store = filled(tmp_path)
    cards = list(EpisodeStore(tmp_path).cards().values())
    assert [c.session for c in cards] == ["session0", "session1", "session0"]
    first = cards[0]
    assert (first.steps, first.ticks, first.human_share, first.success) == (2, 8, 0.25, True)
    assert store.resolve(first.id[:8]) == first.id
    assert same(store.read(first.id), episode(CONTRACT, seed=0, steps=2))
    assert store.add(tmp_path / first.file) == first, "entering twice changes nothing"
    assert len(store.cards()) == 3


def test_references_that_name_no_episode(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    for bad in ("0000", "zz", ""):
        with pytest.raises(RatchetError, match=r"episode\.unknown"):
            store.resolve(bad)
    with pytest.raises(RatchetError, match=r"episode\.no_store"):
        EpisodeStore(tmp_path / "elsewhere")
    with pytest.raises(RatchetError, match=r"episode\.outside_store"):
        store.add(Path("/somewhere/else.mcap"))


def test_copies_are_whole(tmp_path: Path) -> None:
    theirs = filled(tmp_path / "robot", 2)
    mine = EpisodeStore(tmp_path / "learner", create=True)
    for card in theirs.cards().values():
        copied = mine.copy_in(theirs.path(card.id))
        assert copied.id == card.id
        assert mine.copy_in(theirs.path(card.id)) == copied
    assert len(mine.cards()) == 2
    assert not [d for d in mine.verify() if isinstance(d, Damage)]


def test_damage_is_named(tmp_path: Path) -> None:
    store = filled(tmp_path)
    cards = list(store.cards().values())
    assert [type(x) for x in store.verify()] == [Card] * 3
    with (tmp_path / cards[0].file).open("r+b") as file:
        file.seek(200)
        file.write(b"!")
    (tmp_path / cards[1].file).unlink()
    (tmp_path / "session0" / "x.mcap.open").write_bytes(b"")
    codes = {d.code: d.fatal for d in store.verify() if isinstance(d, Damage)}
    assert codes == {"episode.damaged": True, "episode.missing": True, "episode.unfinished": False}


def test_removing_leaves_a_trace(tmp_path: Path) -> None:
    store = filled(tmp_path)
    gone = next(iter(store.cards().values()))
    assert store.remove([gone.id], "discarded") == gone.bytes
    assert gone.id not in EpisodeStore(tmp_path).cards()
    assert not (tmp_path / gone.file).exists()
    assert [e.body["reason"] for e in store.index.entries() if e.kind == "removed"] == ["discarded"]
    # a crash between the entry and the deletion leaves a file that nobody takes for an episode again
    (tmp_path / gone.file).write_bytes(b"rest")
    assert store.take_stock() == Stock([], [], [])
    assert store.leftovers(older_than=-1) == [tmp_path / gone.file]


# -- recovery ----------------------------------------------------------------------------------------------------


def unfinished(folder: Path, flushes: int = 4) -> tuple[Path, list[int]]:
    """A file as a killed recorder leaves it, and its size after each flush."""
    rng = np.random.default_rng(0)
    info = make_info(CONTRACT, "bowl", "put the bowl away", stream="jpeg", decisions="raw", clock_offset=1e9)
    writer = EpisodeWriter(folder / "a.mcap.open", folder / "a.mcap", info, compress=False)
    sizes = []
    for i in range(flushes):
        seen = observation(CONTRACT, rng, i, i * 0.2)
        writer.observation(seen)
        writer.chunk(chunk(CONTRACT, rng, seen))
        for j in range(4):
            n = 4 * i + j
            writer.tick(tick(CONTRACT, rng, n, marks=Mark.HUMAN if j == 3 else Mark.NONE))
        writer.flush()
        sizes.append(writer.size)
    writer.abandon()
    return folder / "a.mcap.open", sizes


def test_recovered_up_to_the_last_flush_at_any_byte(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    remains, sizes = unfinished(source)
    data = remains.read_bytes()
    whole = EpisodeReader(remains, cut_off=True).episode()
    assert (len(whole.steps), len(whole.ticks)) == (4, 16)
    for size in sorted({*range(0, len(data), 701), *sizes, *(s - 1 for s in sizes), *(s + 1 for s in sizes[:-1])}):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "a.mcap.open").write_bytes(data[:size])
        result = recover(folder / "a.mcap.open")
        flushed = sum(s <= size for s in sizes)
        if result.path is None:
            assert flushed == 0
            assert list(folder.iterdir()) == []
            continue
        got = read_episode(result.path)
        assert result.id == EpisodeReader(result.path).id
        assert len(got.ticks) >= 4 * flushed, "what was flushed is there"
        assert same(got.ticks, whole.ticks[: len(got.ticks)])
        assert same(got.steps, whole.steps[: len(got.steps)])
        assert (got.success, got.meta) == (None, {"recording": {"cut_off": True}})
        assert [p.name for p in folder.iterdir()] == ["a.mcap"]
    assert whole.steps[0].executed.tolist() == [True, True, True, False], "a person's action is not the policy's"


def test_recovery_itself_may_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remains, _ = unfinished(tmp_path)
    before = remains.read_bytes()

    class KilledError(BaseException):
        pass

    def die(self: GrowingFile) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(GrowingFile, "finish", die)
        patch.setattr(GrowingFile, "discard", GrowingFile.close)
        with pytest.raises(KilledError):
            recover(remains)
    assert remains.read_bytes() == before
    assert recover(remains).path == tmp_path / "a.mcap"
    # killed after the finished file had its name, before the remains were gone
    (tmp_path / "b.mcap.open").write_bytes(b"same")
    (tmp_path / "b.mcap").hardlink_to(tmp_path / "b.mcap.open")
    assert recover(tmp_path / "b.mcap.open").path == tmp_path / "b.mcap"
    assert not (tmp_path / "b.mcap.open").exists()


def test_a_living_recorder_is_left_alone(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "a.mcap.open", tmp_path / "a.mcap")
    with pytest.raises(RatchetError, match=r"episode\.in_use"):
        recover(tmp_path / "a.mcap.open")
    assert list(recovery.unfinished(tmp_path)) == []
    file.close()


def test_taking_stock_after_a_crash(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    unfinished(store.folder("session0"))
    write_episode(store.folder("late") / "late.mcap", episode(CONTRACT, seed=9), CONTRACT)  # finished, never entered
    stock = store.take_stock()
    recovered, entered = stock.recovered, stock.entered
    assert len(recovered) == 1
    assert sorted((c.task, c.recovered, c.reason) for c in entered) == [
        ("bowl", False, ""),
        ("bowl", True, "cut_off"),
    ]
    assert store.take_stock() == Stock([], [], [])
