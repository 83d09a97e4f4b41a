"""The newest drift check of every camera, and whether a session may start on it.

Knows small files in the store, beside the calibrations. Compares no images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ratchet_calibration.store.folder import CalibrationStore
from ratchet_calibration.store.tie import require_fit
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.documents import write_json

FILE = "last_check.json"
MAX_AGE = timedelta(hours=12)  # so that every day begins with a check


@dataclass(frozen=True)
class Check:
    """Newest drift check of a calibration.

    Attributes:
        date: ISO 8601, UTC.
        moved: beyond the threshold.
        override, person: why it may run all the same, and the operator who says so.
        measured: numbers of the comparison.
    """

    date: str
    moved: bool
    override: str
    person: str
    measured: dict[str, Any]


def write(store: Path, identity: str, check: Check) -> None:
    """Replace the newest check of a calibration; exchanged at once."""
    write_json(store / identity / FILE, asdict(check), indent=1, durable=False)


def require(
    store: Path, contract: RobotContract, now: datetime | None = None, max_age: timedelta = MAX_AGE
) -> dict[str, dict[str, Any]]:
    """Before a session: every camera that the contract ties to a calibration was checked recently and has not moved.

    Returns:
        camera -> its check as plain data, overrides included, for the session's manifest.

    Raises:
        RatchetError: session.not_checked, session.check_too_old, session.camera_moved; calibration.unknown and what
            reading it raises; calibration.other_camera and the others of `tie.require_fit`.
    """
    now = now or datetime.now(UTC)
    checks: dict[str, dict[str, Any]] = {}
    for camera in contract.cameras:
        calibration_id = camera.calibration_id
        if not calibration_id:
            continue
        if not (store / calibration_id).is_dir():
            raise RatchetError(
                "calibration.unknown",
                f"the contract demands calibration {calibration_id[:12]}",
                where=str(store),
                fix="name the folder that holds it, or calibrate again and change the contract",
            )
        require_fit(CalibrationStore(store).load(calibration_id), contract, camera)
        drift_command = f"ratchet calibrate drift {calibration_id[:12]} --store {store}"
        try:
            check_fields: Mapping[str, Any] = json.loads((store / calibration_id / FILE).read_text())
            check = Check(**check_fields)
            age = now - datetime.fromisoformat(check.date)
        except (OSError, ValueError, TypeError):
            raise RatchetError(
                "session.not_checked", "the camera was never checked for drift", where=camera.name, fix=drift_command
            ) from None
        if age > max_age:
            hours = age.total_seconds() / 3600
            raise RatchetError(
                "session.check_too_old",
                f"the last drift check was {hours:.0f} hours ago",
                where=camera.name,
                fix=drift_command,
            )
        if check.moved and not check.override:
            raise RatchetError(
                "session.camera_moved",
                "the camera is not where it was calibrated",
                where=camera.name,
                fix=f"put it back or calibrate again; or {drift_command} --override REASON --operator NAME",
            )
        checks[camera.name] = asdict(check)
    return checks
