"""`ratchet calibrate capture|intrinsics|cameras`: images of a board, a lens, and whether a camera is the right one.

Knows folders of images, devices and the screen. The measurements are calibration's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ratchet_calibration import report
from ratchet_calibration.boards import coverage
from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import Detection, detect
from ratchet_calibration.cameras import checks as camera_checks
from ratchet_calibration.cameras import intrinsics
from ratchet_calibration.cameras.model import Model
from ratchet_calibration.store.folder import CalibrationStore
from ratchet_vla.cli import display
from ratchet_vla.cli.calibrate import screen_latency
from ratchet_vla.cli.calibrate.lens import Origin, measure_lens, read_board
from ratchet_vla.cli.calibrate.store import CALIBRATIONS
from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.cameras.devices import DeviceKind, open_device
from ratchet_vla.runtime.cameras.newest import NewestFrame

SHADES = " ░▒▓█"  # by how many views cover a cell
# A view closer to a kept one than all of these shows nothing new.
SAME_CELLS = 0.6  # share of the image's cells that both cover
SAME_TILT = 0.15  # distance of the tilts, as `coverage.View` has them
SAME_SCALE = 0.15  # logarithm of the ratio of the scales


@dataclass
class Capture:
    """Take images of a board from a live camera: keeps the sharp ones that show something new, says what is missing.

    Ends by itself when the image is covered from all sides, or with Ctrl-C.
    """

    out: Annotated[Path, tyro.conf.Positional]
    """Folder that the images are written into."""
    source: str = "0"
    """Camera: serial number, /dev/videoN or N; with --device recorded a video file or folder."""
    device: DeviceKind = "uvc"
    """Kind of camera: uvc (USB), realsense, or recorded (files)."""
    board: Path = Path("board.json")
    """Description of the board (JSON), as `calibrate board` wrote it."""
    width: int = 640
    """Width of the images in pixels."""
    height: int = 480
    """Height of the images in pixels."""
    fps: float = 30.0
    """Frames per second."""
    most: int = 60
    """How many images to take at the most."""
    seconds: float = 300.0
    """Give up after so many seconds."""

    def run(self) -> int:
        board = read_board(self.board)
        spec = CameraSpec("camera", self.width, self.height)
        camera = NewestFrame(open_device(self.device, self.source, spec, self.fps), self.source)
        self.out.mkdir(parents=True, exist_ok=True)
        kept: list[Detection] = []
        views: list[coverage.View] = []
        stamp_s = float("-inf")
        end_s = time.monotonic() + self.seconds
        try:
            with Live(console=Console(), refresh_per_second=8) as live:
                while len(kept) < self.most and time.monotonic() < end_s:
                    frame, stamp_s = camera.newest(stamp_s)
                    note = ""
                    try:
                        detection = detect(board, frame, f"{len(kept):03d}.png")
                        view = coverage.describe(board, detection)
                        if news(view, views):
                            cv2.imwrite(str(self.out / detection.name), frame[..., ::-1])
                            kept.append(detection)
                            views.append(view)
                    except RatchetError as error:
                        note = error.what
                    covered = coverage.measure(board, kept)
                    live.update(guidance(covered, len(kept), note))
                    if not covered.missing:
                        break
        except KeyboardInterrupt:
            pass  # the person has enough images; those are counted below
        finally:
            camera.close()
        Console().print(f"{len(kept)} images in {self.out}")
        return 0 if len(kept) >= intrinsics.LEAST_VIEWS else 1


@dataclass
class Intrinsics:
    """Estimate a camera's lens from images of a board, with its uncertainty; store it under its id."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the images."""
    camera: str
    """Name of the camera in the contract."""
    board: Path = Path("board.json")
    """Description of the board, as `calibrate board` wrote it."""
    model: Model = "brown5"
    """Distortion model: none, radial (k1 k2), brown5, rational8, fisheye."""
    serial: str = ""
    """Serial number of the camera; kept with the calibration."""
    robot: str = ""
    """Name of the robot; kept with the calibration."""
    robot_serial: str = ""
    """Serial number of the robot; kept with the calibration."""
    store: Path = CALIBRATIONS
    """Folder of the calibration store."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        console = Console(stderr=self.json, width=100)
        origin = Origin(self.camera, self.serial, self.robot, self.robot_serial)
        board = read_board(self.board)
        stored, result, rejected = measure_lens(
            self.folder, origin, board, self.model, CalibrationStore(self.store), console
        )
        if self.json:
            page = self.store / stored.id / "report.html"
            head = {"id": stored.id, "report": str(page), "refused": rejected}
            print(json.dumps(head | report.as_dict(result, None)))
        return 0 if report.assess(stored)[0] else 1


@dataclass
class Cameras:
    """Check the cameras of a contract: identity by a wave test, exposure, rate and age of frames, orientation.

    Without a board the orientation is not checked; without --wave neither is which camera is which.
    """

    contract: Path
    """Robot contract (YAML)."""
    device: DeviceKind = "uvc"
    """Kind of the cameras: uvc (USB), realsense, or recorded (files)."""
    fps: float = 30.0
    """Frames per second."""
    wave: bool = False
    """Ask for a hand in front of each camera in turn, to see which camera is which."""
    board: Path | None = None
    """Description of a ChArUco board that is held upright in front of each camera."""
    latency: bool = False
    """Measure how late each camera shows what happens: this machine's screen blinks, the camera looks at it."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        contract = RobotContract.load(self.contract)
        screen = screen_latency.window() if self.latency else None
        console = Console(stderr=self.json, width=100)
        board = read_board(self.board) if self.board else None
        cameras: dict[str, NewestFrame] = {}
        rows: list[dict[str, Any]] = []
        try:
            # All are open while one is checked: a wave is to be seen by that one alone.
            for spec in contract.cameras:
                cameras[spec.name] = NewestFrame(open_device(self.device, spec.source, spec, self.fps), spec.name)
            for spec in contract.cameras:
                if self.wave:
                    self._require_wave(spec, cameras)
                rows.append(self._check(spec, cameras[spec.name], board))
                if screen is not None:
                    input(f"Point the camera '{spec.name}' at this screen, then press Enter: ")
                    rows[-1]["latency"] = screen_latency.measure(cameras[spec.name], screen).seconds
        finally:
            for camera in cameras.values():
                camera.close()
        console.print(_check_table(contract.name, rows))
        if self.json:
            print(json.dumps(rows))
        return 1 if any(row["exposure"] for row in rows) else 0

    def _require_wave(self, spec: CameraSpec, cameras: Mapping[str, NewestFrame]) -> None:
        """Refuse cameras that are mixed up: the one that sees the hand must be this one."""
        input(f"Wave in front of the camera '{spec.name}', then press Enter while you wave: ")
        frames = {name: camera.series(int(self.fps))[0] for name, camera in cameras.items()}
        camera_checks.require_identity(spec, camera_checks.waved_at(frames))

    def _check(self, spec: CameraSpec, camera: NewestFrame, board: Board | None) -> dict[str, Any]:
        frames, stamps = camera.series(int(2 * self.fps), timeout=10.0)
        rate = camera_checks.rate(stamps, frames)
        turned = ""
        if board is not None:
            camera_checks.require_orientation(spec, camera_checks.orientation(board, np.ascontiguousarray(frames[-1])))
            turned = f"{spec.rotate} degrees{', mirrored' if spec.mirror else ''}"
        return {
            "camera": spec.name,
            "fps": rate.fps,
            "longest": rate.longest,
            "repeated": rate.repeated,
            "age": time.monotonic() - camera.newest()[1],
            "exposure": camera_checks.exposure(frames[-10:]).problem,
            "orientation": turned,
        }


