"""Camera model: focal lengths, principal point, distortion; projects points to pixels and back.

Knows the models none, radial (k1 k2), brown5 (k1 k2 p1 p2 k3), rational8 (k1 k2 p1 p2 k3 k4 k5 k6) and fisheye
(k1 k2 k3 k4), with OpenCV's meanings and order. Knows no board and no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np

from ratchet_calibration.geometry import Float
from ratchet_vla.errors import RatchetError

__all__ = ["CameraModel"]

Model = Literal["none", "radial", "brown5", "rational8", "fisheye"]
COEFFICIENTS = {"none": 0, "radial": 2, "brown5": 5, "rational8": 8, "fisheye": 4}


@dataclass(frozen=True)
class CameraModel:
    """A pinhole camera with lens distortion, at one resolution.

    Attributes:
        width, height: px.
        fx, fy, cx, cy: px, principal point from the centre of the first pixel.
        distortion: as many numbers as the model has.
        deviations: of fx, fy, cx, cy and the distortion, one standard deviation each, empty where not known.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    model: Model = "none"
    distortion: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        def refuse(what: str) -> None:
            raise RatchetError("calibration.bad_model", what, where="camera")

        if self.model not in COEFFICIENTS:
            refuse(f"unknown model '{self.model}'")
        if len(self.distortion) != COEFFICIENTS[self.model]:
            refuse(f"{self.model} has {COEFFICIENTS[self.model]} coefficients, not {len(self.distortion)}")
        if self.deviations and len(self.deviations) != 4 + len(self.distortion):
            refuse(f"{len(self.deviations)} deviations for {4 + len(self.distortion)} parameters")
        numbers = (self.fx, self.fy, self.cx, self.cy, *self.distortion)
        if not np.isfinite(numbers).all() or min(self.fx, self.fy, self.width, self.height) <= 0:
            refuse("numbers that are not finite, or a focal length or size that is not positive")

    @property
    def matrix(self) -> Float:
        """(3, 3)."""
        return np.array([[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]])

    @property
    def coefficients(self) -> Float:
        """(n,) as OpenCV takes them."""
        # OpenCV takes at least four coefficients: k1 k2 p1 p2.
        padded = (*self.distortion, 0.0, 0.0) if self.model == "radial" else self.distortion
        return np.array(padded or (0.0,) * 4, float)

    def project(self, points: Float) -> Float:
        """(n, 3) m in the camera's frame (x right, y down, z ahead) -> (n, 2) px."""
        no_motion = np.zeros(3)
        if self.model == "fisheye":
            pixels, _ = cv2.fisheye.projectPoints(
                points.reshape(-1, 1, 3).astype(float), no_motion, no_motion, self.matrix, self.coefficients
            )
        else:
            pixels, _ = cv2.projectPoints(points.astype(float), no_motion, no_motion, self.matrix, self.coefficients)
        return np.asarray(pixels, float).reshape(-1, 2)

    def derivative(self, points: Float) -> Float:
        """(n, 2, 3) px per m: how `project` changes with each point."""
        no_motion = np.zeros(3)
        if self.model == "fisheye":
            _, jacobian = cv2.fisheye.projectPoints(
                points.reshape(-1, 1, 3).astype(float), no_motion, no_motion, self.matrix, self.coefficients
            )
            # Columns of the fisheye Jacobian: f (2), c (2), k (4), rotation (3), translation (3), skew (1).
            return np.asarray(jacobian[:, 11:14], float).reshape(-1, 2, 3)
        _, jacobian = cv2.projectPoints(points.astype(float), no_motion, no_motion, self.matrix, self.coefficients)
        return np.asarray(jacobian[:, 3:6], float).reshape(-1, 2, 3)  # a move of the whole is a move of the point

    def undistorted(self, pixels: Float) -> Float:
        """(n, 2) px -> (n, 2) x / z and y / z of the rays."""
        pixels_n12 = np.ascontiguousarray(pixels, float).reshape(-1, 1, 2)
        if self.model == "fisheye":
            rays = cv2.fisheye.undistortPoints(pixels_n12, self.matrix, self.coefficients)
        else:
            # The inverse of a distortion has no closed form; the default of five iterations is too coarse at the
            # edge of a wide lens.
            criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 50, 1e-10)
            rays = cv2.undistortPointsIter(pixels_n12, self.matrix, self.coefficients, np.eye(3), np.eye(3), criteria)
        return np.asarray(rays, float).reshape(-1, 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a calibration's file holds it."""
        names = ("fx", "fy", "cx", "cy")
        fields: dict[str, Any] = {"width": self.width, "height": self.height}
        fields |= {name: float(getattr(self, name)) for name in names}
        fields |= {"model": self.model, "distortion": [float(value) for value in self.distortion]}
        return fields | {"deviations": [float(value) for value in self.deviations]}

    @classmethod
    def from_dict(cls, raw: Any, where: str) -> CameraModel:
        """Raises RatchetError calibration.bad_model."""
        if not isinstance(raw, dict) or set(raw) != set(cls.__dataclass_fields__):
            raise RatchetError("calibration.bad_model", f"not a camera model: {raw!r}", where=where)
        try:
            # YAML has lists only; the frozen record holds tuples.
            values: dict[str, Any] = {
                field_name: tuple(value) if isinstance(value, list) else value for field_name, value in raw.items()
            }
            return cls(**values)
        except TypeError as error:
            raise RatchetError("calibration.bad_model", str(error), where=where) from None
