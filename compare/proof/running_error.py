"""Running error analysis: arrays that carry a bound on the rounding errors of their computation.

Every operation adds its own largest rounding error to the errors of its operands. That is u times
the result for a single operation, gamma_n(u) times the absolute terms for a sum of n terms in any
order (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1 to 3.3), and
EXP_ULPS for `exp`. A formula written with `@ * / + -`, `exp` and `sum` therefore gives its value
and, entry by entry, a limit on the error of any float64 computation of the same terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .reference import merge_heads, split_heads
from .rounding_bound import EXP_ULPS, PRECISIONS, gamma

_U, _, _SMALLEST, _ = PRECISIONS["float64"]


@dataclass(frozen=True)
class Bounded:
    """`value`, and for each of its entries an `error` >= |computed - exact|."""

    value: np.ndarray
    error: np.ndarray

    # `array @ Bounded` raises a TypeError: lift the array with `exact` first.
    __array_ufunc__ = None

    @classmethod
    def exact(cls, array: np.ndarray) -> Bounded:
        """Lift an array that both sides start from: its error is 0."""
        value = np.asarray(array, dtype=np.float64)
        return cls(value, np.zeros_like(value))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return self.value.shape

    @property
    def mT(self) -> Bounded:
        """This array with its last two axes swapped."""
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
        own_error = gamma(terms, _U) * (left @ right) + 2 * terms * _SMALLEST
        return Bounded(self.value @ other.value, inherited + own_error)

    def scaled(self, factor: float, roundings: int = 1) -> Bounded:
        """Multiply by a constant that was itself computed with `roundings` - 1 roundings."""
        error = abs(factor) * self.error
        own_error = gamma(roundings, _U) * (np.abs(factor * self.value) + error)
        return Bounded(factor * self.value, error + own_error + _SMALLEST)

    def kept(self, keep: np.ndarray) -> Bounded:
        """Replace the entries where `keep` is False by an exact 0."""
        return Bounded(np.where(keep, self.value, 0.0), np.where(keep, self.error, 0.0))

    def exp(self) -> Bounded:
        """Return e raised to this array."""
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
        """Subtract the largest open entry of the last axis; entries that are not open become 0.

        Softmax does not depend on this shift, so the error of the largest entry is not added.
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
        """Reshape (..., batch, tokens, width) to (..., batch * tokens, width)."""
        shape = (*self.shape[:-3], self.shape[-3] * self.shape[-2], self.shape[-1])
        return Bounded(self.value.reshape(shape), self.error.reshape(shape))

    def batched(self, batch: int) -> Bounded:
        """Undo `rows`."""
        shape = (*self.shape[:-2], batch, self.shape[-2] // batch, self.shape[-1])
        return Bounded(self.value.reshape(shape), self.error.reshape(shape))

    def split(self, heads: int) -> Bounded:
        """Reshape (..., tokens, width) to (..., heads, tokens, head_dim)."""
        return Bounded(split_heads(self.value, heads), split_heads(self.error, heads))

    def repeated(self, copies: int) -> Bounded:
        """Repeat each head, (..., heads, tokens, head_dim)."""
        return Bounded(self.value.repeat(copies, axis=-3), self.error.repeat(copies, axis=-3))

    def summed_copies(self, copies: int) -> Bounded:
        """Sum over the copies that `repeated` made of each head."""
        if copies == 1:
            return self
        *leading, heads, tokens, head_dim = self.shape
        shape = (*leading, heads // copies, copies, tokens, head_dim)
        return Bounded(self.value.reshape(shape), self.error.reshape(shape)).sum(-3)

    def merged(self) -> Bounded:
        """Undo `split`."""
        return Bounded(merge_heads(self.value), merge_heads(self.error))

    def spread(self, axes: int = 1, *, before: int = 0) -> Bounded:
        """Insert axes of length 1 before the last `before` axes."""
        axis = tuple(-1 - before - i for i in range(axes))
        return Bounded(np.expand_dims(self.value, axis), np.expand_dims(self.error, axis))


def _rounded(value: np.ndarray, inherited: np.ndarray) -> Bounded:
    """Return the result of an operation: its rounding adds to the inherited error."""
    inherited = np.broadcast_to(inherited, value.shape)
    return Bounded(value, inherited + _U * (np.abs(value) + inherited) + _SMALLEST)
