"""Tables and progress bars of all verbs: one look for the same thing.

Knows rich. Knows nothing of what is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Report = Callable[[str, int, int], None]
"""(what is counted, how many are done, how many there are) -> None."""


def make_table(
    columns: Sequence[str],
    *,
    title: str | None = None,
    numbers: Collection[str] = (),
    folds: bool = False,
    framed: bool = True,
) -> Table:
    """Make an empty table.

    Args:
        columns: Headings, in order.
        title: Line above the table.
        numbers: Headings of the columns that are aligned to the right.
        folds: Whether long cells go over several lines; else rich cuts them with an ellipsis.
        framed: Whether there are lines around it.
    """
    table = Table(title=title) if framed else Table(title=title, box=None)
    for heading in columns:
        table.add_column(
            heading,
            justify="right" if heading in numbers else "left",
            overflow="fold" if folds else "ellipsis",
        )
    return table


def make_progress(
    console: Console,
    *,
    counts: bool = False,
    notes: bool = False,
    elapsed: bool = True,
    remaining: bool = False,
    transient: bool = False,
) -> Progress:
    """Make progress bars: a description, the bar, then what is chosen here.

    Args:
        console: Where they are drawn.
        counts: Show how many of how many.
        notes: Show the field `note`, which every task of the bars then has.
        elapsed: Show the time so far.
        remaining: Show the time left.
        transient: Remove the bars when they are left.
    """
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    if counts:
        columns.append(MofNCompleteColumn())
    if notes:
        columns.append(TextColumn("{task.fields[note]}"))
    if elapsed:
        columns.append(TimeElapsedColumn())
    if remaining:
        columns.append(TimeRemainingColumn())
    return Progress(*columns, console=console, transient=transient)


@contextmanager
def counting(description: str, *, quiet: bool) -> Iterator[Report]:
    """Show a bar per counted thing on stderr; nothing where `quiet`, or where no terminal watches."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda name, done, total: None
        return
    with make_progress(console, counts=True, elapsed=False, remaining=True, transient=True) as progress:
        bars = {description: progress.add_task(description, total=None)}

        def report(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done, total=total)

        yield report


def yes_or_no(success: bool | None, unknown: str = "") -> str:
    """Word a success for a cell of a table."""
    if success is None:
        return unknown
    return "yes" if success else "no"
