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

from ratchet_calibration.store import last_check
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.session import robot_folder
from ratchet_vla.runtime.session.dispatch import recorded
from ratchet_vla.runtime.session.manifest import Session

ROBOT = Path("runs/robot")


@dataclass
class Start:
    """Open a session: from now on the robot collects. Its process answers, between two episodes."""

    robot: Path = ROBOT
    """Folder of the robot."""
    note: str = ""
    """Kept in the session's manifest: who, where, what is special."""
    contract: Path | None = None
    """Refuse unless the robot runs under this contract (YAML); whatever it runs under if absent."""
    calibrations: Path = Path("calibrations")
    """Folder of calibrations; cameras that the contract ties to one must have been checked with `calibrate drift`."""
    patience: float = 60.0
    """Seconds to wait for the robot's process."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        running = robot_folder.who(self.robot)
        if self.contract is not None:
            expected = RobotContract.load(self.contract)
            if expected.id != running.contract_id:
                raise RatchetError(
                    "session.other_contract",
                    f"the robot runs under {running.contract.get('name')} {running.contract_id[:12]}, not under "
                    f"{expected.name} {expected.id[:12]}",
                    where=str(self.robot),
                    fix="name the folder of the robot that you mean, or start it with this contract",
                )
        checks = last_check.require(self.calibrations, running.robot())
        notes = {"note": self.note} if self.note else {}
        session = robot_folder.ask(self.robot, "start", self.patience, notes=notes, checks=checks)
        return _print_state(session, "open", self.json)


@dataclass
class Stop:
    """End the session: the robot stops collecting, and the learner is told."""

    robot: Path = ROBOT
    """Folder of the robot."""
    reason: str = "stopped"
    """Why it ends; kept in the session's manifest."""
    patience: float = 60.0
    """Seconds to wait for the robot's process."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        session = robot_folder.ask(self.robot, "stop", self.patience, reason=self.reason)
        return _print_state(session, "ended", self.json)


@dataclass
class Status:
    """List the sessions of a robot: contract, base, adapters, episodes."""

    robot: Path = ROBOT
    """Folder of the robot."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        current = robot_folder.read(self.robot / robot_folder.CURRENT)
        opened = "" if current is None else str(current["session"])
        folder = self.robot / robot_folder.SESSIONS
        if not folder.is_dir():
            robot_folder.who(self.robot)  # says why there are none
        rows = self._rows(folder, opened)
        if self.json:
            print(json.dumps({"open": opened, "running": self._running(), "sessions": rows}))
            return 0
        Console().print(_session_table(rows))
        if not self._running():
            Console().print("the robot's process is not running")
        return 0

    def _rows(self, folder: Path, opened: str) -> list[dict[str, Any]]:
        """The sessions as plain data, oldest first: a session's name is its start."""
        rows = []
        for session in sorted(folder.iterdir()) if folder.is_dir() else []:
            manifest = Session.read(session)
            episodes = manifest.episodes if manifest.ended else self._episodes_so_far(session.name)
            rows.append({**dataclasses.asdict(manifest), "open": session.name == opened, "episodes": episodes})
        return rows

    def _running(self) -> bool:
        try:
            robot_folder.who(self.robot)
        except RatchetError:
            return False
        return True

    def _episodes_so_far(self, session: str) -> list[dict[str, Any]]:
        """The episodes of a session whose manifest does not list them yet: it is open, or was cut off."""
        store = (robot_folder.read(self.robot / robot_folder.ROBOT) or {}).get("episodes", "")
        return recorded(store, session)


def _session_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("session", "ended", "episodes", "adapters", "contract", "base"):
        table.add_column(heading, no_wrap=heading != "adapters")
    for row in rows:
        table.add_row(
            row["session"],
            "open" if row["open"] else row["ended"][:19] or "cut off",
            str(len(row["episodes"])),
            " ".join(identity[:8] for _, identity in row["adapters"]),
            row["contract_id"][:8],
            row["base_hash"][:8],
        )
    return table


@dataclass
class SessionCommand:
    """Start and end the sessions of a robot, and see what belongs to each.

    Commands to copy:

        ratchet session start --robot runs/robot --note "new cups, left light off"

        ratchet session start --robot runs/left --contract robots/ur5e.yaml

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


def _print_state(session: str, state: str, as_json: bool) -> int:
    print(json.dumps({"session": session, "state": state}) if as_json else f"session {session} is {state}")
    return 0
