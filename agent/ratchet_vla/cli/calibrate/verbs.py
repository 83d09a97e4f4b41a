"""`ratchet calibrate …`: boards, cameras, arms and the calibrations that are stored of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ratchet_calibration import report
from ratchet_calibration.boards.board import Board as BoardDescription
from ratchet_calibration.store import export
from ratchet_calibration.store.folder import CalibrationStore
from ratchet_vla.cli import display
from ratchet_vla.cli.calibrate.arm import Actions, HandEye
from ratchet_vla.cli.calibrate.camera import Cameras, Capture, Intrinsics
from ratchet_vla.cli.calibrate.drift import Drift
from ratchet_vla.cli.calibrate.store import CALIBRATIONS
from ratchet_vla.cli.calibrate.use import Use


@dataclass
class Board:
    """Write a board to print: a PDF at true size with a ruler to check the printer, and its description beside it."""

    out: Annotated[Path, tyro.conf.Positional] = Path("board.pdf")
    """PDF file to write; the board's description goes beside it, into the same name with .json."""
    paper: Literal["a4", "a3", "a2", "letter"] = "a4"
    """Size of the page."""
    board: BoardDescription = field(default_factory=lambda: BoardDescription(columns=9, rows=6, square=0.03))
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        data = self.board.pdf(self.paper)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_bytes(data)
        description = self.out.with_suffix(".json")
        description.write_text(json.dumps(self.board.to_dict(), indent=1) + "\n")
        if self.json:
            print(json.dumps({"pdf": str(self.out), "board": self.board.to_dict()}))
        else:
            Console().print(
                f"{self.out}: print at 100 %, measure the ruler, glue it flat on a stiff plate. "
                f"Give {description} as --board to the other commands."
            )
        return 0


@dataclass
class ListCalibrations:
    """List the stored calibrations, newest last."""

    store: Path = CALIBRATIONS
    """Folder of the calibration store."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = CalibrationStore(self.store)
        calibrations = sorted(map(store.load, store.ids()), key=lambda calibration: calibration.date)
        if self.json:
            print(json.dumps([{"id": calibration.id} | calibration.to_dict() for calibration in calibrations]))
            return 0
        table = display.make_table(("id", "camera", "date", "size", "held-out px", "mounting", "assessment"))
        for calibration in calibrations:
            good, _ = report.assess(calibration)
            table.add_row(
                calibration.id[:12],
                calibration.camera,
                calibration.date[:16],
                f"{calibration.model.width}x{calibration.model.height}",
                f"{calibration.held_out_rms:.3f}",
                calibration.mount.mounting if calibration.mount else "intrinsics only",
                "good" if good else "not good",
            )
        Console(width=100).print(table)
        return 0


@dataclass
class Export:
    """Write a calibration for other programs: ROS CameraInfo (YAML), static transform (JSON), URDF."""

    calibration: Annotated[str, tyro.conf.Positional]
    """Id, its beginning, or the camera's name for its newest."""
    form: Literal["camera_info", "transform", "urdf"] = "camera_info"
    """What to write: camera_info (ROS, YAML), transform (JSON) or urdf."""
    store: Path = CALIBRATIONS
    """Folder of the calibration store."""
    out: Path | None = None
    """File to write; the terminal if absent."""

    def run(self) -> int:
        store = CalibrationStore(self.store)
        calibration = store.load(store.resolve(self.calibration))
        if self.form == "camera_info":
            text = export.camera_info_yaml(calibration)
        elif self.form == "urdf":
            text = export.urdf(calibration)
        else:
            text = json.dumps(export.static_transform(calibration), indent=1) + "\n"
        if self.out is None:
            print(text, end="")
        else:
            self.out.write_text(text)
        return 0


@dataclass
class Report:
    """Write a stored calibration's page again, and say where it is."""

    calibration: Annotated[str, tyro.conf.Positional]
    """Id, its beginning, or the camera's name for its newest."""
    store: Path = CALIBRATIONS
    """Folder of the calibration store."""

    def run(self) -> int:
        store = CalibrationStore(self.store)
        identity = store.resolve(self.calibration)
        page = self.store / identity / "report.html"
        calibration = store.load(identity)
        if not page.is_file():
            page.write_text(report.write(calibration))
        good, assessment = report.assess(calibration)
        Console(soft_wrap=True).print(f"{assessment}\n{page}", highlight=False)
        return 0 if good else 1


@dataclass
class Calibrate:
    """Calibrate cameras and check an arm, with uncertainty; every result is a folder under the id of its content.

    Commands to copy:

        ratchet calibrate board board.pdf --paper a4

        ratchet calibrate capture images --device uvc --source 0 --board board.json

        ratchet calibrate intrinsics images --camera front --serial 12345 --board board.json

        ratchet calibrate handeye hand --camera front --mounting eye_in_hand --board board.json

        ratchet calibrate cameras --contract robots/so101.yaml --device uvc

        ratchet calibrate actions --suite libero_object

        ratchet calibrate use front --contract robots/so101.yaml

        ratchet calibrate drift front --image now.png

        ratchet calibrate list
    """

    command: Annotated[
        Annotated[Board, tyro.conf.subcommand("board")]
        | Annotated[Capture, tyro.conf.subcommand("capture")]
        | Annotated[Intrinsics, tyro.conf.subcommand("intrinsics")]
        | Annotated[HandEye, tyro.conf.subcommand("handeye")]
        | Annotated[Cameras, tyro.conf.subcommand("cameras")]
        | Annotated[Actions, tyro.conf.subcommand("actions")]
        | Annotated[Use, tyro.conf.subcommand("use")]
        | Annotated[Drift, tyro.conf.subcommand("drift")]
        | Annotated[ListCalibrations, tyro.conf.subcommand("list")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Export, tyro.conf.subcommand("export")],
        tyro.conf.OmitSubcommandPrefixes,
    ]

    def run(self) -> int:
        return self.command.run()
