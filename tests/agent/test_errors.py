"""Refusals are the interface that scripts and people meet first: a code that changes or a second line breaks both.

Pinned: one line whatever the parts hold, code first, all parts kept; survival of pickling, because refusals come out of
worker processes; the same facts for `--json`.
"""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratchet_vla.errors import FORMER_CODES, RatchetError

words = st.text(max_size=40)


def refuse(code: str, what: str) -> None:
    raise RatchetError(code, what, where="there", fix="do this")


def parts(error: RatchetError) -> tuple[str, str, str, str]:
    return error.code, error.what, error.where, error.fix


@pytest.mark.parametrize(
    ("where", "fix", "line"),
    [
        ("", "", "[arm.stuck] it is stuck"),
        ("joint 3", "", "[arm.stuck] it is stuck (joint 3)"),
        ("", "free it", "[arm.stuck] it is stuck; free it"),
        ("joint 3", "free it", "[arm.stuck] it is stuck (joint 3); free it"),
    ],
)
def test_the_line(where: str, fix: str, line: str) -> None:
    assert str(RatchetError("arm.stuck", "it is stuck", where=where, fix=fix)) == line


@given(words, words, words)
def test_always_exactly_one_line(what: str, where: str, fix: str) -> None:
    error = RatchetError("a.b", what, where=where, fix=fix)
    assert len(str(error).splitlines()) == 1
    assert str(error).startswith("[a.b] ")
    assert error.as_dict() == {"code": "a.b", "what": what, "where": where, "fix": fix}


@given(words, words, words)
def test_copies_are_equal(what: str, where: str, fix: str) -> None:
    error = RatchetError("a.b", what, where=where, fix=fix)
    again = copy.copy(error)
    assert parts(again) == parts(error)
    assert str(again) == str(error)


def test_it_crosses_process_borders() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(RatchetError) as refused:
        pool.apply(refuse, ("arm.stuck", "it is stuck"))
    assert parts(refused.value) == ("arm.stuck", "it is stuck", "there", "do this")


def test_subclasses_stay_what_they_are() -> None:
    class Narrow(RatchetError):
        pass

    assert type(copy.copy(Narrow("a.b", "c"))) is Narrow


def test_a_renamed_code_names_its_former_self(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that matches on the former code finds it in the line and in JSON; the wire carries the present one."""
    monkeypatch.setitem(FORMER_CODES, "arm.stuck", "arm.jammed")
    error = RatchetError("arm.stuck", "it is stuck")
    assert str(error) == "[arm.stuck, formerly arm.jammed] it is stuck"
    assert error.for_json()["former_code"] == "arm.jammed"
    assert "former_code" not in RatchetError("arm.lost", "it is lost").for_json()
    again = RatchetError(**error.as_dict())
    assert parts(again) == parts(error)


def test_former_codes_are_raised_by_nobody_and_present_ones_are() -> None:
    root = Path(__file__).resolve().parents[2]
    source = "\n".join(
        path.read_text()
        for top in ("agent", "sim", "calibration", "ros2_ws")
        for path in (root / top).rglob("*.py")
        if path.name != "errors.py"
    )
    for present, former in FORMER_CODES.items():
        assert f'"{present}"' in source, present
        assert f'"{former}"' not in source, former
