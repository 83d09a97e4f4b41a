"""`ratchet report`: write a run folder's HTML page again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ratchet_vla.learner.report.page import print_matrix, write_report
from ratchet_vla.learner.report.run_folder import load_run


@dataclass
class Report:
    """Write the HTML report of a run folder and print its success matrix.

    Commands to copy:

        ratchet report runs/demo
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    json: bool = False
    """Print the matrix as JSON."""

    def run(self) -> int:
        run = load_run(self.folder)
        path = write_report(self.folder)
        if self.json:
            print(json.dumps({"report": str(path), "matrix": run.matrix.to_dict() if run.matrix else None}))
            return 0
        console = Console()
        if run.matrix is not None:
            print_matrix(run.matrix, console)
        console.print(f"report: {path}")
        return 0
