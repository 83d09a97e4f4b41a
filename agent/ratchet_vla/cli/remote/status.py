"""`ratchet status`: how a learner or a robot is doing, from the files that it keeps."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.service.telemetry import timeline
from ratchet_vla.storage.journal import read

OLD = 10.0  # seconds after which a status file says that nobody writes it any more


@dataclass
class Status:
    """Queue, stage, rates, last update, last gate and alerts of a learner; link, outbox and session of a robot.

    Commands to copy:

        ratchet status --learner runs/learner

        ratchet status --learner runs/learner --timeline

        ratchet status --robot runs/robot --json

    Exit 1 where an alert is on or the process is not running.
    """

    learner: Path | None = None
    """A learner's folder; runs/learner if neither is given."""
    robot: Path | None = None
    """A robot's folder."""
    timeline: bool = False
    """Print the learner's journal in words instead; its hash chain is checked."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        console = Console()
        folder = self.robot or self.learner or Path("runs/learner")
        if self.timeline:
            events = read(folder / "journal.jsonl")
            if self.json:
                print(json.dumps([{"n": e.n, "kind": e.kind, "data": e.data, "hash": e.hash} for e in events]))
            else:
                for line in timeline(events):
                    console.print(line, highlight=False, soft_wrap=True)
            return 0
        facts = _read(folder / "status.json")
        age = time.time() - float(facts.get("written", 0.0))
        facts["age"] = age
        # A file from the future was written before the clock was set back: ask whether its process lives.
        facts["running"] = -OLD < age < OLD or (age < 0 and _alive(facts.get("pid")))
        if self.json:
            print(json.dumps(facts))
        elif self.robot:
            _show_robot(facts, console)
        else:
            _show_learner(facts, console)
        return 0 if facts["running"] and not facts.get("alerts") and not facts.get("error") else 1


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError):
        raise RatchetError(
            "status.none",
            "no status there",
            where=str(path),
            fix="name the folder of a learner or a robot that has run",
        ) from None
    if not isinstance(raw, dict):
        raise RatchetError("status.none", "not a status file", where=str(path))
    return raw


def _alive(pid: object) -> bool:
    return isinstance(pid, int) and Path(f"/proc/{pid}").exists()


def _head(facts: dict[str, Any], what: str, console: Console) -> None:
    state = "running" if facts["running"] else f"[red]not running[/] (last sign {facts['age']:.0f} s ago)"
    console.print(f"{what}: {state}", highlight=False)
    if facts.get("error"):
        console.print(f"[red]{facts['error']}[/]", highlight=False)


def _show_learner(facts: dict[str, Any], console: Console) -> None:
    _head(facts, f"learner, {facts['phase']}, stage {facts['stage']}", console)
    for alert in facts["alerts"]:
        console.print(f"[bold red]ALERT[/] {alert['code']}: {alert['text']}", highlight=False)
    queue = Table(box=None)
    for column in ("task", "state", "updates"):
        queue.add_column(column)
    for row in facts["queue"]:
        queue.add_row(row["task"], row["state"], str(row["updates"]))
    console.print(queue)
    episodes = facts["episodes"]
    table = Table(box=None, show_header=False)
    table.add_row("episodes", ", ".join(f"{n} {k}" for k, n in episodes.items() if n) or "none")
    if facts["kept_out"]:
        table.add_row("kept out", ", ".join(f"{n} {code}" for code, n in sorted(facts["kept_out"].items())))
    table.add_row("training", facts["training"][:12] or "-")
    table.add_row("active", facts["active"][:12] or "base")
    last = facts["last_update"]
    if last:
        rate = f"{last['successes']}/{facts['last_update_episodes']}"
        end = last["facts"].get("skipped") or f"KL {last['facts'].get('approx_kl', 0):.4f}, {last['adapter'][:12]}"
        took = f" in {last['facts']['seconds']:.0f} s" if "seconds" in last["facts"] else ""
        table.add_row("last update", f"{last['task']} {last['update'] + 1}: success {rate}, {end}{took}")
    gate = facts["last_gate"]
    if gate:
        reasons = "; ".join(f"{r['task']} {r['text']}".strip() for r in gate["reasons"])
        table.add_row("last gate", f"{gate['decision']} {gate['candidate'][:12]}: {reasons}")
    for robot in facts["robots"]:
        report = robot["report"]
        waits = f"{report.get('waiting', 0)} files, {report.get('waiting_bytes', 0) / 1e6:.0f} MB waiting"
        table.add_row(f"robot {robot['name']}", f"{robot['age']:.0f} s ago, {report.get('doing', '')}, {waits}")
    link = facts["link"]
    table.add_row(
        "link",
        f"{link['received']} files, {link['bytes'] / 1e6:.0f} MB; refused {link['malformed']} malformed messages",
    )
    rates = facts["rates"]
    table.add_row(
        "rates",
        f"{rates['episodes_per_hour']:.0f} episodes/h, {rates['bytes_per_second'] / 1e6:.2f} MB/s "
        f"over {rates['seconds'] / 60:.0f} min",
    )
    table.add_row("disk", f"{facts['free_bytes'] / 1024**3:.1f} GiB free")
    console.print(table)


def _show_robot(facts: dict[str, Any], console: Console) -> None:
    _head(facts, f"robot {facts['robot']}, {facts['doing']}", console)
    link, box = facts["link"], facts["outbox"]
    table = Table(box=None, show_header=False)
    table.add_row("link", "up" if link["up"] else f"down: {link['error'] or 'no word from the learner'}")
    table.add_row(
        "outbox", f"{box['waiting']} files, {box['bytes'] / 1e6:.0f} MB waiting; {box['delivered']} delivered"
    )
    if facts["refused"]:
        table.add_row("refused", ", ".join(f"{n} {code}" for code, n in sorted(facts["refused"].items())))
    table.add_row("adapter", facts["adapter"][:12])
    table.add_row("session", facts["session"] or "none")
    console.print(table)
