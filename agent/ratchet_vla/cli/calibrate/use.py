"""`ratchet calibrate use`: a calibration's id into the contract of the robot that has the camera."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ratchet_calibration import report
from ratchet_calibration.store.folder import CalibrationStore
from ratchet_calibration.store.tie import tie
from ratchet_vla.cli.calibrate.store import CALIBRATIONS


@dataclass
class Use:
    """Tie a contract's camera to its calibration.

    From then on every episode names the calibration, and a session starts only while the camera is where it was.
    Another camera's calibration is refused. The contract's id changes with it; comments and everything else in the
    file stay.
    """

    calibration: Annotated[str, tyro.conf.Positional]
    """Id, its beginning, or the camera's name for its newest."""
    contract: Path
    """Robot contract (YAML) to write into."""
    store: Path = CALIBRATIONS
    """Folder of the calibration store."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = CalibrationStore(self.store)
        calibration = store.load(store.resolve(self.calibration))
        before, after = tie(self.contract, calibration)
        good, assessment = report.assess(calibration)
        if self.json:
            document = {"calibration": calibration.id, "camera": calibration.camera, "good": good}
            print(json.dumps(document | {"contract": str(self.contract), "before": before.id, "after": after.id}))
            return 0
        console = Console(soft_wrap=True)
        if not good:
            console.print(assessment, style="yellow", markup=False)
        console.print(
            f"{self.contract}: camera '{calibration.camera}' is tied to {calibration.id[:12]}; "
            f"the contract's id was {before.id[:12]} and is {after.id[:12]}",
            highlight=False,
        )
        drift = f"ratchet calibrate drift {calibration.id[:12]} --store {self.store}"
        console.print(f"next: `{drift} --remember`, and without it before each session", markup=False, highlight=False)
        return 0
