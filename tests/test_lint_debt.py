"""The exemptions from lint rules only ever shrink: one that could grow unseen would make every rule a suggestion.

Pinned: what counts as growth and as done with, and that the block of pyproject.toml survives being written. Ruff
itself runs in `make lint`.
"""

from __future__ import annotations

import tomllib

import pytest

from tests import lint_debt

FINDINGS = [
    ("agent/ratchet_vla/link/wire.py", "D102"),
    ("agent/ratchet_vla/link/robot/outbox.py", "D102"),
    ("agent/ratchet_vla/link/robot/outbox.py", "A002"),
    ("agent/ratchet_vla/records.py", "D205"),
    ("tests/agent/link/test_link.py", "SLF001"),
]
DEBT = {"agent/ratchet_vla/link": {"D102": 2, "A002": 1}, "agent": {"D205": 1}, "tests": {"SLF001": 1}}
SETTINGS = f'[project]\nname = "x"\n\n{lint_debt.HEAD}"old/**" = ["E1"]  # E1 7\n\n[tool.mypy]\nstrict = true\n'


def test_findings_count_for_their_package() -> None:
    assert lint_debt.count(FINDINGS) == DEBT


def test_counts_are_lowered_and_never_raised() -> None:
    found = {"agent/ratchet_vla/link": {"D102": 1, "D205": 3}, "agent": {"D205": 9}}
    assert lint_debt.lowered(DEBT, found) == {"agent/ratchet_vla/link": {"D102": 1}, "agent": {"D205": 1}}


def test_what_was_written_is_read_again_and_the_rest_of_the_settings_stays() -> None:
    written = lint_debt.with_exemptions(SETTINGS, DEBT)
    assert lint_debt.parse(written) == DEBT
    before, after = tomllib.loads(SETTINGS), tomllib.loads(written)
    exempt = after["tool"].pop("ruff")["lint"]["extend-per-file-ignores"]
    before["tool"].pop("ruff")
    assert after == before
    assert exempt["agent/ratchet_vla/link/**"] == ["A002", "D102"]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (DEBT, None),
        ({**DEBT, "tests": {"SLF001": 2}}, "tests: SLF001 found 2 times, 1 were there"),
        ({**DEBT, "sim": {"D102": 1}}, "sim: D102 found 1 times, 0 were there"),
        ({**DEBT, "agent/ratchet_vla/link": {"D102": 2}}, "agent/ratchet_vla/link: A002 is not broken any more"),
        ({**DEBT, "agent/ratchet_vla/link": {"D102": 1, "A002": 1}}, None),
    ],
    ids=["as written", "grew", "new package", "done with", "fewer, not done"],
)
def test_growth_and_needless_exemptions_are_refused(found: lint_debt.Debt, said: str | None) -> None:
    lines = lint_debt.complaints(DEBT, found)
    assert [line.startswith(said or "") for line in lines] == [True] * (said is not None)
