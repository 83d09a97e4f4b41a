"""Calibration boards (ChArUco, chessboard): geometry, file description, and a page to print.

Knows ChArUco boards and plain chessboards. Knows no image and no camera.
Frame of a board: origin at the first square's outer corner, x along the columns, y along the rows, z into the board.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, Literal

import cv2
import numpy as np

from ratchet_calibration.geometry import Float
from ratchet_vla.errors import RatchetError

__all__ = ["Board"]

DICTIONARIES = {
    "4x4_50": cv2.aruco.DICT_4X4_50,
    "4x4_100": cv2.aruco.DICT_4X4_100,
    "5x5_100": cv2.aruco.DICT_5X5_100,
    "5x5_250": cv2.aruco.DICT_5X5_250,
    "6x6_250": cv2.aruco.DICT_6X6_250,
    "apriltag_36h11": cv2.aruco.DICT_APRILTAG_36h11,
}
# (long, short) edge in m; the page is printed in landscape.
PAPER = {"a4": (0.297, 0.210), "a3": (0.420, 0.297), "a2": (0.594, 0.420), "letter": (0.2794, 0.2159)}


@dataclass(frozen=True)
class Board:
    """Geometry of a calibration board.

    Attributes:
        columns, rows: squares.
        square, marker: edge lengths in m (marker 0 for a chessboard).
    """

    kind: Literal["charuco", "chessboard"] = "charuco"
    columns: int = 9
    rows: int = 6
    square: float = 0.03
    marker: float = 0.0225
    dictionary: str = "5x5_100"

    def __post_init__(self) -> None:
        def refuse(what: str, fix: str) -> None:
            raise RatchetError("calibration.bad_board", what, where="board", fix=fix)

        if self.columns < 3 or self.rows < 3:
            refuse(f"{self.columns} x {self.rows} squares", "use at least 3 x 3")
        if not 0.001 <= self.square <= 1.0:
            refuse(f"squares of {self.square} m", "give the edge in metres, between 0.001 and 1")
        if self.kind == "charuco":
            # A marker needs white around it, and a marker of a fifth of a square is too small to be read.
            if not 0.2 * self.square <= self.marker < self.square:
                refuse(
                    f"markers of {self.marker} m in squares of {self.square} m", "markers are smaller than the squares"
                )
            if self.dictionary not in DICTIONARIES:
                refuse(f"unknown dictionary '{self.dictionary}'", f"dictionaries: {', '.join(DICTIONARIES)}")
            if (self.columns * self.rows) // 2 > len(self._dictionary().bytesList):
                refuse("more markers than the dictionary has", "take a larger dictionary or fewer squares")
        elif self.kind == "chessboard":
            if self.columns % 2 == self.rows % 2:
                refuse(
                    "a chessboard with both counts even, or both odd, looks the same turned around",
                    "make one count even and the other odd",
                )
        else:
            refuse(f"unknown kind '{self.kind}'", "charuco or chessboard")

    @classmethod
    def from_dict(cls, raw: Any, where: str = "board") -> Board:
        """Plain data as `to_dict` gives. Raises RatchetError calibration.bad_board."""
        if not isinstance(raw, dict) or set(raw) - set(cls.__dataclass_fields__):
            raise RatchetError("calibration.bad_board", f"not a board: {raw!r}", where=where)
        try:
            return cls(**raw)
        except TypeError as error:
            raise RatchetError("calibration.bad_board", str(error), where=where) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a calibration's file holds it."""
        return asdict(self)

    @property
    def corners(self) -> Float:
        """(N, 3) m: the inner corners, row by row; the index is a corner's id."""
        columns, rows = np.meshgrid(np.arange(1, self.columns), np.arange(1, self.rows))
        # (N, 3) in squares; meshgrid lists a row's corners one after the other.
        corners_in_squares = np.stack([columns.ravel(), rows.ravel(), np.zeros(columns.size)], 1)
        return self.square * corners_in_squares.astype(float)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in m."""
        return self.columns * self.square, self.rows * self.square

    def charuco(self) -> cv2.aruco.CharucoBoard:
        """OpenCV's object of the same board. Raises RatchetError calibration.bad_board for a chessboard."""
        if self.kind != "charuco":
            raise RatchetError("calibration.bad_board", "a chessboard has no markers", where="board")
        return cv2.aruco.CharucoBoard((self.columns, self.rows), self.square, self.marker, self._dictionary())

    def image(self, pixels_per_square: int, margin: int = 0) -> np.ndarray:
        """(H, W) uint8 grey image of the board; margin: white pixels around it."""
        width_px = self.columns * pixels_per_square
        height_px = self.rows * pixels_per_square
        if self.kind == "charuco":
            image = np.asarray(self.charuco().generateImage((width_px, height_px), marginSize=0, borderBits=1))
        else:
            column_index, row_index = np.meshgrid(
                np.arange(width_px) // pixels_per_square, np.arange(height_px) // pixels_per_square
            )
            image = np.where((column_index + row_index) % 2 == 0, 0, 255).astype(np.uint8)
        return np.pad(image, margin, constant_values=255)

    def pdf(self, paper: str = "a4") -> bytes:
        """One landscape page at true size: board, its description, and a ruler to check the printer with.

        Raises:
            RatchetError: calibration.too_large where it does not fit, calibration.bad_board for an unknown paper.
        """
        if paper not in PAPER:
            raise RatchetError("calibration.bad_board", f"unknown paper '{paper}'", fix=f"papers: {', '.join(PAPER)}")
        page_width_m, page_height_m = PAPER[paper]
        width_m, height_m = self.size
        # 6 mm that printers leave blank on every side, and room for the ruler and its text below.
        if width_m > page_width_m - 0.012 or height_m > page_height_m - 0.026:
            largest_square_m = min((page_width_m - 0.012) / self.columns, (page_height_m - 0.026) / self.rows)
            raise RatchetError(
                "calibration.too_large",
                f"the board is {1e3 * width_m:.0f} x {1e3 * height_m:.0f} mm, more than {paper} holds",
                where="board",
                fix=f"use squares of at most {int(1e3 * largest_square_m)} mm, or larger paper",
            )
        from matplotlib.backends.backend_pdf import FigureCanvasPdf
        from matplotlib.figure import Figure

        inch = 0.0254
        figure = Figure(figsize=(page_width_m / inch, page_height_m / inch))
        FigureCanvasPdf(figure)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        # Drawn in metres on the page, so that the printed size is exact.
        axes.set(xlim=(0, page_width_m), ylim=(page_height_m, 0))
        axes.axis("off")
        left_m = (page_width_m - width_m) / 2
        top_m = (page_height_m - height_m) / 2 - 0.006
        # Eight pixels per marker cell; drawn without interpolation, the edges stay exact at any printer resolution.
        board_image = self.image(self._modules() * 8)
        axes.imshow(
            board_image,
            cmap="gray",
            vmin=0,
            vmax=255,
            extent=(left_m, left_m + width_m, top_m + height_m, top_m),
            interpolation="nearest",
        )
        ruler_y = page_height_m - 0.009
        axes.plot([left_m, left_m + 0.1], [ruler_y, ruler_y], color="black", linewidth=0.8)
        for tick in range(11):
            axes.plot(
                [left_m + 0.01 * tick] * 2,
                [ruler_y, ruler_y - (0.003 if tick % 5 == 0 else 0.0018)],
                color="black",
                lw=0.6,
            )
        caption = f"100 mm: measure it. {self.kind} {self.columns} x {self.rows}, squares {1e3 * self.square:g} mm"
        if self.kind == "charuco":
            caption += f", markers {1e3 * self.marker:g} mm, {self.dictionary}"
        caption += ". Print at 100 %, glue flat on a stiff plate."
        axes.text(left_m + 0.104, ruler_y, caption, fontsize=6.5, va="bottom")
        pdf_buffer = io.BytesIO()
        figure.savefig(pdf_buffer, format="pdf")
        return pdf_buffer.getvalue()

    def _dictionary(self) -> cv2.aruco.Dictionary:
        return cv2.aruco.getPredefinedDictionary(DICTIONARIES[self.dictionary])

    def _modules(self) -> int:
        """Cells across one square, so that every marker cell is a whole number of pixels where that is possible."""
        if self.kind == "chessboard":
            return 1
        marker_cells = self._dictionary().markerSize + 2
        return max(1, round(marker_cells * self.square / self.marker))
