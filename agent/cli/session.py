"""`ratchet session start|stop|status`: a robot's sessions, from powered up to powered down."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from agent.contract import RobotContract
from agent.runtime.session import Session
from agent.runtime.session_desk import CURRENT, SESSIONS, WISH, episodes_of, wish
from calibration import last_check

ROBOT = Path("runs/robot")


@dataclass
class Start:
    """Open a session: from now on the robot collects."""

    robot: Path = ROBOT
    """The robot's folder."""
    note: str = ""
    """Kept in the manifest: who, where, what is special."""
    contract: Path | None = None
    """Robot contract: its cameras must have been checked for having moved; see `ratchet calibrate drift`."""
    calibrations: Path = Path("calibrations")
    """Folder of calibrations, with --contract."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        notes: dict[str, Any] = {"note": self.note} if self.note else {}
        if self.contract is not None:
            notes["cameras"] = last_check.require(self.calibrations, RobotContract.load(self.contract))
        wish(self.robot, "start", notes=notes)
        return _told("start", self.json)


@dataclass
class Stop:
    """End the session: the robot stops collecting, tells the learner, and the learner updates."""

    robot: Path = ROBOT
    """The robot's folder."""
    reason: str = "stopped"
    """Kept in the manifest."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        wish(self.robot, "stop", reason=self.reason)
        return _told("stop", self.json)


@dataclass
class Status:
    """Sessions of a robot: contract, base, adapters, episodes."""

    robot: Path = ROBOT
    """The robot's folder."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        current = self.robot / CURRENT
        opened = json.loads(current.read_text())["session"] if current.exists() else ""
        rows: list[dict[str, Any]] = []
        folder = self.robot / SESSIONS
        for place in sorted(folder.iterdir()) if folder.is_dir() else []:
            manifest = dataclasses.asdict(Session.read(place))
            episodes = episodes_of(self.robot / "outbox", place.name)
            rows.append({**manifest, "open": place.name == opened, "episodes": episodes})
        wished = (self.robot / WISH).exists()
        if self.json:
            print(json.dumps({"open": opened, "wish_pending": wished, "sessions": rows}))
            return 0
        table = Table()
        for column in ("session", "started", "ended", "episodes", "adapters", "contract", "base"):
            table.add_column(column)
        for row in rows:
            ended = "open" if row["open"] else row["ended"][:19] or "cut off"
            adapters = " ".join(i[:8] for _, i in row["adapters"])
            facts = (str(len(row["episodes"])), adapters, row["contract_id"][:8], row["base_hash"][:8])
            table.add_row(row["session"], row["started"][:19], ended, *facts)
        Console().print(table)
        if wished:
            Console().print("a wish is waiting for the robot's process; is `ratchet robot` running?")
        return 0


@dataclass
class SessionCommand:
    """Start and end the sessions of a robot, and see what belongs to each.

    Commands to copy:

        ratchet session start --robot runs/robot --note "new cups, left light off"

        ratchet session stop --robot runs/robot

        ratchet session status --robot runs/robot --json
    """

    command: Annotated[
        Annotated[Start, tyro.conf.subcommand("start")]
        | Annotated[Stop, tyro.conf.subcommand("stop")]
        | Annotated[Status, tyro.conf.subcommand("status")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        return self.command.run()


def _told(action: str, as_json: bool) -> int:
    print(json.dumps({"wished": action}) if as_json else f"{action}: the robot's process does it when it next looks")
    return 0
