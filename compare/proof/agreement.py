"""Compare two arrays entry by entry: the worst error, its limit and its position."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """The result of comparing two arrays entry by entry.

    Attributes:
        absolute: the largest difference.
        relative: the largest difference over the largest expected entry.
        ratio: the largest |found - expected| / limit; at most 1 if the arrays agree. It is inf
            where NaN or inf are at different positions or a limit is infinite, and NaN if no
            limit was given.
        index: the position of the largest ratio; without a limit, of the first difference.
        found: the entry found at that position.
        expected: the entry expected there.
        limit: the limit there.
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
        """Whether every entry lies within its limit; False if the ratio is NaN."""
        return self.ratio <= 1.0

    def __str__(self) -> str:
        return (
            f"found {self.found!r}, expected {self.expected!r} at {self.index}: "
            f"error/limit {self.ratio:.3g}, limit {self.limit:.3g}"
        )


@dataclass(frozen=True)
class Finding:
    """One comparison that a check made, of one implementation in one case.

    `why` describes how the limit is derived. `error` is the exception that ended the check before
    it could compare anything, if there was one.
    """

    check: str
    implementation: str
    case: str
    agreement: Agreement
    why: str
    error: str = ""

    @property
    def held(self) -> bool:
        """Whether every entry lies within its limit."""
        return self.agreement.held

    def __str__(self) -> str:
        place = f"{self.check} ({self.implementation}), {self.case}"
        if self.error:
            return f"{place}: raised {self.error}"
        return f"{place}: {self.agreement}. The limit: {self.why}"


def agreement(
    found: np.ndarray, expected: np.ndarray, limit: np.ndarray | float | None = None
) -> Agreement:
    """Compare each entry with its own limit: 0 requires equality, None only measures.

    NaN and infinities must be at the same positions in both arrays, whatever the limit is there.

    Raises:
        ValueError: the shapes differ, a limit is negative, or the arrays are empty.
    """
    if limit is not None and np.any(np.asarray(limit) < 0):
        raise ValueError("a limit is negative")
    if found.shape != expected.shape:
        raise ValueError(f"cannot compare shapes {found.shape} and {expected.shape}")
    if not found.size:
        raise ValueError(f"nothing to compare: the arrays have shape {found.shape}")
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    bound = np.nan if limit is None else limit
    limits = np.broadcast_to(bound, found.shape)
    largest = max(float(expected.max()), -float(expected.min()))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(found - expected)
    if not np.isfinite(difference.max()):
        finite = np.isfinite(found) & np.isfinite(expected)
        equal = (found == expected) | (np.isnan(found) & np.isnan(expected))
        difference = np.where(finite, difference, np.where(equal, 0.0, np.inf))
        largest = float(np.abs(expected[finite]).max(initial=0.0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.divide(difference, limits, out=np.zeros_like(difference), where=difference != 0)
    if not np.isfinite(bound).all():
        ratio = np.where(np.isnan(ratio) | np.isinf(limits), np.inf, ratio)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(ratio), ratio.shape))
    absolute = float(difference.max())
    relative = absolute / largest if largest else (0.0 if absolute == 0.0 else float("inf"))
    return Agreement(
        absolute=absolute,
        relative=float(relative),
        ratio=float("nan") if limit is None else float(ratio[index]),
        index=index,
        found=float(found[index]),
        expected=float(expected[index]),
        limit=float(limits[index]),
    )


def identical(found: np.ndarray, expected: np.ndarray) -> Agreement:
    """Compare bit for bit, including NaN payloads and the sign of 0.

    `absolute` is the number of entries that differ.

    Raises:
        ValueError: the dtypes or shapes differ, or the arrays are empty.
    """
    if found.dtype != expected.dtype:
        raise ValueError(f"cannot compare the bits of {found.dtype} and {expected.dtype}")
    relative = agreement(found, expected).relative
    differs = (_bytes(found) != _bytes(expected)).any(axis=-1)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(differs), differs.shape))
    return Agreement(
        absolute=float(differs.sum()),
        relative=relative,
        ratio=np.inf if differs.any() else 0.0,
        index=index,
        found=float(found[index]),
        expected=float(expected[index]),
        limit=0.0,
    )


def crashed(check: str, implementation: str, case: str, error: Exception) -> Finding:
    """Return the finding of a check that an exception of the code under test ended."""
    return uncompared(check, implementation, case, f"{type(error).__name__}: {error}")


def uncompared(check: str, implementation: str, case: str, reason: str) -> Finding:
    """Return the finding of a check that could not compare two arrays; it does not hold."""
    nothing = Agreement(np.inf, np.inf, np.inf, (), np.nan, np.nan, 0.0)
    return Finding(check, implementation, case, nothing, "", reason)


def same_names(found: Iterable[str], expected: Iterable[str]) -> Agreement:
    """Compare two sets of names; `absolute` is the number of names on one side only."""
    found, expected = set(found), set(expected)
    unmatched = len(found ^ expected)
    return Agreement(
        absolute=float(unmatched),
        relative=float(unmatched),
        ratio=np.inf if unmatched else 0.0,
        index=(),
        found=float(len(found)),
        expected=float(len(expected)),
        limit=0.0,
    )


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(*array.shape, 1).view(np.uint8)
