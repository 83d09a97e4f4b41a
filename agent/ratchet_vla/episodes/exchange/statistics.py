"""Statistics of a data set as LeRobotDataset v3 keeps them: per episode and over all, per dimension or colour.

Knows arrays and quantiles. Knows no file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
MAX_IMAGES = 32  # frames of an episode that colour statistics are taken from
MAX_PIXELS = 64  # at most so many rows and columns of each


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
    return stats | {name: np.quantile(table, quantile, axis=0) for name, quantile in QUANTILES.items()}


class Colours:
    """Colour statistics of one camera over one episode, from evenly spread frames; in [0, 1], shape (3, 1, 1)."""

    def __init__(self, frames: int) -> None:
        """frames: how many will come."""
        self._every = max(frames // MAX_IMAGES, 1)
        self._frames_seen = 0
        self._pixels: list[npt.NDArray[np.uint8]] = []

    def add(self, image: npt.NDArray[np.uint8]) -> None:
        """image: (H, W, 3) uint8."""
        if self._frames_seen % self._every == 0:
            pixel_stride = max(1, -(-max(image.shape[:2]) // MAX_PIXELS))
            self._pixels.append(image[::pixel_stride, ::pixel_stride].reshape(-1, 3).copy())
        self._frames_seen += 1

    def result(self) -> dict[str, Array]:
        """The statistics of the frames so far, as `of_values` names them."""
        stats = of_values(np.concatenate(self._pixels) / 255.0)
        shaped = {name: values.reshape(3, 1, 1) for name, values in stats.items() if name != "count"}
        return {**shaped, "count": np.array([len(self._pixels)])}


def together(episode_stats: list[dict[str, Array]]) -> dict[str, Array]:
    """Of several episodes: exact for extremes, mean and deviation; quantiles are means of theirs, by weight."""
    counts = np.array([float(stats["count"][0]) for stats in episode_stats])
    weights = counts / counts.sum()

    def mean(name: str) -> Array:
        weighted: Array = np.tensordot(weights, np.stack([stats[name] for stats in episode_stats]), 1)
        return weighted

    centre = mean("mean")
    spread = np.stack([stats["std"] ** 2 + (stats["mean"] - centre) ** 2 for stats in episode_stats])
    return {
        "min": np.min([stats["min"] for stats in episode_stats], axis=0),
        "max": np.max([stats["max"] for stats in episode_stats], axis=0),
        "mean": centre,
        "std": np.sqrt(np.tensordot(weights, spread, 1)),
        "count": np.array([int(counts.sum())]),
        **{name: mean(name) for name in QUANTILES},
    }
