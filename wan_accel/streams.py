"""Random numbers as functions of (seed, purpose, epoch, item): no state to replay, equal everywhere. Torch-free."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Purposes of random numbers: one stream each, so that adding a draw never changes another."""

    ORDER = 0
    STEP_ORDER = 1
    SIGMA = 2
    NOISE = 3
    CAPTION = 4
    FACE = 5
    KNOWN = 6
    SPLIT = 7
    FIXED = 8
    IMAGE = 9
    MIXTURE = 10


def mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): a bijection of uint64 that spreads every bit."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def hash_items(seed: int, purpose: int, epoch: int, items: np.ndarray) -> np.ndarray:
    """uint64 for each item: the same on every platform, without a state to replay."""
    key = np.zeros((), dtype=np.uint64)
    for part in (seed, purpose, epoch):
        key = mix(key ^ np.uint64(part % 2**64))
    return mix(mix(items.astype(np.uint64)) ^ key)


def uniform(seed: int, purpose: int, epoch: int, items: np.ndarray) -> np.ndarray:
    """Uniform in [0, 1) with 53 random bits."""
    return (hash_items(seed, purpose, epoch, items) >> np.uint64(11)).astype(np.float64) / 2**53


def shuffled(rows: np.ndarray, *, seed: int, number: int) -> np.ndarray:
    """Rows in an order fixed by (seed, number): the passes of a mixture over a dataset."""
    return rows[np.argsort(hash_items(seed, Stream.MIXTURE, number, rows), kind="stable")]
