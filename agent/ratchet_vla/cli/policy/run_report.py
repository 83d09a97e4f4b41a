"""What `ratchet run` prints: the times before anything moves, each episode as plain data, and the table at the end."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from ratchet_vla.cli import display
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.recorder.client import Recorder
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Mark
from ratchet_vla.runtime.control.loop import ControlLoop, EpisodeEnd
from ratchet_vla.runtime.control.sink import MemorySink

ENDED_S = 60.0  # how long an episode's file may take to be closed and entered


def report(state: int, end: EpisodeEnd, sink: MemorySink, loop: ControlLoop) -> dict[str, Any]:
    """Return one episode as plain data.

    Args:
        state: Id of the initial state.
        end: How the episode ended.
        sink: What the loop did, tick by tick.
        loop: The loop that ran it, for its timing.
    """
    # -1 marks a tick for which the policy had proposed nothing.
    policy_ticks = [tick for tick in sink.ticks if tick.chunk_sequence >= 0]
    unchanged = sum(tick.marks == Mark.NONE for tick in policy_ticks)
    return {
        "initial_state": state,
        "success": end.success,
        "termination": end.termination.value,
        "reason": end.reason,
        "ticks": end.ticks,
        "seconds": round(end.seconds, 3),
        "chunks": len(sink.chunks),
        "exactly_as_sampled": unchanged / max(len(policy_ticks), 1),
        "events": dict(Counter(event.code for event in sink.events)),
        "missed_ticks": loop.timing.missed,
        **{name: round(seconds, 6) for name, seconds in loop.timing.percentiles().items()},
    }


def kept(recorder: Recorder | None) -> dict[str, str]:
    """Return the id under which the last episode is kept, or why it is not."""
    if recorder is None:
        return {"episode": "", "not_recorded": ""}
    try:
        return {"episode": recorder.wait_ended(ENDED_S), "not_recorded": ""}
    except RatchetError as error:
        return {"episode": "", "not_recorded": str(error)}


def print_times(console: Console, contract: RobotContract) -> None:
    """Print when the arm will hold, before it does anything."""
    times = dataclasses.asdict(contract.watchdog)
    jerk = ", ".join(f"{limit:g}" for limit in contract.limits.jerk) if contract.limits.jerk else "none"
    console.print(
        f"holds when: state or frames older than {times['observation_max_age']:g} s, an action "
        f"{times['action_max_age']:g} s late, no answer for {times['policy_timeout']:g} s; stops within "
        f"{times['stop_time']:g} s; ramp {contract.limits.ramp_time:g} s; jerk limits: {jerk}\n"
    )


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """Make the table of all episodes from what `report` and `kept` return."""
    columns = ("state", "success", "ended by", "ticks", "as sampled", "missed", "events", "episode")
    numbers = ("state", "success", "ticks", "as sampled", "missed")
    table = display.make_table(columns, title=title, numbers=numbers)
    for row in rows:
        events = ", ".join(f"{code.split('.')[-1]} {count}" for code, count in row["events"].items())
        table.add_row(
            str(row["initial_state"]),
            display.yes_or_no(row["success"], unknown="?"),
            row["termination"],
            str(row["ticks"]),
            f"{row['exactly_as_sampled']:.0%}",
            str(row["missed_ticks"]),
            events or "none",
            row["not_recorded"] or row["episode"][:12],
        )
    return table
