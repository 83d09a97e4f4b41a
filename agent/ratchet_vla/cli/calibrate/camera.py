"""`ratchet calibrate capture|intrinsics|cameras`: images of a board, a lens, and whether a camera is the right one.

Knows folders of images, devices and the screen. The measurements are calibration's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import tyro
from rich.console import Console
from rich.live import Live
from rich.progress import track
from rich.table import Table

from ratchet_calibration import report
from ratchet_calibration.boards import coverage
from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import Detection, detect
from ratchet_calibration.cameras import checks as camera_checks
from ratchet_calibration.cameras import intrinsics
from ratchet_calibration.cameras.model import Model
from ratchet_calibration.store.folder import CalibrationStore
from ratchet_calibration.store.record import Calibration
from ratchet_vla.cli import common
from ratchet_vla.cli.calibrate import screen_latency
from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.cameras.devices import open_device
from ratchet_vla.runtime.cameras.newest import NewestFrame

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
Kind = Literal["uvc", "realsense", "recorded"]


@dataclass
class Capture:
    """Take images of a board from a live camera: keeps the sharp ones that show something new, says what is missing.

    Ends by itself when the image is covered from all sides, or with Ctrl-C.
    """

    out: Annotated[Path, tyro.conf.Positional]
    """Folder for the images."""
    source: str = "0"
    """Serial, /dev/videoN or N, video file or folder."""
    device: Kind = "uvc"
    """Kind of camera."""
    board: Path = Path("board.json")
    """Description of the board."""
    width: int = 640
    """Pixels."""
    height: int = 480
    """Pixels."""
    fps: float = 30.0
    """Frames per second."""
    most: int = 60
    """Images at the most."""
    seconds: float = 300.0
    """Give up after so long."""

    def run(self) -> int:
        board = read_board(self.board)
        spec = CameraSpec("camera", self.width, self.height)
        camera = NewestFrame(open_device(self.device, self.source, spec, self.fps), self.source)
        self.out.mkdir(parents=True, exist_ok=True)
        kept: list[Detection] = []
        views: list[coverage.View] = []
        last, end = float("-inf"), time.monotonic() + self.seconds
        try:
            with Live(console=Console(), refresh_per_second=8) as live:
                while len(kept) < self.most and time.monotonic() < end:
                    frame, last = camera.newest(last)
                    note = ""
                    try:
                        found = detect(board, frame, f"{len(kept):03d}.png")
                        view = coverage.describe(board, found)
                        if news(view, views):
                            cv2.imwrite(str(self.out / found.name), frame[..., ::-1])
                            kept.append(found)
                            views.append(view)
                    except RatchetError as error:
                        note = error.what
                    seen = coverage.measure(board, kept)
                    live.update(guidance(seen, len(kept), note))
                    if not seen.missing:
                        break
        except KeyboardInterrupt:
            pass
        finally:
            camera.close()
        Console().print(f"{len(kept)} images in {self.out}")
        return 0 if len(kept) >= intrinsics.LEAST_VIEWS else 1


@dataclass
class Intrinsics:
    """A camera's lens from images of a board, with what it is uncertain about; stored under its id."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of images."""
    camera: str
    """Name of the camera in the contract."""
    board: Path = Path("board.json")
    """Description of the board, as `calibrate board` wrote it."""
    model: Model = "brown5"
    """Distortion model: none, radial (k1 k2), brown5, rational8, fisheye."""
    serial: str = ""
    """Serial of the camera."""
    robot: str = ""
    """Name of the robot."""
    robot_serial: str = ""
    """Serial of the robot."""
    store: Path = Path("calibrations")
    """Folder of calibrations."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        console = Console(stderr=self.json, width=100)
        stored, result, rejected = measure_lens(
            self.folder,
            self.camera,
            read_board(self.board),
            self.model,
            CalibrationStore(self.store),
            console,
            serial=self.serial,
            robot=self.robot,
            robot_serial=self.robot_serial,
        )
        if self.json:
            page = self.store / stored.id / "report.html"
            print(
                json.dumps({"id": stored.id, "report": str(page), "refused": rejected} | report.as_dict(result, None))
            )
        return 0 if report.assess(stored)[0] else 1


@dataclass
class Cameras:
    """Check the cameras of a contract: identity by a wave test, exposure, rate and age of frames, orientation.

    Without a board the orientation is not checked; without --wave neither is which camera is which.
    """

    contract: Path
    """Robot contract."""
    device: Kind = "uvc"
    """Kind of cameras."""
    fps: float = 30.0
    """Frames per second."""
    wave: bool = False
    """Ask for a hand in front of each camera in turn."""
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
        open_ones: dict[str, NewestFrame] = {}
        rows: list[dict[str, Any]] = []
        try:
            for spec in contract.cameras:
                open_ones[spec.name] = NewestFrame(open_device(self.device, spec.source, spec, self.fps), spec.name)
            for spec in contract.cameras:
                if self.wave:
                    input(f"Wave in front of the camera '{spec.name}', then press Enter while you wave: ")
                    seen = {n: c.series(int(self.fps))[0] for n, c in open_ones.items()}
                    camera_checks.require_identity(spec, camera_checks.waved_at(seen))
                rows.append(self._one(spec, open_ones[spec.name], board))
                if screen is not None:
                    input(f"Point the camera '{spec.name}' at this screen, then press Enter: ")
                    rows[-1]["latency"] = screen_latency.measure(open_ones[spec.name], screen).seconds
        finally:
            for camera in open_ones.values():
                camera.close()
        table = Table(title=f"cameras of {contract.name}")
        for column in ("camera", "fps", "longest gap ms", "age ms", "latency ms", "exposure", "orientation"):
            table.add_column(column)
        for r in rows:
            late = f"{1e3 * r['latency']:.0f}" if "latency" in r else "not measured"
            timing = (f"{r['fps']:.1f}", f"{1e3 * r['longest']:.0f}", f"{1e3 * r['age']:.0f}", late)
            table.add_row(r["camera"], *timing, r["exposure"] or "good", r["orientation"] or "not checked")
        console.print(table)
        if self.json:
            print(json.dumps(rows))
        return 1 if any(r["exposure"] for r in rows) else 0

    def _one(self, spec: CameraSpec, camera: NewestFrame, board: Board | None) -> dict[str, Any]:
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


def measure_lens(
    folder: Path,
    camera: str,
    board: Board,
    model: Model,
    store: CalibrationStore,
    console: Console,
    *,
    serial: str = "",
    robot: str = "",
    robot_serial: str = "",
) -> tuple[Calibration, intrinsics.IntrinsicsResult, dict[str, str]]:
    """Estimate a lens from a folder of images, store and show it; with why images were left out."""
    found, rejected, encoded = read_views(folder, board, console)
    result = intrinsics.calibrate(board, found, model)
    calibration = Calibration(
        camera=camera,
        model=result.camera,
        board=board,
        date=common.now(),
        rms=result.rms,
        held_out_rms=result.held_out_rms,
        views=sum(v.used for v in result.views),
        camera_serial=serial,
        robot=robot,
        robot_serial=robot_serial,
    )
    kept = {d.name: encoded[d.name] for d in found}
    stored = store.put(calibration, kept, lambda c: report.write(c, result))
    show_lens(console, stored, result, rejected)
    console.print(f"calibration {stored.id[:12]}, report: {store.root / stored.id / 'report.html'}", soft_wrap=True)
    return stored, result, rejected


def news(view: coverage.View, views: Sequence[coverage.View]) -> bool:
    """Whether a view is unlike all that were kept: another place, tilt or distance."""
    for other in views:
        shared = len(view.cells & other.cells) / max(len(view.cells | other.cells), 1)
        tilted = np.hypot(view.tilt[0] - other.tilt[0], view.tilt[1] - other.tilt[1])
        if shared > 0.6 and tilted < 0.15 and abs(np.log(view.scale / other.scale)) < 0.15:
            return False
    return True


def guidance(seen: coverage.Coverage, count: int, note: str) -> Table:
    """The coverage map, and what to show next."""
    table = Table.grid(padding=(0, 2))
    shades = " ░▒▓█"
    lines = ["".join(2 * shades[min(int(x), 4)] for x in row) for row in seen.counts]
    words = [
        f"{count} images, {seen.share:.0%} of the image covered",
        *(f"show {m}" for m in seen.missing[:4]),
        note,
    ]
    table.add_row("\n".join(lines), "\n".join(words))
    return table


def read_board(path: Path) -> Board:
    """Raises RatchetError calibration.no_description, calibration.bad_board."""
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
    """Every usable image of a folder, why the others are not, and all files as they are.

    Raises:
        RatchetError: calibration.no_images; and the commonest reason where no image is usable.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    if not files:
        raise RatchetError("calibration.no_images", "no images there", where=str(folder), fix="name the folder")
    found: list[Detection] = []
    rejected: dict[str, str] = {}
    encoded: dict[str, bytes] = {}
    errors: list[RatchetError] = []
    for path in track(files, "looking for the board", console=console, transient=True):
        encoded[path.name] = path.read_bytes()
        image = cv2.imdecode(np.frombuffer(encoded[path.name], np.uint8), cv2.IMREAD_COLOR)
        try:
            if image is None:
                raise RatchetError("calibration.bad_image", "cannot be decoded", where=path.name)
            found.append(detect(board, np.asarray(image, np.uint8), path.name))
        except RatchetError as error:
            rejected[path.name] = f"[{error.code}] {error.what}"
            errors.append(error)
    if not found:
        codes = [e.code for e in errors]
        raise errors[codes.index(max(set(codes), key=codes.count))]
    return found, rejected, encoded


def show_lens(
    console: Console, calibration: Calibration, result: intrinsics.IntrinsicsResult, rejected: dict[str, str]
) -> None:
    table = Table(title=f"{calibration.camera}, {result.camera.width} x {result.camera.height}, {result.camera.model}")
    for column in ("", "value", "± 2 deviations"):
        table.add_column(column, justify="left" if not column else "right")
    names = ("fx", "fy", "cx", "cy")
    for i, name in enumerate(names):
        table.add_row(f"{name} px", f"{getattr(result.camera, name):.2f}", f"{2 * result.camera.deviations[i]:.2f}")
    for i, value in enumerate(result.camera.distortion):
        table.add_row(f"distortion {i + 1}", f"{value:.5f}", f"{2 * result.camera.deviations[4 + i]:.5f}")
    table.add_row("error of used views px", f"{result.rms:.3f}", "")
    table.add_row("held-out error px", f"{result.held_out_rms:.3f}", "")
    console.print(table)
    for name, why in (rejected | result.rejected).items():
        console.print(f"left out {name}: {why}", markup=False, highlight=False, soft_wrap=True)
    for warning in result.warnings:
        console.print(f"better next time: {warning}", highlight=False)
    console.print(report.assess(calibration)[1])
