"""Seeded hashes of whole arrays: randomness that is the same in every version of every library."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def seeded_hash(seed: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A hash of each value, uint64 [N] -> uint64 [N]; equal values have equal hashes.

    The finaliser of SplitMix64 (Steele et al., 2014) over the values shifted by the seed's hash.
    """
    shift = np.frombuffer(hashlib.sha256(seed.encode()).digest()[:16], dtype="<u8")
    x: np.ndarray[Any, Any] = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + shift[:1]
    for _ in range(2):  # twice, so that neither the shift nor small numbers show through
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = (x ^ (x >> np.uint64(31))) + shift[1:]
    return x
