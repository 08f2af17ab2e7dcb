"""What may be asked of an entry that the other side has no place for, before it is dropped or kept."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import Tensor

from .mapping import Policy
from .tensors import tensor_to_numpy

# What a legacy `masked_bias` held: the number that blocked scores were set to.
_FILLS = (
    -1e4,
    -1e9,
    -1e10,
    float(np.finfo(np.float32).min),
    float(np.finfo(np.float16).min),
    -np.inf,
)


def decided(name: str, policy: Mapping[str, Policy]) -> Policy | None:
    """Return what the first pattern that fits the name decides, or None."""
    return next((found for pattern, found in policy.items() if fnmatchcase(name, pattern)), None)


def may_lack(name: str, own: Any, policy: Mapping[str, Policy]) -> bool:
    """Tell whether the other side may lack the entry, whose own value is then kept."""
    found = decided(name, policy)
    return found == "ignore" or (found == "verify" and not objection("verify", host_values(own)))


def objection(policy: str, array: np.ndarray | None) -> str | None:
    """Say why the entry may not be dropped under that policy, or nothing.

    Args:
        policy: `ignore`, `verify` or `zero:I/N`, see `compare.conversion.mapping.Left`.
        array: its values; None if there are none, as in an abstract template.
    """
    if policy == "ignore" or array is None:
        return None
    if policy.startswith("zero:"):
        index, count = map(int, policy.removeprefix("zero:").split("/"))
        if not array.ndim or len(array) % count:
            return f"has shape {array.shape}, which has no {count} parts"
        size = array.shape[0] // count
        return (
            None
            if not array[index * size : (index + 1) * size].astype(np.float64).any()
            else (f"part {index} of {count} is not zero, and Flax adds nothing there")
        )
    return _not_recomputed(array)


def _not_recomputed(array: np.ndarray) -> str | None:
    """Compare with the causal mask, in either polarity, or with the number that blocked."""
    if array.size == 1 and array.ndim == 0:
        value = float(array.astype(np.float64))
        return (
            None
            if any(value == fill for fill in _FILLS)
            else f"is {value:g}, which no causal mask is filled with"
        )
    square = (
        array.reshape(array.shape[-2:])
        if array.ndim >= 2 and array.size == np.prod(array.shape[-2:])
        else None
    )
    if square is None or len(set(square.shape)) != 1:
        return f"has shape {array.shape}; a causal mask is square"
    blocked = np.triu(np.ones(square.shape, dtype=bool), 1)
    nonzero = square.astype(bool)
    different = min(int((nonzero != blocked).sum()), int((nonzero == blocked).sum()))
    if not different:
        return None
    return f"was edited: {different} of its {square.size} entries are not the causal mask's, and would be lost"


def host_values(value: Any) -> np.ndarray | None:
    """Return the values of a leaf or tensor, or None where it is abstract."""
    if isinstance(value, Tensor):
        return None if value.is_meta else tensor_to_numpy(value)
    return np.asarray(value) if hasattr(value, "__array__") else None
