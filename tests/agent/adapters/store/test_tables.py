"""A table decides which weights move the arm: it must be whole or not there, and an unknown task must get the base.

Pinned: who acts on known, reworded and unknown instructions; that a table comes back as it was put, under its id, and
goes back one step at a time; damage and ambiguity are refused with a code. Determinism: no clocks, no threads.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.tables import PromotionTable, TableEntry, TableStore, normalised
from ratchet_vla.errors import RatchetError

FIRST = "a" * 64
SECOND = "b" * 64


def table(**adapters: str) -> PromotionTable:
    out = PromotionTable("c" * 64, {})
    for task, adapter in adapters.items():
        out = out.with_entry(TableEntry(task, (f"{task} the door",), adapter, 0.9, 0.5, 50))
    return out


def test_known_words_get_their_adapter_and_all_others_the_base() -> None:
    both = table(open=FIRST, close=BASE)
    assert both.assignment("open the door").adapter == FIRST
    assert both.assignment("  Open the DOOR. ").adapter == FIRST
    assert both.assignment("close the door").adapter == BASE
    unknown = both.assignment("open the window")
    assert (unknown.adapter, unknown.task) == (BASE, "")
    assert both.assignment("").adapter == BASE


@given(st.text(max_size=40))
def test_only_the_words_count(text: str) -> None:
    spoken = normalised(text)
    assert normalised(spoken) == spoken
    assert normalised(f" {text.upper()}! ") == normalised(text.upper())


def test_two_tasks_cannot_share_words() -> None:
    with pytest.raises(RatchetError) as refused:
        table(open=FIRST).with_entry(TableEntry("other", ("Open the door!",), SECOND))
    assert refused.value.code == "adapter.bad_table"


def test_tables_come_into_force_and_go_back_one_at_a_time(tmp_path: Path) -> None:
    store = TableStore(tmp_path)
    assert store.active() is None
    first = table(open=FIRST)
    second = first.with_entry(TableEntry("close", ("close the door",), SECOND))
    store.promote(first, "passed the gate")
    store.promote(second, "passed the gate")
    assert store.active() == second
    assert store.get(first.id) == first
    store.rollback("it moved oddly")
    assert TableStore(tmp_path).active() == first
    store.rollback()
    assert store.active() is None
    with pytest.raises(RatchetError) as refused:
        store.rollback()
    assert refused.value.code == "adapter.no_previous"
    assert [move.action for move in store.history()] == ["set", "set", "rollback", "rollback"]


def test_the_order_of_entries_does_not_change_a_tables_id() -> None:
    assert table(open=FIRST, close=SECOND).id == table(close=SECOND, open=FIRST).id
    assert table(open=FIRST).id != table(open=SECOND).id


@pytest.mark.parametrize("damage", ["cut", "another entry", "no file"])
def test_a_damaged_table_is_refused(damage: str, tmp_path: Path) -> None:
    store = TableStore(tmp_path)
    store.promote(table(open=FIRST), "")
    (path,) = (tmp_path / "tables").iterdir()
    if damage == "cut":
        path.write_text(path.read_text()[:40])
    elif damage == "another entry":
        content = json.loads(path.read_text())
        content["entries"][0]["adapter"] = SECOND
        path.write_text(json.dumps(content))
    else:
        path.unlink()
    with pytest.raises(RatchetError) as refused:
        store.active()
    assert refused.value.code in ("adapter.bad_table", "adapter.unknown_table")
