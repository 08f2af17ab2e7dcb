"""Compare two arrays entry by entry: how far apart, against what is allowed, and where."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """How two arrays agree.

    `ratio` is the worst |found - expected| / limit: at most 1 where they agree, inf where NaN or inf
    stand in different places or a limit is infinite, NaN where no limit was given. `relative` is the
    largest difference over the largest expected entry.
    """

    absolute: float
    relative: float
    ratio: float
    index: tuple[int, ...]

    @property
    def held(self) -> bool:
        """Whether every entry lies within its limit; a NaN ratio does not."""
        return self.ratio <= 1.0


def agreement(found: np.ndarray, expected: np.ndarray, limit: np.ndarray | float | None = None) -> Agreement:
    """Compare each entry with its own limit; a limit of zero asks for equality, none only measures.

    NaN and infinities must stand in the same places, whatever the limit there.

    Raises:
        ValueError: the shapes differ, a limit is negative, or there is nothing to compare.
    """
    if limit is not None and np.any(np.asarray(limit) < 0):
        raise ValueError("a limit is negative")
    if found.shape != expected.shape:
        raise ValueError(f"cannot compare shapes {found.shape} and {expected.shape}")
    if not found.size:
        raise ValueError(f"nothing to compare: the arrays have shape {found.shape}")
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(found) & np.isfinite(expected)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.where(finite, np.abs(found - expected), np.where(same, 0.0, np.inf))
        bound = np.nan if limit is None else limit
        ratio = np.where(difference == 0.0, 0.0, difference / bound)
    ratio = np.where(np.isnan(ratio) | np.isinf(bound), np.inf, ratio)
    index = np.unravel_index(np.argmax(ratio), ratio.shape)
    largest = np.abs(expected[finite]).max(initial=0.0)
    absolute = float(difference.max())
    relative = absolute / largest if largest else (0.0 if absolute == 0.0 else float("inf"))
    worst = float("nan") if limit is None else float(ratio[index])
    return Agreement(absolute, float(relative), worst, tuple(int(i) for i in index))