def _check_table(contract_name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("camera", "fps", "longest gap ms", "age ms", "latency ms", "exposure", "orientation")
    table = display.make_table(columns, title=f"cameras of {contract_name}")
    for row in rows:
        table.add_row(
            row["camera"],
            f"{row['fps']:.1f}",
            f"{1e3 * row['longest']:.0f}",
            f"{1e3 * row['age']:.0f}",
            f"{1e3 * row['latency']:.0f}" if "latency" in row else "not measured",
            row["exposure"] or "good",
            row["orientation"] or "not checked",
        )
    return table


def news(view: coverage.View, views: Sequence[coverage.View]) -> bool:
    """Return whether a view is unlike all that were kept: another place, tilt or distance."""
    for kept in views:
        shared = len(view.cells & kept.cells) / max(len(view.cells | kept.cells), 1)
        tilted = np.hypot(view.tilt[0] - kept.tilt[0], view.tilt[1] - kept.tilt[1])
        scaled = abs(np.log(view.scale / kept.scale))
        if shared > SAME_CELLS and tilted < SAME_TILT and scaled < SAME_SCALE:
            return False
    return True


def guidance(covered: coverage.Coverage, count: int, note: str) -> Table:
    """Draw the coverage map, and say what to show next."""
    table = Table.grid(padding=(0, 2))
    lines = []
    for row in covered.counts:
        shades = [SHADES[min(int(views), len(SHADES) - 1)] for views in row]
        lines.append("".join(2 * shade for shade in shades))  # a character is about half as wide as high
    advice = [
        f"{count} images, {covered.share:.0%} of the image covered",
        *(f"show {view}" for view in covered.missing[:4]),
        note,
    ]
    table.add_row("\n".join(lines), "\n".join(advice))
    return table
