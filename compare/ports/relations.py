"""How two values that do not match are related: the hint for the line where they part."""

import math
from collections.abc import Iterator
from itertools import permutations
from typing import NamedTuple

import numpy as np

from .fingerprints import TOLERANCE, axis_steps, close, order_between, typical

_MAX_ENTRIES = 1 << 20
_MAX_AXES = 5
_FAR = 1e6


class Related(NamedTuple):
    """A relation between torch's value and Flax's.

    Attributes:
        hint: a sentence.
        rank: how much the relation says; less is more.
        is_sure: whether it says that these two lines are the place.
        is_scale: whether one is a multiple of the other.
    """

    hint: str
    rank: float
    is_sure: bool = False
    is_scale: bool = False


def related(torch: np.ndarray, flax: np.ndarray) -> Related | None:
    """Return how Flax's value is related to torch's, or None.

    Args:
        torch: the entries of torch's value.
        flax: those of Flax's.
    """
    one, other = torch.squeeze(), flax.squeeze()
    if one.dtype.kind not in "fiub" or other.dtype.kind not in "fiub":
        return None
    if min(one.size, other.size) < 2 or max(one.size, other.size) > _MAX_ENTRIES:
        return None
    if one.dtype.kind == "b" or other.dtype.kind == "b":
        return _of_masks(one, other) if one.dtype.kind == other.dtype.kind else None
    one, other = one.astype(np.float64), other.astype(np.float64)
    if one.size == other.size and (moved := _moved(one, other)):
        return moved
    for aligned in _aligned(one, other):
        if found := _entrywise(one, aligned):
            return found
    return None


