"""Compare the arrays of two results, by name, and say by which limit."""

from collections.abc import Iterator

import numpy as np

from ..proof.agreement import Finding, agreement, uncompared
from ..proof.cases import Framework
from .errors import PortError
from .perturbed import FACTOR, SAMPLES
from .result import NamedArrays
from .trees import is_float

FLOAT64 = (
    f"{FACTOR:g} times the farthest that torch's own values moved in {SAMPLES} runs in which each "
    "result moved by one unit in the last place (compare/ports/perturbed.py), for gradients that "
    "hold in the first of them alone; at least of the largest entry"
)
WORKING = (
    "the float64 limit times the roundoff of the dtype over that of float64, or four times torch's "
    "own error in that dtype, whichever is larger"
)
EQUAL = "exact equality"


def compared(
    api: Framework,
    what: str,
    case: str,
    found: NamedArrays,
    expected: NamedArrays,
    limits: NamedArrays,
    why: str,
) -> Iterator[Finding]:
    """Yield a finding for each array: entry by entry, with names and shapes."""
    if what.startswith("outputs") and found.keys() != expected.keys():
        raise PortError(
            f"torch returns {_listed(expected)}, and Flax {_listed(found)}: pass outputs=, a "
            "function from what Flax returns to what torch returns"
        )
    for name, array in expected.items():
        title = f"{case}{f', {name}' if name else ''}"
        if name not in found:
            if what in ("outputs", "gradients"):
                yield uncompared(what, api, title, "Flax has none")
            continue
        other = found[name]
        if other.shape != array.shape:
            reason = f"the shape is {other.shape} in Flax and {array.shape} in torch"
            yield uncompared(what, api, title, reason)
        elif what.startswith("outputs") and _kind(other) != _kind(array):
            reason = f"the dtype is {other.dtype} in Flax and {array.dtype} in torch"
            yield uncompared(what, api, title, reason)
        elif array.size:
            limit = limits.get(name) if is_float(array) else None
            agreed = agreement(other, array, 0.0 if limit is None else float(limit))
            yield Finding(what, api, title, agreed, EQUAL if limit is None else why)


def _listed(arrays: NamedArrays) -> str:
    names = ", ".join(name or "one array" for name in arrays)
    return f"{len(arrays)} arrays ({names})" if len(arrays) > 1 else "one array"


def _kind(array: np.ndarray) -> str:
    """Return whether entries are floating, whole numbers or truth values."""
    return "float" if is_float(array) else "bool" if array.dtype == bool else "whole"


def shows(array: np.ndarray) -> bool:
    """Return whether an array has an entry that can differ from another number."""
    return bool(array.size) and (not is_float(array) or bool(np.isfinite(array).any()))


def largest(array: np.ndarray) -> float:
    """Return the size of the largest finite entry."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
