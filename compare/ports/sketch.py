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
    """Return the sums of finite entries; after them, of where there are others of each kind."""
    entries = array.ravel()
    parts = [entries]
    if not (finite := np.isfinite(entries)).all():
        parts = [np.where(finite, entries, 0.0)]
        parts += [np.isposinf(entries), np.isneginf(entries), np.isnan(entries)]
    width = -(-array.size // MAX_ENTRIES)
    weights = np.random.default_rng(width).uniform(0.5, 1.5, width)
    padding = (0, -array.size % width)
    return np.concatenate(
        [
            (np.pad(part, padding) if padding[1] else part).reshape(-1, width) @ weights
            for part in parts
        ]
    )
