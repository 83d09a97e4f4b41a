"""What `ratchet run` tells: the times before anything moves, each episode as plain data, and the table at the end."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.recorder.client import Recorder
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Mark
from ratchet_vla.runtime.control.loop import ControlLoop, EpisodeEnd
from ratchet_vla.runtime.control.sink import MemorySink


def report(state: int, end: EpisodeEnd, sink: MemorySink, loop: ControlLoop) -> dict[str, Any]:
    """One episode as plain data."""
    sent = [t for t in sink.ticks if t.chunk_sequence >= 0]
    return {
        "initial_state": state,
        "success": end.success,
        "termination": end.termination.value,
        "reason": end.reason,
        "ticks": end.ticks,
        "seconds": round(end.seconds, 3),
        "chunks": len(sink.chunks),
        "exactly_as_sampled": sum(t.marks == Mark.NONE for t in sent) / max(len(sent), 1),
        "events": dict(Counter(e.code for e in sink.events)),
        "missed_ticks": loop.timing.missed,
        **{k: round(v, 6) for k, v in loop.timing.percentiles().items()},
    }


def kept(recorder: Recorder | None) -> dict[str, str]:
    """The id under which the last episode is kept, or why it is not."""
    if recorder is None:
        return {"episode": "", "not_recorded": ""}
    try:
        return {"episode": recorder.wait_ended(60.0), "not_recorded": ""}
    except RatchetError as error:
        return {"episode": "", "not_recorded": str(error)}


def print_times(console: Console, contract: RobotContract) -> None:
    """When the arm will hold, before it does anything."""
    times = dataclasses.asdict(contract.watchdog)
    jerk = "none" if not contract.limits.jerk else ", ".join(f"{j:g}" for j in contract.limits.jerk)
    console.print(
        f"holds when: state or frames older than {times['observation_max_age']:g} s, an action "
        f"{times['action_max_age']:g} s late, no answer for {times['policy_timeout']:g} s; stops within "
        f"{times['stop_time']:g} s; ramp {contract.limits.ramp_time:g} s; jerk limits: {jerk}\n"
    )


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for column in ("state", "success", "ended by", "ticks", "as sampled", "missed", "events", "episode"):
        table.add_column(column, justify="left" if column in ("ended by", "events", "episode") else "right")
    for row in rows:
        events = ", ".join(f"{code.split('.')[-1]} {n}" for code, n in row["events"].items()) or "none"
        solved = "?" if row["success"] is None else "yes" if row["success"] else "no"
        table.add_row(
            str(row["initial_state"]),
            solved,
            row["termination"],
            str(row["ticks"]),
            f"{row['exactly_as_sampled']:.0%}",
            str(row["missed_ticks"]),
            events,
            row["not_recorded"] or row["episode"][:12],
        )
    return table
