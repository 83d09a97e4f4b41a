"""A study's folder: which of its trials are finished, who runs which, and the files that are made from them.

Knows names of folders and files. What the numbers mean is in `ratchet_vla.learner.study.results`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ratchet_sim import perturbations
from ratchet_vla.cli import common, display
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.methods import variants
from ratchet_vla.learner.methods.registry import METHODS
from ratchet_vla.learner.study.claims import claims
from ratchet_vla.learner.study.page import write_study
from ratchet_vla.learner.study.results import MEASURES, Trial, as_dict, load_trial, markdown, summarise
from ratchet_vla.storage.files import Files


def changed_worlds(tasks: Sequence[str], kinds: Sequence[str]) -> tuple[str, ...]:
    """Name every task under every change of its world, as held-out tasks are named: `task@camera`."""
    names: list[str] = []
    for kind in kinds:
        names += [f"{task}{perturbations.MARK}{kind}" for task in tasks]
    return tuple(names)


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Yield whether this process may run the trial in this folder: no other does before the block is left.

    The kernel takes the claim from a process that dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "claim", os.O_CREAT | os.O_RDWR, 0o644)
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


def write(out: Path, description: dict[str, Any], console: Console) -> dict[str, Any]:
    """Write all of a study's files from its finished trials; print the table and what it says about the claims.

    Raises:
        RatchetError: study.nothing_finished.
    """
    out.mkdir(parents=True, exist_ok=True)
    with Files().lock(out / "lock"):  # another process may share the study
        return _write(out, description, console)


def _write(out: Path, description: dict[str, Any], console: Console) -> dict[str, Any]:
    trials = finished(out)
    if not trials:
        raise RatchetError("study.nothing_finished", "no finished trial", where=str(out), fix="run the study first")
    result = as_dict(trials, description)
    measured_claims = claims(trials)
    result["claims"] = [claimed.as_dict() for claimed in measured_claims]
    common.write_json(out / "study.json", result)
    (out / "study.md").write_text(markdown(trials))
    page = write_study(trials, description, out / "study.html")
    table = display.make_table(("method", "seeds", *MEASURES), title="points, 95 % intervals", folds=True)
    for summary in summarise(trials):
        values = [summary.values[name] for name in MEASURES]
        cells = [value.percent() if value else "-" for value in values]
        table.add_row(summary.method, str(len(summary.seeds)), *cells)
    console.print(table)
    columns = ("method", "claim", "loss", "bound", "by the interval")
    table = display.make_table(columns, title="claims: a loss in points, at most the bound", folds=True)
    for claimed in measured_claims:
        loss = claimed.value.percent() if claimed.value else "-"
        table.add_row(claimed.method, claimed.text, loss, f"{100 * claimed.bound:.0f}", claimed.verdict)
    console.print(table)
    console.print(f"report: {page}")
    return result


def finished(out: Path) -> list[Trial]:
    """Read the study's finished trials: in the order of the list of methods, variants behind their method."""
    order = list(METHODS)
    rows = []
    for folder in out.iterdir() if out.is_dir() else ():
        if folder.is_dir() and folder.name.partition(":")[0] in METHODS:
            rows.append(variants.parse(folder.name))
    trials: list[Trial] = []
    for variant in sorted(rows, key=lambda row: (order.index(row.kind.name), row.label)):
        for folder in sorted((out / variant.label).glob("seed*"), key=lambda path: int(path.name[4:])):
            trial = load_trial(variant.label, int(folder.name[4:]), folder, variant.kind.sequential)
            if trial:
                trials.append(trial)
    return trials
