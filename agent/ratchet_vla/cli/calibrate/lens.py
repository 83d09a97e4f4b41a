"""A lens from a folder of images of a board: read, estimated, stored and shown, for every verb that needs one.

Knows files and the screen. The estimate is calibration's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track

from ratchet_calibration import report
from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import Detection, detect
from ratchet_calibration.cameras import intrinsics
from ratchet_calibration.cameras.model import Model
from ratchet_calibration.store.folder import CalibrationStore
from ratchet_calibration.store.record import Calibration
from ratchet_vla.cli import common, display
from ratchet_vla.errors import RatchetError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Origin:
    """What a calibration is of: the camera's name in the contract, and what else is known of camera and robot."""

    camera: str
    camera_serial: str = ""
    robot: str = ""
    robot_serial: str = ""


def measure_lens(
    folder: Path,
    origin: Origin,
    board: Board,
    model: Model,
    store: CalibrationStore,
    console: Console,
) -> tuple[Calibration, intrinsics.IntrinsicsResult, dict[str, str]]:
    """Estimate a lens from a folder of images, store and show it.

    Returns:
        The stored calibration, the estimate, and why images were left out, by file name.
    """
    detections, rejected, encoded = read_views(folder, board, console)
    result = intrinsics.calibrate(board, detections, model)
    calibration = Calibration(
        camera=origin.camera,
        model=result.camera,
        board=board,
        date=common.now(),
        rms=result.rms,
        held_out_rms=result.held_out_rms,
        views=sum(view.used for view in result.views),
        camera_serial=origin.camera_serial,
        robot=origin.robot,
        robot_serial=origin.robot_serial,
    )
    kept = {detection.name: encoded[detection.name] for detection in detections}
    stored = store.put(calibration, kept, lambda identified: report.write(identified, result))
    show_lens(console, stored, result, rejected)
    console.print(f"calibration {stored.id[:12]}, report: {store.root / stored.id / 'report.html'}", soft_wrap=True)
    return stored, result, rejected


def read_board(path: Path) -> Board:
    """Read the description of a board.

    Raises:
        RatchetError: calibration.no_description, calibration.bad_board.
    """
    if not path.is_file():
        raise RatchetError(
            "calibration.no_description", "no description of the board", where=str(path),
            fix="write one with `ratchet calibrate board`, and give it as --board",
        )  # fmt: skip
    try:
        return Board.from_dict(json.loads(path.read_text()), str(path))
    except json.JSONDecodeError as error:
        raise RatchetError("calibration.bad_board", str(error), where=str(path)) from None


def read_views(
    folder: Path, board: Board, console: Console
) -> tuple[list[Detection], dict[str, str], dict[str, bytes]]:
    """Look for the board in every image of a folder.

    Returns:
        The board in every usable image; why the others are not usable, and all files' bytes, by file name.

    Raises:
        RatchetError: calibration.no_images; and the commonest reason where no image is usable.
    """
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    paths = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise RatchetError("calibration.no_images", "no images there", where=str(folder), fix="name the folder")
    detections: list[Detection] = []
    rejected: dict[str, str] = {}
    encoded: dict[str, bytes] = {}
    errors: list[RatchetError] = []
    for path in track(paths, "looking for the board", console=console, transient=True):
        encoded[path.name] = path.read_bytes()
        image = cv2.imdecode(np.frombuffer(encoded[path.name], np.uint8), cv2.IMREAD_COLOR)
        try:
            if image is None:
                raise RatchetError("calibration.bad_image", "cannot be decoded", where=path.name)
            detections.append(detect(board, np.asarray(image, np.uint8), path.name))
        except RatchetError as error:
            rejected[path.name] = f"[{error.code}] {error.what}"
            errors.append(error)
    if not detections:
        codes = [error.code for error in errors]
        raise errors[codes.index(max(set(codes), key=codes.count))]
    return detections, rejected, encoded


def show_lens(
    console: Console, calibration: Calibration, result: intrinsics.IntrinsicsResult, rejected: dict[str, str]
) -> None:
    """Print an estimated lens with its uncertainty, and what would make it better."""
    lens = result.camera
    numbers = ("value", "± 2 deviations")
    title = f"{calibration.camera}, {lens.width} x {lens.height}, {lens.model}"
    table = display.make_table(("", *numbers), title=title, numbers=numbers)
    # The deviations are of fx, fy, cx, cy, then of the distortion's coefficients.
    names = ("fx", "fy", "cx", "cy")
    for name, deviation in zip(names, lens.deviations, strict=False):
        table.add_row(f"{name} px", f"{getattr(lens, name):.2f}", f"{2 * deviation:.2f}")
    for number, value in enumerate(lens.distortion, 1):
        deviation = lens.deviations[len(names) + number - 1]
        table.add_row(f"distortion {number}", f"{value:.5f}", f"{2 * deviation:.5f}")
    table.add_row("error of used views px", f"{result.rms:.3f}", "")
    table.add_row("held-out error px", f"{result.held_out_rms:.3f}", "")
    console.print(table)
    print_rejected(console, rejected | result.rejected)
    for warning in result.warnings:
        console.print(f"better next time: {warning}", highlight=False)
    console.print(report.assess(calibration)[1])


def print_rejected(console: Console, reasons: Mapping[str, str]) -> None:
    """Print which images were left out, and why; by file name."""
    for name, reason in reasons.items():
        console.print(f"left out {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
