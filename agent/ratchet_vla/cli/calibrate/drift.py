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
from ratchet_vla.cli.calibrate.camera import Kind
from ratchet_vla.contract import CameraSpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.cameras.devices import open_device
from ratchet_vla.runtime.cameras.newest import NewestFrame

REFERENCE = "reference.png"
OVERRIDES = "overrides.jsonl"
FRAMES = 8


@dataclass
class Drift:
    """Compare the camera's view with the one that was stored; exit 2 with an image where it has moved.

    The first time, --remember stores the present view as the reference. `ratchet session start` and `ratchet up` refuse
    a camera whose last check failed or is old; --override lets a named person take responsibility, with a reason.
    """

    calibration: Annotated[str, tyro.conf.Positional]
    """Id of the calibration, its beginning, or the camera's name for its newest."""
    store: Path = Path("calibrations")
    """Folder of calibrations."""
    image: Path | None = None
    """Present view as a file; otherwise the camera is asked."""
    device: Kind = "uvc"
    """Kind of camera."""
    source: str = ""
    """Serial, /dev/videoN or N; the calibration's serial if absent."""
    remember: bool = False
    """Store the present view as the reference."""
    out: Path = Path("drift.png")
    """Where the image of the difference goes."""
    override: str = ""
    """Reason to run although the camera has moved; recorded with --operator."""
    operator: str = ""
    """Who overrides."""
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
        if self.remember:
            cv2.imwrite(str(folder / REFERENCE), current[..., ::-1])
            console.print(f"remembered in {folder / REFERENCE}")
            return 0
        path = folder / REFERENCE
        if not path.is_file():
            raise RatchetError(
                "drift.no_reference", "no reference image yet", where=str(path),
                fix="run this once with --remember, right after calibrating",
            )  # fmt: skip
        reference = read(path)
        found = drift.compare(reference, current, calibration.model, calibration.board)
        result: dict[str, Any] = {
            "moved": found.moved,
            "way": found.way,
            "pixels": found.pixels,
            "stayed": found.stayed,
            "agreed": found.agreed,
            "position_mm": 1e3 * found.position,
            "rotation_degrees": float(np.degrees(found.rotation)),
        }
        if found.moved:
            cv2.imwrite(str(self.out), drift.comparison_image(reference, current, found)[..., ::-1])
            result["picture"] = str(self.out)
        check = Check(common.now(), found.moved, self.override if found.moved else "", self.operator, result)
        last_check.write(self.store, calibration.id, check)
        if found.moved and self.override:
            with (folder / OVERRIDES).open("a") as file:
                file.write(json.dumps(asdict(check)) + "\n")
            console.print(f"moved; {self.operator} overrides: {self.override}", markup=False)
        if self.json:
            print(json.dumps(result))
        if found.moved and not self.override:
            raise RatchetError(
                "drift.moved",
                words(found),
                where=calibration.camera,
                fix=f"look at {self.out}; put the camera back, calibrate again, or --override with a reason",
            )
        if not found.moved:
            console.print(f"{calibration.camera} is where it was ({words(found)})")
        return 0

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


def words(found: drift.Drift) -> str:
    if found.way == "board":
        return (
            f"the board: {1e3 * found.position:.1f} mm and {np.degrees(found.rotation):.2f} degrees from where it was"
        )
    return f"{found.stayed:.0%} of the scene is where it was, the median moved by {found.pixels:.1f} px"


def read(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) RGB. Raises RatchetError calibration.bad_image."""
    image = cv2.imread(str(path))
    if image is None:
        raise RatchetError("calibration.bad_image", "cannot be read as an image", where=str(path))
    return np.ascontiguousarray(image[..., ::-1], np.uint8)
