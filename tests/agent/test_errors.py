"""Refusals are the interface that scripts and people meet first: a code that changes or a second line breaks both.

Pinned: one line whatever the parts hold, code first, all parts kept; survival of pickling, because refusals come out of
worker processes; the same facts for `--json`.
"""

from __future__ import annotations

import copy
import multiprocessing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratchet_vla.errors import RatchetError

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
