"""A session: the robot from powered up to powered down, and the manifest that says with what it ran.

Knows one JSON file, written so that it is whole after a power cut. Knows no episodes and no robot.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.documents import write_json

FILE = "session.json"


def software_version() -> str:
    """Version of this package as installed; "unknown" where it runs from a bare source tree."""
    try:
        return metadata.version("ratchet-vla")
    except metadata.PackageNotFoundError:
        return "unknown"


@dataclass
class Manifest:
    """Everything that must be known later about a session.

    contract: the whole contract as data; contract_id: its hash. calibrations: camera name -> calibration id.
    checks: camera name -> its newest look for having moved before the session, with an override, if it had, and who
    gave it. adapters: [(UTC time, adapter id)] in the order in which they came into force; the base's hash for none.
    episodes: id and name of each that was recorded, written when the session ends.
    started, ended: UTC, ISO 8601; ended and reason stay empty where the session was cut off.
    """

    session: str
    robot: str
    contract_id: str
    contract: dict[str, Any]
    calibrations: dict[str, str]
    base_hash: str
    adapters: list[tuple[str, str]]
    software: str
    python: str
    host: str
    started: str
    ended: str = ""
    reason: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    episodes: list[dict[str, Any]] = field(default_factory=list)


class Session:
    """One session and its folder. Use as a context manager, or call `stop`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def start(
        cls,
        root: Path,
        contract: RobotContract,
        *,
        base_hash: str,
        adapter_id: str,
        calibrations: Mapping[str, str] | None = None,
        checks: Mapping[str, Mapping[str, Any]] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> Session:
        """Make a new folder under `root` with its manifest.

        calibrations: ids in force, by camera. Where the contract names one for a camera, this must be the same.

        Raises:
            RatchetError: session.calibration where a camera's calibration is not the one that the contract demands.
        """
        given = dict(calibrations or {})
        for camera in contract.cameras:
            if camera.calibration_id and given.get(camera.name) != camera.calibration_id:
                raise RatchetError(
                    "session.calibration",
                    f"calibration is {given.get(camera.name, 'missing')}, the contract demands {camera.calibration_id}",
                    where=camera.name,
                    fix="load that calibration, or calibrate again and change the contract",
                )
        now = utc()
        name = f"{now.replace(':', '').replace('-', '')}-{uuid.uuid4().hex[:6]}"
        folder = root / name
        folder.mkdir(parents=True)
        session = cls(
            folder,
            Manifest(
                session=name,
                robot=contract.name,
                contract_id=contract.id,
                contract=contract.to_dict(),
                calibrations=given,
                base_hash=base_hash,
                adapters=[(now, adapter_id)],
                software=software_version(),
                python=platform.python_version(),
                host=platform.node(),
                started=now,
                notes=notes or {},
                checks={camera: dict(check) for camera, check in (checks or {}).items()},
            ),
        )
        session._write()
        return session

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises RatchetError session.unreadable."""
        path = folder / FILE
        try:
            raw = json.loads(path.read_text())
            raw["adapters"] = [(str(t), str(i)) for t, i in raw["adapters"]]
            return Manifest(**raw)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RatchetError("session.unreadable", str(error), where=str(path)) from None

    @property
    def id(self) -> str:
        return self.manifest.session

    def adapter(self, adapter_id: str) -> None:
        """Another adapter came into force; the same one again changes nothing. Waits for the disk: not for the loop."""
        if self.manifest.adapters[-1][1] != adapter_id:
            self.manifest.adapters.append((utc(), adapter_id))
            self._write()

    def stop(self, reason: str, episodes: Sequence[Mapping[str, Any]] = ()) -> None:
        """End the session; only the first reason counts. episodes: what was recorded in it, as plain data."""
        if not self.manifest.ended:
            self.manifest.ended, self.manifest.reason = utc(), reason
            self.manifest.episodes = [dict(episode) for episode in episodes]
            self._write()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.stop("done" if error is None else f"{type(error).__name__}: {error}")

    def _write(self) -> None:
        write_json(self.folder / FILE, dataclasses.asdict(self.manifest), indent=1)


def utc() -> str:
    """Now in UTC, ISO 8601, whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
