"""Calibration store: a folder of calibrations, each under the id of its content, with its images.

Knows files: a calibration is there as a whole or not at all, and is checked when it is read.

    calibrations/<id>/calibration.yaml    numbers with their uncertainty, devices, date
    calibrations/<id>/images/             the images
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

from ratchet_calibration.store.record import NAME, Calibration
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.documents import sync_folder

__all__ = ["CalibrationStore"]

FILE = "calibration.yaml"


class CalibrationStore:
    """One folder. Reading needs no lock; writing is atomic."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(
        self, calibration: Calibration, images: Mapping[str, bytes], report: Callable[[Calibration], str] | None = None
    ) -> Calibration:
        """Store a calibration with its images; returns it with the images' hashes, which its id includes.

        Args:
            images: file name -> encoded image. report: makes the HTML page of what is stored.

        Raises:
            RatchetError: calibration.bad_name, calibration.not_written; nothing is left behind then.
        """
        bad_name = next((name for name in (*images, calibration.camera) if not NAME.fullmatch(name)), None)
        if bad_name is not None:
            raise RatchetError("calibration.bad_name", f"{bad_name!r} is not a name", fix="use letters, digits, . _ -")
        hashes = {name: hashlib.sha256(file_bytes).hexdigest() for name, file_bytes in sorted(images.items())}
        complete = replace(calibration, images=hashes)
        final_folder = self.root / complete.id
        # The same content has the same id, so storing it again changes nothing.
        if final_folder.is_dir():
            return complete
        scratch_folder = self.root / f".{uuid.uuid4().hex}"
        try:
            (scratch_folder / "images").mkdir(parents=True)
            for name, file_bytes in images.items():
                _write(scratch_folder / "images" / name, file_bytes)
            yaml_text = yaml.safe_dump(complete.to_dict(), sort_keys=False, allow_unicode=True)
            _write(scratch_folder / FILE, f"# id {complete.id}\n{yaml_text}".encode())
            if report is not None:
                _write(scratch_folder / "report.html", report(complete).encode())
            # Content first, then the folders, then the rename: after a power cut the calibration is there whole or
            # not at all.
            sync_folder(scratch_folder / "images")
            sync_folder(scratch_folder)
            scratch_folder.rename(final_folder)
            sync_folder(self.root)
        except OSError as error:
            shutil.rmtree(scratch_folder, ignore_errors=True)
            raise RatchetError(
                "calibration.not_written", str(error), where=str(self.root), fix="make room, or name another folder"
            ) from None
        return complete

    def resolve(self, reference: str) -> str:
        """The id that starts so, or the newest of the camera of this name.

        Raises:
            RatchetError: calibration.unknown, calibration.ambiguous.
        """
        ids = self.ids()
        matching_ids = [identity for identity in ids if len(reference) >= 6 and identity.startswith(reference)]
        if len(matching_ids) == 1:
            return matching_ids[0]
        if len(matching_ids) > 1:
            raise RatchetError("calibration.ambiguous", f"{len(matching_ids)} calibrations start with {reference}")
        of_camera = [calibration for calibration in map(self.load, ids) if calibration.camera == reference]
        if of_camera:
            return max(of_camera, key=lambda calibration: calibration.date).id
        raise RatchetError(
            "calibration.unknown",
            f"no calibration '{reference}'",
            where=str(self.root),
            fix="see ratchet calibrate list",
        )

    def ids(self) -> list[str]:
        """Ids of all calibrations, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(
            folder.name for folder in self.root.iterdir() if len(folder.name) == 64 and (folder / FILE).is_file()
        )

    def load(self, identity: str) -> Calibration:
        """A calibration whose content has this id, images included.

        Raises:
            RatchetError: calibration.unknown, calibration.bad_file, calibration.changed where file and id disagree.
        """
        record_path = self.root / identity / FILE
        if not record_path.is_file():
            raise RatchetError("calibration.unknown", "no such calibration", where=str(record_path))
        try:
            record_fields = yaml.safe_load(record_path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RatchetError("calibration.bad_file", str(error).splitlines()[0], where=str(record_path)) from None
        calibration = Calibration.from_dict(record_fields, str(record_path))
        if calibration.id != identity:
            raise RatchetError(
                "calibration.changed",
                "the content does not have this id: the file was changed after it was stored",
                where=str(record_path),
                fix="restore the file, or calibrate again; a calibration is never edited",
            )
        for name, expected_hash in calibration.images.items():
            image_path = record_path.parent / "images" / name
            if not image_path.is_file() or hashlib.sha256(image_path.read_bytes()).hexdigest() != expected_hash:
                raise RatchetError("calibration.changed", "image missing or hash mismatch", where=str(image_path))
        return calibration

    def images(self, identity: str) -> dict[str, bytes]:
        """File name -> encoded image."""
        folder = self.root / identity / "images"
        return {name: (folder / name).read_bytes() for name in self.load(identity).images}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as open_file:
        open_file.write(data)
        open_file.flush()
        os.fsync(open_file.fileno())
