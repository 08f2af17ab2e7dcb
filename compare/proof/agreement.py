"""Compare two arrays entry by entry: how far apart, against what is allowed, and where."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """How two arrays agree.

    `ratio` is the worst |found - expected| / limit: at most 1 where they agree, inf where NaN or
    inf stand in different places or a limit is infinite, NaN where no limit was given. `index` is
    where that is, `found`, `expected` and `limit` what stands there. `absolute` is the largest
    difference, and `relative` the same over the largest expected entry.
    """

    absolute: float
    relative: float
    ratio: float
    index: tuple[int, ...]
    found: float
    expected: float
    limit: float

    @property
    def held(self) -> bool:
        """Whether every entry lies within its limit; a NaN ratio does not."""
        return self.ratio <= 1.0

    def __str__(self) -> str:
        return (
            f"{self.found!r} where {self.expected!r} is expected, at {self.index}: "
            f"error/limit {self.ratio:.3g}, limit {self.limit:.3g}"
        )


@dataclass(frozen=True)
class Finding:
    """One comparison that a check has made, of one implementation in one case; `why` gives the limit its reason."""

    check: str
    implementation: str
    case: str
    agreement: Agreement
    why: str

    @property
    def held(self) -> bool:
        """Whether it lies within the limit."""
        return self.agreement.held

    def __str__(self) -> str:
        return f"{self.check} ({self.implementation}), {self.case}: {self.agreement}. The limit: {self.why}"


def agreement(
    found: np.ndarray, expected: np.ndarray, limit: np.ndarray | float | None = None
) -> Agreement:
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
        bound = np.broadcast_to(np.nan if limit is None else limit, found.shape)
        ratio = np.where(difference == 0.0, 0.0, difference / bound)
    ratio = np.where(np.isnan(ratio) | np.isinf(bound), np.inf, ratio)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(ratio), ratio.shape))
    largest = np.abs(expected[finite]).max(initial=0.0)
    absolute = float(difference.max())
    relative = absolute / largest if largest else (0.0 if absolute == 0.0 else float("inf"))
    worst = float("nan") if limit is None else float(ratio[index])
    at = float(found[index]), float(expected[index]), float(bound[index])
    return Agreement(absolute, float(relative), worst, index, *at)


def identical(found: np.ndarray, expected: np.ndarray) -> Agreement:
    """Compare bit for bit, NaN payloads and the sign of 0 included; `absolute` counts the entries that differ.

    Raises:
        ValueError: the dtypes or shapes differ, or there is nothing to compare.
    """
    if found.dtype != expected.dtype:
        raise ValueError(f"cannot compare the bits of {found.dtype} and {expected.dtype}")
    measured = agreement(found, expected)
    differing = (_bytes(found) != _bytes(expected)).any(axis=-1)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(differing), differing.shape))
    at = float(found[index]), float(expected[index]), 0.0
    return Agreement(
        float(differing.sum()), measured.relative, np.inf if differing.any() else 0.0, index, *at
    )


def same_names(found: Iterable[str], expected: Iterable[str]) -> Agreement:
    """Compare two sets of names; `absolute` counts those that are on one side only."""
    left, right = set(found), set(expected)
    apart = len(left ^ right)
    return Agreement(
        float(apart),
        float(apart),
        np.inf if apart else 0.0,
        (),
        float(len(left)),
        float(len(right)),
        0.0,
    )


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(*array.shape, 1).view(np.uint8)
