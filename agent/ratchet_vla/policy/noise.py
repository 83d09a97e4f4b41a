"""The randomness of sampling: seeds that follow from names, and the noise of a chunk.

Knows generators and numbers. Imports no torch: the process that holds an arm draws the same numbers as a rollout.
"""

from __future__ import annotations

import hashlib

import numpy as np
from scipy.special import ndtr

from ratchet_vla.records import Float32

__all__ = ["chunk_noise", "derive_seed"]


def derive_seed(*parts: object) -> int:
    """63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def chunk_noise(generator: np.random.Generator, shape: tuple[int, int], correlation: float) -> Float32:
    """(K, D) uniform in [0, 1), Gaussian copula: any two actions of the chunk correlate, dimensions do not.

    Each token keeps exactly its own distribution and log-probability; only how tokens vary together changes.
    Independent noise averages out over a chunk and explores little; shared noise moves the arm somewhere else. The
    gradient built from the tokens' own log-probabilities is then, to first order in the noise, the policy gradient
    times the noise's correlation matrix, which is positive definite: still an ascent direction, with more signal in it.
    """
    if correlation == 0.0:
        return generator.random(shape, np.float32)
    shared = generator.standard_normal((1, shape[1]))
    own = generator.standard_normal(shape)
    mixed = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    uniform: Float32 = ndtr(mixed).astype(np.float32).clip(0.0, np.float32(1 - 2**-24))
    return uniform
