"""Dual numbers: a formula evaluated on them also gives its derivative along one direction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .running_error import Bounded


@dataclass(frozen=True)
class Dual:
    """`value` + `tangent` * epsilon, with epsilon squared = 0."""

    value: Bounded
    tangent: Bounded

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return self.value.shape

    @property
    def mT(self) -> Dual:
        """This number with its last two axes swapped."""
        return Dual(self.value.mT, self.tangent.mT)

    def __add__(self, other: Dual) -> Dual:
        return Dual(self.value + other.value, self.tangent + other.tangent)

    def __sub__(self, other: Dual) -> Dual:
        return Dual(self.value - other.value, self.tangent - other.tangent)

    def __mul__(self, other: Dual) -> Dual:
        return Dual(
            self.value * other.value, self.tangent * other.value + self.value * other.tangent
        )

    def __truediv__(self, other: Dual) -> Dual:
        quotient = self.value / other.value
        return Dual(quotient, (self.tangent - quotient * other.tangent) / other.value)

    def __matmul__(self, other: Dual) -> Dual:
        return Dual(
            self.value @ other.value, self.tangent @ other.value + self.value @ other.tangent
        )

    def scaled(self, factor: float, roundings: int = 1) -> Dual:
        """Multiply by a constant that was itself computed with `roundings` - 1 roundings."""
        return Dual(self.value.scaled(factor, roundings), self.tangent.scaled(factor, roundings))

    def kept(self, keep: np.ndarray) -> Dual:
        """Replace the entries where `keep` is False by an exact 0."""
        return Dual(self.value.kept(keep), self.tangent.kept(keep))

    def exp(self) -> Dual:
        """Return e raised to this number."""
        value = self.value.exp()
        return Dual(value, value * self.tangent)

    def shifted(self, opened: np.ndarray) -> Dual:
        """Subtract the largest open entry of the last axis, which does not change softmax."""
        return Dual(self.value.shifted(opened), self.tangent)

    def sum(self, axis: int | tuple[int, ...], keepdims: bool = False) -> Dual:
        """Sum over the axes."""
        return Dual(self.value.sum(axis, keepdims), self.tangent.sum(axis, keepdims))

    def rows(self) -> Dual:
        """Reshape (..., batch, tokens, width) to (..., batch * tokens, width)."""
        return Dual(self.value.rows(), self.tangent.rows())

    def batched(self, batch: int) -> Dual:
        """Undo `rows`."""
        return Dual(self.value.batched(batch), self.tangent.batched(batch))

    def split(self, heads: int) -> Dual:
        """Reshape (..., tokens, width) to (..., heads, tokens, head_dim)."""
        return Dual(self.value.split(heads), self.tangent.split(heads))

    def repeated(self, copies: int) -> Dual:
        """Repeat each head, (..., heads, tokens, head_dim)."""
        return Dual(self.value.repeated(copies), self.tangent.repeated(copies))

    def summed_copies(self, copies: int) -> Dual:
        """Sum over the copies that `repeated` made of each head."""
        return Dual(self.value.summed_copies(copies), self.tangent.summed_copies(copies))

    def merged(self) -> Dual:
        """Undo `split`."""
        return Dual(self.value.merged(), self.tangent.merged())

    def spread(self, axes: int = 1, *, before: int = 0) -> Dual:
        """Insert axes of length 1 before the last `before` axes."""
        return Dual(
            self.value.spread(axes, before=before), self.tangent.spread(axes, before=before)
        )
