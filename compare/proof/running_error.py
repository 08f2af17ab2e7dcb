"""Arrays that know how far rounding in float64 may carry a computation of them: running error analysis.

Every operation adds to the errors that it inherits the largest rounding of its own: u times the
result for one operation, gamma_n(u) times the absolute terms for a sum of n, whatever their order
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1 to 3.3), EXP_ULPS for
`exp`. A formula written with `@ * / + -`, `exp` and `sum` thereby gives its value and, entry by
entry, the limit for anybody else's float64 computation of the same terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .reference import merge_heads, split_heads
from .rounding_bound import EXP_ULPS, PRECISIONS, gamma

_U, _, _SMALLEST, _ = PRECISIONS["float64"]


@dataclass(frozen=True)
class Bounded:
    """`value`, and `error` >= |computed - exact| for each entry; of equal shape."""

    value: np.ndarray
    error: np.ndarray

    __array_ufunc__ = (
        None  # array @ Bounded is Bounded.__rmatmul__, which is not there: lift arrays first
    )

    @classmethod
    def exact(cls, array: np.ndarray) -> Bounded:
        """Lift what both sides are given alike."""
        value = np.asarray(array, dtype=np.float64)
        return cls(value, np.zeros_like(value))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return self.value.shape

    @property
    def mT(self) -> Bounded:
        """The last two axes swapped."""
        return Bounded(self.value.swapaxes(-1, -2), self.error.swapaxes(-1, -2))

    def __add__(self, other: Bounded) -> Bounded:
        return _rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Bounded) -> Bounded:
        return _rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Bounded) -> Bounded:
        inherited = np.abs(self.value) * other.error + self.error * (
            np.abs(other.value) + other.error
        )
        return _rounded(self.value * other.value, inherited)

    def __truediv__(self, other: Bounded) -> Bounded:
        value = self.value / other.value
        inherited = (self.error + np.abs(value) * other.error) / (np.abs(other.value) - other.error)
        return _rounded(value, inherited)

    def __matmul__(self, other: Bounded) -> Bounded:
        left, right = np.abs(self.value) + self.error, np.abs(other.value) + other.error
        terms = self.value.shape[-1]
        inherited = np.abs(self.value) @ other.error + self.error @ right
        own = gamma(terms, _U) * (left @ right) + 2 * terms * _SMALLEST
        return Bounded(self.value @ other.value, inherited + own)

    def scaled(self, factor: float, roundings: int = 1) -> Bounded:
        """Multiply by a number that itself comes out of `roundings` - 1 roundings."""
        error = abs(factor) * self.error
        own = gamma(roundings, _U) * (np.abs(factor * self.value) + error)
        return Bounded(factor * self.value, error + own + _SMALLEST)

    def kept(self, keep: np.ndarray) -> Bounded:
        """Put an exact 0 where `keep` is False."""
        return Bounded(np.where(keep, self.value, 0.0), np.where(keep, self.error, 0.0))

    def exp(self) -> Bounded:
        """Return e to the value."""
        value = np.exp(self.value)
        grown = np.expm1(self.error)
        return Bounded(value, value * (grown + 2 * _U * EXP_ULPS * (1 + grown)) + _SMALLEST)

    def sqrt(self) -> Bounded:
        """Return the square root."""
        value = np.sqrt(self.value)
        with np.errstate(invalid="ignore", divide="ignore"):
            inherited = np.where(
                self.error == 0.0, 0.0, np.minimum(self.error / value, np.sqrt(self.error))
            )
        return _rounded(value, inherited)

    def shifted(self, opened: np.ndarray) -> Bounded:
        """Subtract the largest open entry of the last axis, a shift that softmax does not see: its choice is no error.

        Where not open, the result is 0.
        """
        largest = np.where(opened, self.value, -np.inf).max(axis=-1, keepdims=True)
        return _rounded(
            np.where(opened, self.value - largest, 0.0), np.where(opened, self.error, 0.0)
        )

    def sum(self, axis: int | tuple[int, ...], keepdims: bool = False) -> Bounded:
        """Sum over the axes."""
        value = self.value.sum(axis=axis, keepdims=keepdims)
        inherited = self.error.sum(axis=axis, keepdims=keepdims)
        absolute = np.abs(self.value).sum(axis=axis, keepdims=keepdims)
        terms = self.value.size // max(value.size, 1)
        return Bounded(value, inherited + gamma(terms, _U) * (absolute + inherited))

    def rows(self) -> Bounded:
        """Merge batch and tokens: (..., batch, tokens, width) becomes (..., batch * tokens, width)."""
        shape = (*self.shape[:-3], self.shape[-3] * self.shape[-2], self.shape[-1])
        return Bounded(self.value.reshape(shape), self.error.reshape(shape))

    def batched(self, batch: int) -> Bounded:
        """Undo `rows`."""
        shape = (*self.shape[:-2], batch, self.shape[-2] // batch, self.shape[-1])
        return Bounded(self.value.reshape(shape), self.error.reshape(shape))

    def split(self, heads: int) -> Bounded:
        """Return (..., tokens, width) as (..., heads, tokens, head_dim)."""
        return Bounded(split_heads(self.value, heads), split_heads(self.error, heads))

    def merged(self) -> Bounded:
        """Undo `split`."""
        return Bounded(merge_heads(self.value), merge_heads(self.error))

    def spread(self, axes: int = 1, *, before: int = 0) -> Bounded:
        """Insert axes of length 1 before the last `before` axes."""
        axis = tuple(-1 - before - i for i in range(axes))
        return Bounded(np.expand_dims(self.value, axis), np.expand_dims(self.error, axis))


def _rounded(value: np.ndarray, inherited: np.ndarray) -> Bounded:
    inherited = np.broadcast_to(inherited, value.shape)
    return Bounded(value, inherited + _U * (np.abs(value) + inherited) + _SMALLEST)
