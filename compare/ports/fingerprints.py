"""Which values of two runs are the same, whatever their layout.

Two values match if the quantiles of their sorted entries agree, so that transposed, reshaped and
uniformly repeated values match. Where the entries of two values of one size are the same but lie in
another order, it must be an order of axes, split or merged; a value that is rolled, flipped or
shuffled is another value. Values of few different numbers, such as masks and indices, must be equal
entry by entry but for the order of their axes.
"""

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from .report import EQUAL
from .values import Value

QUANTILES = 33
# Far above what float64 rounds in a module, and far below what a wrong statement changes.
TOLERANCE = EQUAL
_MAX_ORDERED = 1 << 21  # entries of values whose order is looked at
_FEW = 8  # different numbers; a value with as few may match others by chance
_MAX_AXES = 6
_FAR = 1e4


class Fingerprints:
    """The sorted quantiles of the values of one run, and which of them have few different numbers.

    Args:
        values: the values.
    """

    def __init__(self, values: Sequence[Value]) -> None:
        self.values = values
        self.rows = np.full((len(values), QUANTILES), np.nan)
        self.is_few = np.zeros(len(values), bool)
        for index, value in enumerate(values):
            if value.quantiles is not None:
                self.rows[index], self.is_few[index] = value.quantiles, value.is_few
            elif value.array.size:
                self.rows[index], self.is_few[index] = fingerprint(value.array)


def fingerprint(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the quantiles of the entries, and whether they are few different numbers."""
    ordered = np.sort(numbers(array), axis=None)
    fractions = (np.arange(QUANTILES) + 0.5) / QUANTILES
    row = ordered[(fractions * len(ordered)).astype(int)]
    steps = np.diff(ordered[np.isfinite(ordered)])
    distinct = 1 + int((steps > TOLERANCE * typical(row)).sum())
    return row, distinct <= min(_FEW, max(1, ordered.size - 1))


def numbers(array: np.ndarray) -> np.ndarray:
    """Return the entries as float64; of complex numbers their sizes."""
    return (np.abs(array) if array.dtype.kind == "c" else array).astype(np.float64)


def typical(array: np.ndarray) -> float:
    """Return the median size of the entries that are finite and not 0; 0 if there are none.

    A number far above all others is what scores behind a mask are set to, and does not count.
    """
    sizes = np.abs(array[np.isfinite(array) & (array != 0)])
    if not sizes.size:
        return 0.0
    largest = sizes.max()
    others = sizes[sizes < largest]
    if others.size and largest > _FAR * others.max():
        sizes = others
    return float(np.median(sizes))


def close(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return which entries agree, up to roundings of float64."""
    scale = TOLERANCE * typical(other)
    with np.errstate(invalid="ignore", over="ignore"):
        near = np.abs(one - other) <= np.maximum(scale, TOLERANCE * np.abs(other))
    return near & np.isfinite(other) | (one == other) | (np.isnan(one) & np.isnan(other))


def close_rows(rows: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return which rows of quantiles agree with one row."""
    return np.asarray(close(rows, row).all(axis=1))


def same_value(one: np.ndarray, other: np.ndarray, *, is_few: bool) -> bool:
    """Return whether two values whose quantiles agree are the same but for their layout."""
    one, other = one.squeeze(), other.squeeze()
    if is_few or (one.size == other.size and sorted(one.shape) == sorted(other.shape)):
        return _equal_up_to_axes(one, other)
    if one.size != other.size:
        return max(one.size, other.size) % min(one.size, other.size) == 0
    if one.size > _MAX_ORDERED:
        return True
    order = order_between(one, other)
    return order is None or is_order_of_axes(order)


def same_size(one: np.ndarray, other: np.ndarray, *, is_few: bool) -> bool:
    """Return whether values, one of which is not kept whole, may be the same by their sizes."""
    if is_few:
        return sizes(one) == sizes(other)
    return max(one.size, other.size) % min(one.size, other.size) == 0


def sizes(array: np.ndarray) -> list[int]:
    """Return the lengths of the axes, sorted, without those of 1."""
    return sorted(size for size in array.shape if size > 1)


def _equal_up_to_axes(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether one is the other with its axes in another order, repeated or regrouped."""
    if not one.size or not other.size:
        return one.size == other.size
    if one.size == 1 or other.size == 1:
        return one.size == other.size and all_close(one.ravel(), other.ravel())
    if one.size != other.size:
        small, large = sorted((one, other), key=lambda array: array.size)
        return _is_broadcast(small, large)
    if one.size > _MAX_ORDERED or all_close(one.ravel(), other.ravel()):
        return True
    if sorted(one.shape) != sorted(other.shape) or one.ndim > _MAX_AXES:
        return False
    return any(
        one.transpose(axes).shape == other.shape and all_close(one.transpose(axes), other)
        for axes in permutations(range(one.ndim))
    )


def _is_broadcast(small: np.ndarray, large: np.ndarray) -> bool:
    """Return whether the larger array repeats the smaller one along axes of its own."""
    if large.ndim > _MAX_AXES:
        return False
    for axes in permutations(range(large.ndim), small.ndim):
        if tuple(large.shape[axis] for axis in axes) != small.shape:
            continue
        rest = [axis for axis in range(large.ndim) if axis not in axes]
        if all_close(
            large.transpose(*rest, *axes),
            np.broadcast_to(small, (*(large.shape[axis] for axis in rest), *small.shape)),
        ):
            return True
    return False


def all_close(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether all entries agree, up to roundings of float64."""
    return bool(close(numbers(one), numbers(other)).all())


def order_between(one: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """Return where each entry of one lies in the other, flat, in the shape of one.

    None if an entry occurs twice, so that its place cannot be told.
    """
    first, second = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    by_first, by_second = np.argsort(first, kind="stable"), np.argsort(second, kind="stable")
    ordered = first[by_first]
    with np.errstate(invalid="ignore"):
        steps = np.diff(ordered)
    if not (steps > 2 * TOLERANCE * typical(ordered)).all():
        return None
    order = np.empty(first.size, np.int64)
    order[by_first] = by_second
    return order.reshape(one.shape)


def is_order_of_axes(order: np.ndarray) -> bool:
    """Return whether places follow from the axes alone: swapped, split or merged."""
    return all(_is_mixed_radix(along) for along in axis_steps(order) or [np.array([1, 0])])


def axis_steps(order: np.ndarray) -> list[np.ndarray] | None:
    """Return the places along each axis, if the place of an entry is their sum; else None."""
    order = order if order.ndim else order.reshape(1)
    origin = order[(0,) * order.ndim]
    along = []
    total = np.full(order.shape, origin)
    for axis in range(order.ndim):
        index: list[int | slice] = [0] * order.ndim
        index[axis] = slice(None)
        steps = order[tuple(index)] - origin
        along.append(steps)
        shape = [1] * order.ndim
        shape[axis] = -1
        total = total + steps.reshape(shape)
    return along if (total == order).all() else None


def _is_mixed_radix(places: np.ndarray) -> bool:
    """Return whether places are those of an axis that lies whole, or split into several axes.

    They then are sums of digits with positive strides: 0 1 2, or 0 5 10 1 6 11.
    """
    if len(places) == 1:
        return True
    if places[0] != 0 or (places[1:] <= 0).any():
        return False
    period = 1
    while period < len(places):
        stride = places[period]
        count = 1
        while (count + 1) * period <= len(places) and (
            places[count * period : (count + 1) * period] == places[:period] + count * stride
        ).all():
            count += 1
        if count == 1:
            return False
        period *= count
    return period == len(places)
