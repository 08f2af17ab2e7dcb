"""Arrays in nested structures, by names: what a module takes and returns."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..conversion.mapping import dotted
from ..conversion.trees import leaves_of, with_leaves
from ..dtypes import is_extended
from ..frameworks import jax, torch
from .errors import PortError

Arrays = dict[str, Any]


def is_array(value: Any) -> bool:
    """Return whether the value is a tensor or an array of any framework."""
    return isinstance(value, torch.Tensor | np.ndarray | np.generic | jax.Array)


def named_arrays(tree: Any) -> Arrays:
    """Return the arrays and numbers in dicts, dataclasses, tuples and lists, by dotted names.

    None and text are left out. The array of a tree that is one array has the name "".
    """
    return {
        dotted(path): leaf
        for path, leaf in leaves_of(tree).items()
        if is_array(leaf) or isinstance(leaf, bool | int | float | complex)
    }


def arrays_of_output(raw: Any, framework: str, what: str) -> Arrays:
    """Return the arrays of what a module returns, by name.

    Raises:
        PortError: there is none.
    """
    found = named_arrays(raw)
    if len(found) == 1:  # whatever it lies in
        return {"": next(iter(found.values()))}
    if not found:
        raise PortError(
            f"the {framework} module returns {type(raw).__name__}, in which there is no {what}: "
            f"pass outputs=, a function that takes the {what}s out of it"
        )
    return found


def replaced(tree: Any, function: Callable[[str, Any], Any]) -> Any:
    """Return the tree with each array replaced by `function(its name, the array)`."""
    leaves = leaves_of(tree)
    made = {
        path: function(dotted(path), leaf) if is_array(leaf) else leaf
        for path, leaf in leaves.items()
    }
    return with_leaves(tree, made)


def is_float(array: Any) -> bool:
    """Return whether the entries of a NumPy array are floating, bfloat16 and the like included."""
    return array.dtype.kind == "f" or is_extended(array.dtype.name)
