"""Tables that a module computes from sizes alone, so that the other side need not store them.

Sources: sinusoids from "Attention Is All You Need" (2017), section 3.5, with the exponents of that
paper or those of tensor2tensor; rotary frequencies from RoFormer (2021), section 3.2.2; the index
of relative positions from the code of Swin Transformer (2021), and with three entries more from
BEiT (2021).
"""

import re
from collections.abc import Callable, Iterator
from math import exp, log
from typing import NamedTuple

import numpy as np

from ..frameworks import jnp

SINUSOID_BASE = 10_000.0
MAX_BASE = 1e9
MIN_BASE = 10.0  # of rotary frequencies; with a base of 1, all of them would be 1
_U32 = 2.0**-24  # the unit roundoff of float32


class Computed(NamedTuple):
    """A table as it is computed from its shape.

    Attributes:
        pattern: the name of the rule.
        value: what the rule takes besides the shape, as text.
        array: the table, in float64 or int64.
        slack: how far a table that was computed in float32 may be from it, entry by entry.
    """

    pattern: str
    value: str
    array: np.ndarray
    slack: np.ndarray | float


def table_of(array: np.ndarray) -> Computed | None:
    """Return the table that the array is, up to rounding, or None if it is no known one."""
    if not array.size or not jnp.issubdtype(array.dtype, jnp.number) or array.dtype.kind == "c":
        return None
    candidates = _integers if jnp.issubdtype(array.dtype, jnp.integer) else _floats
    return next((found for found in candidates(array) if _is_close(array, found)), None)


def computed(pattern: str, shape: tuple[int, ...], value: str) -> np.ndarray:
    """Return the table of a pattern, in float64 or int64.

    Raises:
        ValueError: the shape or the value does not fit.
    """
    require_table(pattern, shape, value)
    return _RULES[pattern](shape, value).array


def _is_close(array: np.ndarray, found: Computed) -> bool:
    """Return whether the array is the table, but for a rounding to its dtype and the slack."""
    if jnp.issubdtype(array.dtype, jnp.integer):
        return bool((array == found.array).all())
    limit = float(jnp.finfo(array.dtype).eps) / 2 * np.abs(found.array) + found.slack
    return bool((np.abs(array.astype(np.float64) - found.array) <= limit).all())


def _integers(array: np.ndarray) -> Iterator[Computed]:
    if array.ndim and array.size == array.shape[-1]:
        yield _positions(array.shape, "0")
    if array.ndim == 2 and array.shape[0] == array.shape[1] > 1:
        for extra in (0, 1):
            inner = len(array) - extra
            for height in range(1, inner + 1):
                if inner % height == 0:
                    yield _relative(array.shape, f"{height}x{inner // height}+{extra}")


def _floats(array: np.ndarray) -> Iterator[Computed]:
    if array.ndim == 1 and len(array) > 2 and 0 < array[-1] < 1:
        # The last entry is base to the power of (1 - n) / n.
        exponent = -log(float(array[-1])) * len(array) / (len(array) - 1)
        if log(MIN_BASE) <= exponent <= log(MAX_BASE):
            yield _frequencies(array.shape, repr(float(f"{exp(exponent):.4g}")))
    matrix = array.squeeze()
    if matrix.ndim == 2 and matrix.shape[0] > 2 and matrix.shape[1] > 3 and _begins(matrix[0]):
        padding = np.flatnonzero(~matrix.any(axis=1))
        rows = "" if len(padding) != 1 else str(padding[0])
        for order in ("sin cos", "cos sin", "pairs"):
            for exponents in ("half", "whole"):
                yield _sinusoids(array.shape, f"{order},{exponents},{rows}")


def _begins(row: np.ndarray) -> bool:
    """Return whether a row may be the sines and cosines of position 0, which are 0 and 1."""
    entries = row.astype(np.float64)
    return bool((np.minimum(np.abs(entries), np.abs(entries - 1.0)) < 1e-3).all())


