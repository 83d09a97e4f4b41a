"""`ratchet doctor`: is everything there that a robot needs, and does the live graph fit the contract?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.cli.nodes import ros
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy import computing, device


def computing_finding() -> dict[str, str]:
    """Report the dtype that policies compute in here, and why."""
    processor = device.choose()
    choice = computing.choose(processor, "bfloat16")
    return {
        "level": "ok",
        "code": "doctor.computing",
        "what": f"policies compute in {choice.name}: {choice.reason}",
        "where": f"{processor}, {computing.processor()}" if processor.type == "cpu" else str(processor),
        "fix": "",
    }


@dataclass
class Doctor(ComputingOptions):
    """Check environment, middleware, shared memory and running nodes; compare the contract with live topics.

    Sends nothing to the arm. Exit status 1 where something has to be fixed.

    Commands to copy:

        ratchet doctor

        ratchet doctor --contract robots/ur5e.yaml --seconds 5
    """

    contract: Path | None = None
    """Robot contract (YAML) to compare the live topics with; topics are not checked if absent."""
    seconds: float = 3.0
    """How many seconds to listen to the topics."""
    running: bool = False
    """The safety node runs already: its commands are no error."""
    sim_time: bool = False
    """Topics carry a simulation's time, which their ages are measured in."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        if self.contract is not None:
            RobotContract.load(self.contract)
        request = {
            "contract": ros.absolute(self.contract),
            "seconds": self.seconds,
            "running": self.running,
            "sim_time": self.sim_time,
        }
        findings = [computing_finding()]
        try:
            findings += next(iter(ros.ask("doctor", request)))["findings"]
        except RatchetError as error:
            if error.code != "ros.no_environment":
                raise
            findings.append({"level": "error", "code": error.code, "what": error.what, "where": "", "fix": error.fix})
        if self.json:
            print(json.dumps(findings))
        else:
            table = Table("", "what", "where", "fix", width=100)
            colours = {"ok": "[green]ok[/]", "warn": "[yellow]look[/]", "error": "[bold red]fix[/]"}
            for finding in findings:
                table.add_row(colours[finding["level"]], finding["what"], finding["where"], finding["fix"])
            Console().print(table)
        return 1 if any(finding["level"] == "error" for finding in findings) else 0
