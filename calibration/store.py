"""A folder of calibrations, each under the id of its content, with the pictures it was made from.

Knows files: a calibration is there as a whole or not at all, and is checked when it is read.

    calibrations/<id>/calibration.yaml    numbers with their uncertainty, devices, date
    calibrations/<id>/images/             the pictures
    calibrations/<id>/report.html         for a person; not part of the id
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from agent.errors import RatchetError
from agent.storage.documents import sync_folder
from calibration.record import NAME, Calibration

FILE = "calibration.yaml"


class CalibrationStore:
    """One folder. Reading needs no lock; writing is atomic."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(
        self, calibration: Calibration, images: Mapping[str, bytes], report: Callable[[Calibration], str] | None = None
    ) -> Calibration:
        """Store a calibration with its pictures; returns it with the pictures' hashes, which its id includes.

        Args:
            images: file name -> encoded picture. report: makes the HTML page of what is stored.

        Raises:
            RatchetError: calibration.bad_name, calibration.not_written; nothing is left behind then.
        """
        bad = next((name for name in (*images, calibration.camera) if not NAME.fullmatch(name)), None)
        if bad is not None:
            raise RatchetError("calibration.bad_name", f"{bad!r} is no name", fix="letters, digits, . _ -")
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(images.items())}
        full = replace(calibration, images=hashes)
        target = self.root / full.id
        if target.is_dir():
            return full
        scratch = self.root / f".{uuid.uuid4().hex}"
        try:
            (scratch / "images").mkdir(parents=True)
            for name, data in images.items():
                _write(scratch / "images" / name, data)
            text = yaml.safe_dump(full.to_dict(), sort_keys=False, allow_unicode=True)
            _write(scratch / FILE, f"# id {full.id}\n{text}".encode())
            if report is not None:
                _write(scratch / "report.html", report(full).encode())
            sync_folder(scratch / "images")
            sync_folder(scratch)
            scratch.rename(target)
            sync_folder(self.root)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise RatchetError(
                "calibration.not_written", str(error), where=str(self.root), fix="make room, or name another folder"
            ) from None
        return full

    def resolve(self, reference: str) -> str:
        """The id that starts so, or the newest of the camera of this name.

        Raises:
            RatchetError: calibration.unknown, calibration.ambiguous.
        """
        ids = self.ids()
        found = [i for i in ids if len(reference) >= 6 and i.startswith(reference)]
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            raise RatchetError("calibration.ambiguous", f"{len(found)} calibrations start with {reference}")
        named = [c for c in map(self.load, ids) if c.camera == reference]
        if named:
            return max(named, key=lambda c: c.date).id
        raise RatchetError(
            "calibration.unknown",
            f"no calibration '{reference}'",
            where=str(self.root),
            fix="see ratchet calibrate list",
        )

    def ids(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if len(p.name) == 64 and (p / FILE).is_file())

    def load(self, identity: str) -> Calibration:
        """A calibration whose content has this id, pictures included.

        Raises:
            RatchetError: calibration.unknown, calibration.bad_file, calibration.changed where file and id disagree.
        """
        path = self.root / identity / FILE
        if not path.is_file():
            raise RatchetError("calibration.unknown", "no such calibration", where=str(path))
        try:
            raw = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RatchetError("calibration.bad_file", str(error).splitlines()[0], where=str(path)) from None
        calibration = Calibration.from_dict(raw, str(path))
        if calibration.id != identity:
            raise RatchetError(
                "calibration.changed",
                "the numbers are not those that were measured",
                where=str(path),
                fix="restore the file, or calibrate again; a calibration is never edited",
            )
        for name, wanted in calibration.images.items():
            picture = path.parent / "images" / name
            if not picture.is_file() or hashlib.sha256(picture.read_bytes()).hexdigest() != wanted:
                raise RatchetError("calibration.changed", "a picture is missing or another one", where=str(picture))
        return calibration

    def images(self, identity: str) -> dict[str, bytes]:
        """File name -> encoded picture."""
        folder = self.root / identity / "images"
        return {name: (folder / name).read_bytes() for name in self.load(identity).images}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
