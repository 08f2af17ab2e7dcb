"""Shorten large arrays, so that a record is not much larger than the weights."""

import numpy as np

from .result import NamedArrays

MAX_ENTRIES = 1 << 14


def sketched(arrays: NamedArrays) -> NamedArrays:
    """Return the arrays, with weighted sums of neighbours in the place of large floating ones.

    The sums are linear, so that how far they may move is found as for the entries. A single entry
    that differs is seen in its sum, and two that change places have different weights.
    """
    return {
        name: _sums(array) if array.dtype.kind == "f" and array.size > MAX_ENTRIES else array
        for name, array in arrays.items()
    }


def _sums(array: np.ndarray) -> np.ndarray:
    width = -(-array.size // MAX_ENTRIES)
    padded = np.zeros(-(-array.size // width) * width)
    padded[: array.size] = array.ravel()
    weights = np.random.default_rng(width).uniform(0.5, 1.5, width)
    return np.asarray(padded.reshape(-1, width) @ weights)