def _aligned(one: np.ndarray, other: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the other value in each order of axes that has one's shape; its own order first."""
    if one.shape == other.shape:
        yield other
    if sorted(one.shape) == sorted(other.shape) and 1 < one.ndim <= _MAX_AXES:
        for axes in permutations(range(one.ndim)):
            turned = other.transpose(axes)
            if turned.shape == one.shape and axes != tuple(range(one.ndim)):
                yield turned
    elif one.size == other.size and one.shape != other.shape:
        yield other.reshape(one.shape)


def _entrywise(one: np.ndarray, other: np.ndarray) -> Related | None:
    finite = np.isfinite(one) & np.isfinite(other)
    if not finite.any():
        return None
    limit = _FAR * max(typical(one), typical(other))
    finite &= (np.abs(one) <= limit) & (np.abs(other) <= limit)  # not what stands behind a mask
    if finite.sum() < 2:
        return None
    x, y = one[finite], other[finite]
    scale = max(np.abs(x).max(), np.abs(y).max())
    if not scale:
        return None
    with np.errstate(over="ignore"):
        product = float(x @ x)
        factor = float(x @ y) / product if product else 0.0
    if factor and np.abs(y - factor * x).max() <= 1e-8 * max(np.abs(y).max(), 1e-300):
        if abs(factor - 1.0) <= TOLERANCE:
            return None
        if abs(factor + 1.0) <= TOLERANCE:
            return Related("Flax's value is the negative of torch's.", 0.0, True, True)
        return Related(
            f"Flax's value is torch's times {factor:.10g}{_named(factor, one.shape)}.",
            0.0,
            True,
            True,
        )
    difference = y - x
    if difference.size > 1 and np.ptp(difference) <= 1e-8 * scale:
        return Related(f"Flax's value is torch's plus {difference.mean():.6g}.", 0.2, True)
    largest = float(np.abs(difference).max()) / scale
    if largest <= 1e-6:
        return Related(
            f"They differ by {largest:.1e} of the largest entry, as if one was rounded to "
            "float32 on the way.",
            0.6,
            True,
        )
    equal = np.abs(difference) <= 1e-8 * scale
    share = float(equal.mean())
    if 0.25 <= share < 1.0:
        return Related(
            f"{share:.0%} of the entries are equal, the others differ: a region or a mask.", 0.5
        )
    if found := _along_an_axis(one, other):
        return found
    if largest <= 2e-2:
        return Related(
            f"They differ by {largest:.1e} of the largest entry: another variant of one function, "
            "such as an epsilon or an approximation.",
            0.8,
            True,
        )
    return None


def _along_an_axis(one: np.ndarray, other: np.ndarray) -> Related | None:
    """Recognize a factor, or a difference, that depends on the place along some axes alone."""
    if one.shape != other.shape or one.ndim < 2:
        return None
    with np.errstate(all="ignore"):
        ratio = other / one
    for axis in range(one.ndim):
        with np.errstate(invalid="ignore"):
            spread = np.ptp(ratio, axis=axis)
        if np.isfinite(spread).all() and (spread <= 1e-8 * np.abs(ratio).max(axis=axis)).all():
            return Related(
                f"Flax's value is torch's times a factor that is the same along axis {axis}: "
                "reduced or normalized over other entries.",
                0.4,
            )
    return None


def _moved(one: np.ndarray, other: np.ndarray) -> Related | None:
    """Recognize the same entries in another order."""
    if not close(np.sort(one, axis=None), np.sort(other, axis=None)).all():
        return None
    order = order_between(one, other)
    if order is None:
        return Related("The entries are the same in another order.", 0.2, True)
    steps = axis_steps(order)
    if steps is not None:
        for axis, along in enumerate(steps):
            if found := _axis_move(along, axis):
                return Related(found, 0.1, True)
    return Related(
        "The entries are the same in another order: axes were merged, split or gathered "
        "differently.",
        0.2,
        True,
    )


def _axis_move(along: np.ndarray, axis: int) -> str | None:
    """Name a roll, a flip or an exchange of halves along one axis."""
    count = len(along)
    if count < 2:
        return None
    ranks = np.argsort(np.argsort(along))
    if (ranks == np.arange(count)).all():
        return None
    if (ranks == np.arange(count)[::-1]).all():
        return f"The entries are flipped along axis {axis}."
    shift = int(ranks[0])
    if (ranks == (np.arange(count) + shift) % count).all():
        if 2 * shift == count:
            return f"The halves are exchanged along axis {axis}."
        signed = shift if 2 * shift < count else shift - count
        return f"The entries are rolled by {signed} along axis {axis}."
    return f"The entries are permuted along axis {axis}."


def _of_masks(one: np.ndarray, other: np.ndarray) -> Related | None:
    for aligned in _aligned(one.astype(bool), other.astype(bool)):
        differing = one.astype(bool) != aligned
        if differing.all():
            return Related("One mask is the opposite of the other.", 0.0, True)
        if 0 < differing.mean() < 0.9:
            shift = _shift(one.astype(bool), aligned)
            where = f": shifted by {shift} along the last axis" if shift else ""
            return Related(
                f"{differing.mean():.0%} of the mask's entries differ{where}.", 0.3, True
            )
    return None


def _shift(one: np.ndarray, other: np.ndarray) -> int:
    for shift in (1, -1, 2, -2):
        if one.ndim and one.shape[-1] > 2:
            cut = (
                (slice(1, None), slice(None, -1))
                if shift > 0
                else (slice(None, -1), slice(1, None))
            )
            if abs(shift) == 1 and (one[..., cut[0]] == other[..., cut[1]]).all():
                return -shift
    return 0


def _named(factor: float, shape: tuple[int, ...]) -> str:
    """Return what the factor is, as " = 1/√8", or nothing."""
    size = abs(factor)
    names = {math.log(2): "log 2", 1 / math.log(2): "1/log 2", 2.0: "", 0.5: "", math.pi: "π"}
    for value, name in names.items():
        if abs(size - value) <= 1e-9 * value:
            return f" = {name}" if name else ""
    for count in range(2, 4097):
        for value, name in (
            (math.sqrt(count), f"√{count}"),
            (1 / math.sqrt(count), f"1/√{count}"),
            (1.0 / count, f"1/{count}"),
            (count / (count - 1), f"n/(n-1) for n = {count}"),
            ((count - 1) / count, f"(n-1)/n for n = {count}"),
            (math.sqrt(count / (count - 1)), f"√(n/(n-1)) for n = {count}"),
        ):
            if abs(size - value) <= 1e-9 * value:
                return f" = {name}"
    return ""
