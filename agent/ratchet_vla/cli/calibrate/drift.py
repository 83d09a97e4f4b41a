"""`ratchet calibrate drift`: has the camera moved since it was calibrated, and who says that it may run anyway.

Knows reference images in the store and devices. The comparison is ratchet_calibration.cameras.drift's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console

from ratchet_calibration.cameras import drift
from ratchet_calibration.store import last_check
from ratchet_calibration.store.folder import CalibrationStore
from ratchet_calibration.store.last_check import Check
from ratchet_calibration.store.record import Calibration
from ratchet_vla.cli import common
from ratchet_vla.cli.calibrate.store import CALIBRATIONS
from ratchet_vla.contract import CameraSpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.cameras.devices import DeviceKind, open_device
from ratchet_vla.runtime.cameras.newest import NewestFrame

REFERENCE = "reference.png"
OVERRIDES = "overrides.jsonl"
FRAMES = 8  # that one view is averaged from, against noise


@dataclass
class Drift:
    """Compare the camera's view with the one that was stored; exit 2 with an image where it has moved.

    The first time, --remember stores the present view as the reference. `ratchet session start` and `ratchet up` refuse
    a camera whose last check failed or is old; --override lets a named person take responsibility, with a reason.
    """

    calibration: Annotated[str, tyro.conf.Positional]
    """Id of the calibration, its beginning, or the camera's name for its newest."""
    store: Path = CALIBRATIONS
    """Folder of the calibration store."""
    image: Path | None = None
    """File with the camera's present view; taken from the camera if absent."""
    device: DeviceKind = "uvc"
    """Kind of camera: uvc (USB), realsense, or recorded (files)."""
    source: str = ""
    """Camera: serial number, /dev/videoN or N; the serial number in the calibration if absent."""
    remember: bool = False
    """Store the present view as the reference, and compare nothing."""
    out: Path = Path("drift.png")
    """File that an image of the difference is written into, where the camera has moved."""
    override: str = ""
    """Reason to run although the camera has moved; kept with the name of --operator."""
    operator: str = ""
    """Name of the person who overrides; needed with --override."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        console = Console(stderr=self.json, soft_wrap=True)
        store = CalibrationStore(self.store)
        calibration = store.load(store.resolve(self.calibration))
        folder = self.store / calibration.id
        if self.override and not self.operator.strip():
            raise RatchetError("drift.no_operator", "an override needs an operator", fix="give --operator NAME")
        current = self._view(calibration)
        path = folder / REFERENCE
        if self.remember:
            cv2.imwrite(str(path), current[..., ::-1])  # OpenCV writes BGR
            console.print(f"remembered in {path}")
            return 0
        if not path.is_file():
            raise RatchetError(
                "drift.no_reference",
                "no reference image yet",
                where=str(path),
                fix="run this once with --remember, right after calibrating",
            )
        reference = read(path)
        comparison = drift.compare(reference, current, calibration.model, calibration.board)
        document = _as_dict(comparison)
        if comparison.moved:
            cv2.imwrite(str(self.out), drift.comparison_image(reference, current, comparison)[..., ::-1])
            document["picture"] = str(self.out)
        self._keep(calibration, comparison, document, console)
        if self.json:
            print(json.dumps(document))
        if not comparison.moved:
            console.print(f"{calibration.camera} is where it was ({words(comparison)})")
        elif not self.override:
            raise RatchetError(
                "drift.moved",
                words(comparison),
                where=calibration.camera,
                fix=f"look at {self.out}; put the camera back, calibrate again, or --override with a reason",
            )
        return 0

    def _keep(
        self, calibration: Calibration, comparison: drift.Drift, document: dict[str, Any], console: Console
    ) -> None:
        """Write the check down, which sessions ask for; an override also into a list that only grows."""
        override = self.override if comparison.moved else ""
        check = Check(common.now(), comparison.moved, override, self.operator, document)
        last_check.write(self.store, calibration.id, check)
        if override:
            with (self.store / calibration.id / OVERRIDES).open("a") as file:
                file.write(json.dumps(asdict(check)) + "\n")
            console.print(f"moved; {self.operator} overrides: {self.override}", markup=False)

    def _view(self, calibration: Calibration) -> NDArray[np.uint8]:
        if self.image is not None:
            return read(self.image)
        spec = CameraSpec(calibration.camera, calibration.model.width, calibration.model.height)
        source = self.source or calibration.camera_serial
        camera = NewestFrame(open_device(self.device, source, spec, 30.0), calibration.camera)
        try:
            return drift.averaged(camera.series(FRAMES)[0])
        finally:
            camera.close()


def _as_dict(comparison: drift.Drift) -> dict[str, Any]:
    return {
        "moved": comparison.moved,
        "way": comparison.way,
        "pixels": comparison.pixels,
        "stayed": comparison.stayed,
        "agreed": comparison.agreed,
        "position_mm": 1e3 * comparison.position,
        "rotation_degrees": float(np.degrees(comparison.rotation)),
    }


def words(comparison: drift.Drift) -> str:
    """Say how far the camera is from where it was."""
    if comparison.way == "board":
        millimetres = 1e3 * comparison.position
        degrees = np.degrees(comparison.rotation)
        return f"the board: {millimetres:.1f} mm and {degrees:.2f} degrees from where it was"
    return f"{comparison.stayed:.0%} of the scene is where it was, the median moved by {comparison.pixels:.1f} px"


def read(path: Path) -> NDArray[np.uint8]:
    """Read an image file as (H, W, 3) uint8, RGB. Raises RatchetError calibration.bad_image."""
    image = cv2.imread(str(path))
    if image is None:
        raise RatchetError("calibration.bad_image", "cannot be read as an image", where=str(path))
    return np.ascontiguousarray(image[..., ::-1], np.uint8)
