"""`ratchet status`: how a learner or a robot is doing, from the files that it keeps."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ratchet_vla.cli import display
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.service.telemetry import timeline
from ratchet_vla.storage.journal import read

OLD_S = 10.0  # a status file that is older says that nobody writes it any more


@dataclass
class Status:
    """Show how a learner or a robot is doing.

    Of a learner: queue, stage, rates, last update, last gate and alerts. Of a robot: link, outbox and session.

    Commands to copy:

        ratchet status --learner runs/learner

        ratchet status --learner runs/learner --timeline

        ratchet status --robot runs/robot --json

    Exit 1 where an alert is on or the process is not running.
    """

    learner: Path | None = None
    """Folder of a learner; runs/learner if neither is given."""
    robot: Path | None = None
    """Folder of a robot."""
    timeline: bool = False
    """Print the learner's journal in words instead; its hash chain is checked."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        console = Console()
        folder = self.robot or self.learner or Path("runs/learner")
        if self.timeline:
            self._show_timeline(folder, console)
            return 0
        status = _read(folder / "status.json")
        age_s = time.time() - float(status.get("written", 0.0))
        status["age"] = age_s
        # A file from the future was written before the clock was set back: ask whether its process lives.
        status["running"] = -OLD_S < age_s < OLD_S or (age_s < 0 and _alive(status.get("pid")))
        if self.json:
            print(json.dumps(status))
        elif self.robot:
            _show_robot(status, console)
        else:
            _show_learner(status, console)
        return 0 if status["running"] and not status.get("alerts") and not status.get("error") else 1

    def _show_timeline(self, folder: Path, console: Console) -> None:
        events = read(folder / "journal.jsonl")
        if self.json:
            rows = [{"n": event.n, "kind": event.kind, "data": event.data, "hash": event.hash} for event in events]
            print(json.dumps(rows))
            return
        for line in timeline(events):
            console.print(line, highlight=False, soft_wrap=True)


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


def _show_head(status: dict[str, Any], description: str, console: Console) -> None:
    running = "running" if status["running"] else f"[red]not running[/] (last sign {status['age']:.0f} s ago)"
    console.print(f"{description}: {running}", highlight=False)
    if status.get("error"):
        console.print(f"[red]{status['error']}[/]", highlight=False)


def _show_learner(status: dict[str, Any], console: Console) -> None:
    _show_head(status, f"learner, {status['phase']}, stage {status['stage']}", console)
    for alert in status["alerts"]:
        console.print(f"[bold red]ALERT[/] {alert['code']}: {alert['text']}", highlight=False)
    queue = display.make_table(("task", "state", "updates"), framed=False)
    for row in status["queue"]:
        queue.add_row(row["task"], row["state"], str(row["updates"]))
    console.print(queue)
    table = Table(box=None, show_header=False)
    counts = [f"{count} {kind}" for kind, count in status["episodes"].items() if count]
    table.add_row("episodes", ", ".join(counts) or "none")
    if status["kept_out"]:
        table.add_row("kept out", _counted(status["kept_out"]))
    table.add_row("training", status["training"][:12] or "-")
    table.add_row("active", status["active"][:12] or "base")
    if status["last_update"]:
        table.add_row("last update", _last_update(status["last_update"], status["last_update_episodes"]))
    gate = status["last_gate"]
    if gate:
        reasons = "; ".join(f"{reason['task']} {reason['text']}".strip() for reason in gate["reasons"])
        table.add_row("last gate", f"{gate['decision']} {gate['candidate'][:12]}: {reasons}")
    for robot in status["robots"]:
        report = robot["report"]
        waiting = f"{report.get('waiting', 0)} files, {report.get('waiting_bytes', 0) / 1e6:.0f} MB waiting"
        table.add_row(f"robot {robot['name']}", f"{robot['age']:.0f} s ago, {report.get('doing', '')}, {waiting}")
    link = status["link"]
    table.add_row(
        "link",
        f"{link['received']} files, {link['bytes'] / 1e6:.0f} MB; refused {link['malformed']} malformed messages",
    )
    rates = status["rates"]
    table.add_row(
        "rates",
        f"{rates['episodes_per_hour']:.0f} episodes/h, {rates['bytes_per_second'] / 1e6:.2f} MB/s "
        f"over {rates['seconds'] / 60:.0f} min",
    )
    table.add_row("disk", f"{status['free_bytes'] / 1024**3:.1f} GiB free")
    console.print(table)


def _last_update(update: dict[str, Any], episodes: int) -> str:
    """Success of the last update's episodes, and what it changed or why it changed nothing."""
    measured = update["facts"]
    outcome = measured.get("skipped") or f"KL {measured.get('approx_kl', 0):.4f}, {update['adapter'][:12]}"
    duration = f" in {measured['seconds']:.0f} s" if "seconds" in measured else ""
    rate = f"{update['successes']}/{episodes}"
    return f"{update['task']} {update['update'] + 1}: success {rate}, {outcome}{duration}"


def _show_robot(status: dict[str, Any], console: Console) -> None:
    _show_head(status, f"robot {status['robot']}, {status['doing']}", console)
    link = status["link"]
    outbox = status["outbox"]
    table = Table(box=None, show_header=False)
    table.add_row("link", "up" if link["up"] else f"down: {link['error'] or 'no word from the learner'}")
    waiting = f"{outbox['waiting']} files, {outbox['bytes'] / 1e6:.0f} MB waiting"
    table.add_row("outbox", f"{waiting}; {outbox['delivered']} delivered")
    if status["refused"]:
        table.add_row("refused", _counted(status["refused"]))
    table.add_row("adapter", status["adapter"][:12])
    table.add_row("session", status["session"] or "none")
    console.print(table)


def _counted(counts: dict[str, int]) -> str:
    """Codes with how often each came, in order of the codes."""
    return ", ".join(f"{count} {code}" for code, count in sorted(counts.items()))
