"""A study's folder: which of its trials are finished, who runs which, and the files that are made from them.

Knows names of folders and files. What the numbers mean is in `ratchet_vla.learner.study.results`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ratchet_vla.cli import common
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.methods import variants
from ratchet_vla.learner.methods.registry import METHODS
from ratchet_vla.learner.study.claims import claims
from ratchet_vla.learner.study.page import write_study
from ratchet_vla.learner.study.results import MEASURES, Trial, as_dict, load_trial, markdown, summarise
from ratchet_vla.storage.files import Files


@contextmanager
def claim(place: Path) -> Iterator[bool]:
    """Whether this process may run the trial in `place`: no other does before the block is left. The kernel takes the
    claim from a process that dies."""
    place.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(place / "claim", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        claimed = False
    else:
        claimed = True
    try:
        yield claimed
    finally:
        os.close(descriptor)


def write(out: Path, facts: dict[str, Any], console: Console) -> dict[str, Any]:
    """All of a study's files from its finished trials; prints the table and what it says about the claims.

    Raises:
        RatchetError: study.nothing_finished.
    """
    out.mkdir(parents=True, exist_ok=True)
    with Files().lock(out / "lock"):  # another process may share the study
        return _write(out, facts, console)


def _write(out: Path, facts: dict[str, Any], console: Console) -> dict[str, Any]:
    trials = finished(out)
    if not trials:
        raise RatchetError("study.nothing_finished", "no finished trial", where=str(out), fix="run the study first")
    result = as_dict(trials, facts)
    measured_claims = claims(trials)
    result["claims"] = [c.as_dict() for c in measured_claims]
    common.write_json(out / "study.json", result)
    (out / "study.md").write_text(markdown(trials))
    page = write_study(trials, facts, out / "study.html")
    table = Table(title="points, 95 % intervals")
    for column in ("method", "seeds", *MEASURES):
        table.add_column(column, overflow="fold")
    for s in summarise(trials):
        table.add_row(s.method, str(len(s.seeds)), *[v.percent() if (v := s.values[n]) else "-" for n in MEASURES])
    console.print(table)
    table = Table(title="claims: a loss in points, at most the bound")
    for column in ("method", "claim", "loss", "bound", "by the interval"):
        table.add_column(column, overflow="fold")
    for c in measured_claims:
        loss = c.value.percent() if c.value else "-"
        table.add_row(c.method, c.text, loss, f"{100 * c.bound:.0f}", c.verdict)
    console.print(table)
    console.print(f"report: {page}")
    return result


def finished(out: Path) -> list[Trial]:
    """The study's finished trials, methods in the order of the list of methods, variants behind their method."""
    order = list(METHODS)
    rows = []
    for folder in out.iterdir() if out.is_dir() else ():
        if folder.is_dir() and folder.name.partition(":")[0] in METHODS:
            rows.append(variants.parse(folder.name))
    trials: list[Trial] = []
    for variant in sorted(rows, key=lambda v: (order.index(v.kind.name), v.label)):
        for folder in sorted((out / variant.label).glob("seed*"), key=lambda p: int(p.name[4:])):
            trial = load_trial(variant.label, int(folder.name[4:]), folder, variant.kind.sequential)
            trials += [trial] if trial else []
    return trials