def _positions(shape: tuple[int, ...], value: str) -> Computed:
    """Return 0, 1, 2 … along the last axis."""
    return Computed("positions", value, np.broadcast_to(np.arange(shape[-1]), shape), 0.0)


def _relative(shape: tuple[int, ...], value: str) -> Computed:
    """Return the index of each relative position in a window: "7x7+0", or "14x14+1" in BEiT."""
    sizes, _, extra = value.partition("+")
    height, width = map(int, sizes.split("x"))
    rows, columns = (axis.ravel() for axis in np.indices((height, width)))
    down, right = (
        axis[:, None] - axis + size - 1 for axis, size in ((rows, height), (columns, width))
    )
    index = down * (2 * width - 1) + right
    if int(extra):
        count = (2 * height - 1) * (2 * width - 1)
        index = np.pad(index, ((1, 0), (1, 0)))
        index[0], index[:, 0], index[0, 0] = count, count + 1, count + 2
    return Computed("relative positions", value, index, 0.0)


def _frequencies(shape: tuple[int, ...], value: str) -> Computed:
    """Return the frequencies of rotary embeddings: base to the power of -i / n."""
    base, exponents = float(value), np.arange(shape[-1]) / shape[-1]
    table = base**-exponents
    # The exponent, its product with log(base), and the power are rounded.
    return Computed("frequencies", value, table, 2 * _U32 * (1 + 2 * exponents * log(base)) * table)


def _sinusoids(shape: tuple[int, ...], value: str) -> Computed:
    """Return the sines and cosines of positions: "sin cos,half,", and the row that is 0, if any."""
    order, denominator, zero = value.split(",")
    tokens, width = (size for size in shape if size > 1)
    half = width // 2
    exponents = np.arange(half) / (half - 1 if denominator == "whole" else width / 2)
    angles = np.arange(tokens)[:, None] * SINUSOID_BASE**-exponents
    # The angle is rounded as a frequency is, and by the product; then the sine is.
    slack = 2 * _U32 * ((2 + 2 * exponents * log(SINUSOID_BASE)) * angles + 1)
    parts, slacks = [np.sin(angles), np.cos(angles)], np.concatenate([slack, slack], axis=1)
    if order == "cos sin":
        parts.reverse()
    table = np.concatenate(parts, axis=1)
    if order == "pairs":
        table, slacks = (
            array.reshape(tokens, 2, half).transpose(0, 2, 1).reshape(tokens, 2 * half)
            for array in (table, slacks)
        )
    table, slacks = (np.pad(array, ((0, 0), (0, width % 2))) for array in (table, slacks))
    if zero:
        table[int(zero)], slacks[int(zero)] = 0.0, 0.0
    return Computed("sinusoids", value, table.reshape(shape), slacks.reshape(shape))


_RULES: dict[str, Callable[[tuple[int, ...], str], Computed]] = {
    "positions": _positions,
    "relative positions": _relative,
    "frequencies": _frequencies,
    "sinusoids": _sinusoids,
}
PATTERNS = frozenset(_RULES)
_VALUES = {
    "positions": r"0",
    "relative positions": r"[1-9]\d{0,4}x[1-9]\d{0,4}\+[01]",
    "frequencies": r"\d+\.\d+",
    "sinusoids": r"(sin cos|cos sin|pairs),(half|whole),\d{0,9}",
}


def require_table(pattern: str, shape: tuple[int, ...], value: str) -> None:
    """Raise ValueError if there is no such table."""
    fits = re.fullmatch(_VALUES[pattern], value) is not None
    if pattern == "sinusoids":
        row = value.rpartition(",")[2]
        sizes = [size for size in shape if size > 1]
        fits = fits and len(sizes) == 2 and sizes[1] > 3 and int(row or 0) < sizes[0]
    if pattern == "frequencies" and fits:
        fits = len(shape) == 1 and MIN_BASE <= float(value) <= MAX_BASE
    if pattern == "relative positions" and fits:
        height, width, extra = map(int, re.findall(r"\d+", value))
        fits = shape == (height * width + extra,) * 2
    if not fits:
        raise ValueError(f"there are no {pattern} {value} of shape {shape}")
