"""Calibration record of one camera, as data, and the id derived from its content.

Knows the YAML's fields and their checks. Knows no folder; folder.py does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import numpy as np

from ratchet_calibration.boards.board import Board
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.geometry import Float, from_quaternion, quaternion
from ratchet_vla.errors import RatchetError

__all__ = ["Calibration", "Mount"]

SCHEMA = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Mount:
    """Pose of the camera. mounting: eye_in_hand or eye_to_hand. parent, child: frame names.

    Attributes:
        position: (3,) m, of the child in the parent frame.
        orientation: (4,) quaternion xyzw, likewise.
        covariance: 36 numbers, row by row, of a small motion in the child's frame: rotation in rad, then translation in
            m. Errors as in handeye.HandEyeResult.
    """

    mounting: str
    parent: str
    child: str
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    covariance: tuple[float, ...]
    poses: int
    rms: float
    held_out_pixels: float
    held_out_position: float
    held_out_rotation: float

    @property
    def pose(self) -> Float:
        """(4, 4) parent_T_child."""
        return from_quaternion(self.position, self.orientation)

    @classmethod
    def of(cls, pose: Float, **others: Any) -> Mount:
        """From a (4, 4) matrix; covariance may be (6, 6)."""
        others["covariance"] = tuple(float(number) for number in np.ravel(others["covariance"]))
        return cls(position=tuple(map(float, pose[:3, 3])), orientation=tuple(map(float, quaternion(pose))), **others)


@dataclass(frozen=True)
class Calibration:
    """One camera at one resolution.

    Attributes:
        camera: name in the contract.
        camera_serial, robot, robot_serial: which devices these were; "" where there is none.
        date: ISO 8601, UTC.
        rms, held_out_rms: px.
        views: that the intrinsics were estimated from.
        mount: None where only the intrinsics are known.
        images: name -> SHA-256 of the image beside it.
        notes: by a person.
    """

    camera: str
    model: CameraModel
    board: Board
    date: str
    rms: float
    held_out_rms: float
    views: int
    camera_serial: str = ""
    robot: str = ""
    robot_serial: str = ""
    mount: Mount | None = None
    images: dict[str, str] = field(default_factory=dict)
    notes: str = ""
    schema: int = SCHEMA

    @property
    def id(self) -> str:
        """SHA-256 of the content; the same numbers give the same id."""
        # Sorted keys and no spaces: equal content gives equal bytes, whatever wrote it.
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as its file holds it; `from_dict` reads it."""
        fields = {field_name: getattr(self, field_name) for field_name in self.__dataclass_fields__}
        fields |= {"model": self.model.to_dict(), "board": self.board.to_dict(), "images": dict(self.images)}
        fields["mount"] = None if self.mount is None else json.loads(json.dumps(asdict(self.mount)))
        return fields

    @classmethod
    def from_dict(cls, raw: Any, where: str) -> Calibration:
        """Plain data as `to_dict` gives.

        Raises:
            RatchetError: calibration.bad_file naming file and field.
        """

        def refuse(problem: str) -> NoReturn:
            raise RatchetError("calibration.bad_file", problem, where=where, fix="take it from the store again")

        if not isinstance(raw, dict):
            refuse("not a calibration")
        unknown = set(raw) - set(cls.__dataclass_fields__)
        missing = {"camera", "model", "board", "date"} - set(raw)
        if unknown or missing:
            refuse(f"unknown fields {sorted(unknown)}, missing {sorted(missing)}")
        if raw.get("schema") != SCHEMA:
            refuse(f"schema {raw.get('schema')!r} is not {SCHEMA}")
        if not isinstance(raw["camera"], str) or not NAME.fullmatch(raw["camera"]):
            refuse(f"camera {raw['camera']!r} is not a name: use letters, digits, . _ -")
        images = raw.get("images") or {}
        if not isinstance(images, dict) or not all(NAME.fullmatch(str(field_name)) for field_name in images):
            refuse("images is not a map from names to hashes")
        values = dict(raw) | {
            "model": CameraModel.from_dict(raw["model"], where),
            "board": Board.from_dict(raw["board"], where),
            "images": dict(images),
        }
        if raw.get("mount") is not None:
            values["mount"] = _mount_of(raw["mount"], refuse)
        numbers = [values.get(field_name) for field_name in ("rms", "held_out_rms", "views")]
        if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
            refuse("rms, held_out_rms and views must be numbers")
        return cls(**values)


def _mount_of(raw: Any, refuse: Callable[[str], NoReturn]) -> Mount:
    """The mount of a calibration's plain data; `refuse` raises with what is wrong."""
    try:
        fields: dict[str, Any] = {
            field_name: tuple(value) if isinstance(value, list) else value for field_name, value in raw.items()
        }
        mount = Mount(**fields)
    except (TypeError, AttributeError):
        refuse("mount has missing or unknown fields")
    if (len(mount.position), len(mount.orientation), len(mount.covariance)) != (3, 4, 36):
        refuse("mount has the wrong number of values")
    if not np.isfinite([*mount.position, *mount.orientation, *mount.covariance]).all():
        refuse("mount has values that are not finite")
    if abs(np.linalg.norm(mount.orientation) - 1) > 1e-6:
        refuse("the mount's orientation is not a unit quaternion")
    return mount
