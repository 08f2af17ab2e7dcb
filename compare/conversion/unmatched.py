"""Rules for entries that exist on one side only: ignore, verify, or require zeros."""

from typing import Any

import numpy as np

from ..dtypes import numpy_dtype
from ..files.printable import kind_of
from ..frameworks import Tensor, jax
from .mapping import Refill
from .tables import PATTERNS, computed, table_of
from .tensors import Untransferable, tensor_to_numpy, to_host

# Values of a legacy `masked_bias`: the number that blocked scores were set to.
_FILL_VALUES = (
    -1e4,
    -1e9,
    -1e10,
    float(np.finfo(np.float32).min),
    float(np.finfo(np.float16).min),
    -np.inf,
)


def lacking(own: Any, rule: str | None) -> str | None:
    """Return why the source may not lack the entry, which may be "", or None if it may.

    If it may, the target keeps its own value.
    """
    if rule == "verify" and (reason := objection_to(own, "verify")):
        return f"the target's own {reason.removesuffix(' and would be lost')}"
    return None if rule in ("ignore", "verify") else ""


def objection_to(value: Any, policy: str) -> str | None:
    """Return why the value of an entry may not be left out under this policy, or None."""
    if policy == "ignore":
        return None
    if not hasattr(value, "shape"):
        return f"is {kind_of(value)}, not a tensor"
    try:
        return objection(policy, host_values(value))
    except Untransferable as error:
        return str(error)


def objection(policy: str, array: np.ndarray | None) -> str | None:
    """Return why the entry may not be dropped under this policy, or None.

    Args:
        policy: `ignore`, `verify` or `zero:I/N`; see `compare.conversion.mapping.Left`.
        array: the values of the entry; None if it has none, as in an abstract template.
    """
    if policy == "ignore" or array is None:
        return None
    if policy.startswith("zero:"):
        index, count = map(int, policy.removeprefix("zero:").split("/"))
        if not array.ndim or len(array) % count:
            return f"has shape {array.shape}, which cannot be split into {count} parts"
        size = array.shape[0] // count
        return (
            None
            if not array[index * size : (index + 1) * size].any()
            else f"part {index} of {count} is not zero, and Flax adds nothing there"
        )
    reason = _mask_objection(array)
    return None if reason and (_is_zeros(array) or table_of(array)) else reason


def _is_zeros(array: np.ndarray) -> bool:
    """Return whether the array holds integers that are all 0, as token types do."""
    return array.dtype.kind in "iu" and not array.any()


def _mask_objection(array: np.ndarray) -> str | None:
    """Return why the array is neither the causal mask, in either polarity, nor a fill value."""
    if array.size == 1 and array.ndim == 0:
        value = float(array.astype(np.float64))
        return (
            None
            if array.dtype.kind not in "biu"
            and any(value == float(np.array(fill).astype(array.dtype)) for fill in _FILL_VALUES)
            else f"is {value:g}, which is not a fill value of causal masks"
        )
    square = (
        array.reshape(array.shape[-2:])
        if array.ndim >= 2 and array.size == np.prod(array.shape[-2:])
        else None
    )
    if square is None or len(set(square.shape)) != 1:
        return (
            f"has shape {array.shape}; a causal mask is square, and no known table has its values"
        )
    blocked = np.triu(np.ones(square.shape, dtype=bool), 1)
    nonzero = square.astype(bool)
    different = min(int((nonzero != blocked).sum()), int((nonzero == blocked).sum()))
    values = np.unique(square[nonzero].astype(np.complex128))
    is_constant = len(values) < 2 and not np.isnan(values).any()
    is_constant = is_constant and (square.size > 1 or set(values.tolist()) <= {1})
    has_zeros = array.dtype.kind not in "fcV" or not np.signbit(square.real[~nonzero]).any()
    if not different and not (is_constant and has_zeros and array.dtype.kind != "c"):
        return "has the pattern of a causal mask, but not one constant beside 0"
    if not different:
        return None
    return (
        f"was edited: {different} of its {square.size} entries differ from the causal mask "
        "and would be lost"
    )


def refill_of(array: np.ndarray | None) -> Refill | None:
    """Return how to make the mask or table again, bit for bit, or None if it is another array."""
    if array is None or array.dtype.kind == "c" or not array.size:
        return None
    if _mask_objection(array) and not _is_zeros(array):
        return _refill_of_table(array)
    nonzero = array[array.astype(bool)]
    convert = int if array.dtype.kind in "iub" else float
    value = repr(convert(nonzero.flat[0])) if nonzero.size else "0"
    for pattern in ("full",) if array.ndim < 2 or not nonzero.size else ("tril", "triu"):
        refill = Refill(array.shape, array.dtype.name, pattern, value)
        if refilled(refill).tobytes() == np.ascontiguousarray(array).tobytes():
            return refill
    return None


def _refill_of_table(array: np.ndarray) -> Refill | None:
    """Return how to make the table again, or None if that gives other bits."""
    found = table_of(array)
    if found is None:
        return None
    refill = Refill(array.shape, array.dtype.name, found.pattern, found.value)
    is_same = refilled(refill).tobytes() == np.ascontiguousarray(array).tobytes()
    return refill if is_same else None


def refilled(refill: Refill) -> np.ndarray:
    """Return the array that the refill describes."""
    dtype = numpy_dtype(refill.dtype)
    if refill.pattern in PATTERNS:
        return computed(refill.pattern, refill.shape, refill.value).astype(dtype)
    number = int(refill.value) if dtype.kind in "iub" else float(refill.value)
    if refill.pattern == "full":
        return np.full(refill.shape, np.array(number).astype(dtype))
    rows, columns = (np.arange(size) for size in refill.shape[-2:])
    is_lower = rows[:, None] >= columns
    is_filled = is_lower if refill.pattern == "tril" else np.logical_not(is_lower)
    fill, empty = np.array(number).astype(dtype), np.zeros((), dtype)
    return np.broadcast_to(np.where(is_filled, fill, empty), refill.shape).copy()


def host_values(value: Any) -> np.ndarray | None:
    """Return the values of a leaf or tensor, or None if it is abstract.

    Raises:
        Untransferable: it has no plain values, as typed random keys.
    """
    if isinstance(value, Tensor):
        return None if value.is_meta else tensor_to_numpy(value)
    if isinstance(value, jax.Array):
        return to_host(value)
    return np.asarray(value) if hasattr(value, "__array__") else None
