"""Statistics of a data set as LeRobotDataset v3 keeps them: per episode and over all, per dimension or colour.

Knows arrays and quantiles. Knows no file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
IMAGES = 32  # frames of an episode that colour statistics are taken from
PIXELS = 64  # at most so many rows and columns of each


def of_values(values: npt.NDArray[Any]) -> dict[str, Array]:
    """values: (N,) or (N, D). Each statistic is (D,); count is (1,)."""
    table = np.asarray(values, np.float64).reshape(len(values), -1)
    stats = {
        "min": table.min(0),
        "max": table.max(0),
        "mean": table.mean(0),
        "std": table.std(0),
        "count": np.array([len(table)]),
    }
    return stats | {name: np.quantile(table, q, axis=0) for name, q in QUANTILES.items()}


class Colours:
    """Colour statistics of one camera over one episode, from evenly spread frames; in [0, 1], shape (3, 1, 1)."""

    def __init__(self, frames: int) -> None:
        """frames: how many will come."""
        self._every = max(frames // IMAGES, 1)
        self._seen = 0
        self._kept: list[npt.NDArray[np.uint8]] = []

    def add(self, image: npt.NDArray[np.uint8]) -> None:
        """image: (H, W, 3) uint8."""
        if self._seen % self._every == 0:
            step = max(1, -(-max(image.shape[:2]) // PIXELS))
            self._kept.append(image[::step, ::step].reshape(-1, 3).copy())
        self._seen += 1

    def result(self) -> dict[str, Array]:
        stats = of_values(np.concatenate(self._kept) / 255.0)
        shaped = {name: values.reshape(3, 1, 1) for name, values in stats.items() if name != "count"}
        return {**shaped, "count": np.array([len(self._kept)])}


def together(parts: list[dict[str, Array]]) -> dict[str, Array]:
    """Of several episodes: exact for extremes, mean and deviation; quantiles are means of theirs, by weight."""
    counts = np.array([float(p["count"][0]) for p in parts])
    weights = counts / counts.sum()

    def mean(name: str) -> Array:
        out: Array = np.tensordot(weights, np.stack([p[name] for p in parts]), 1)
        return out

    centre = mean("mean")
    spread = np.stack([p["std"] ** 2 + (p["mean"] - centre) ** 2 for p in parts])
    return {
        "min": np.min([p["min"] for p in parts], axis=0),
        "max": np.max([p["max"] for p in parts], axis=0),
        "mean": centre,
        "std": np.sqrt(np.tensordot(weights, spread, 1)),
        "count": np.array([int(counts.sum())]),
        **{name: mean(name) for name in QUANTILES},
    }
