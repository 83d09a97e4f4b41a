"""Weights from a seed and their names: the same numbers wherever they are made, so that no file has to hold them.

Needs numpy alone. A tensor's values come from a Philox generator whose key is the SHA-256 of its name.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np


def fill(name: str, shape: Sequence[int]) -> np.ndarray:
    """float32: matrices of unit gain, norms near 1, other vectors near 0."""
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], np.uint64)
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(tuple(shape))
    if len(shape) > 1:
        return np.asarray(values / np.sqrt(np.prod(shape[1:])), np.float32)
    centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return (centre + 0.1 * values).astype(np.float32)


def fill_all(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    return {name: fill(name, shape) for name, shape in shapes.items()}
