"""Arrays in nested structures, by names: what a module takes and returns."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import jax
import numpy as np
import torch

Arrays = dict[str, Any]


def is_array(value: Any) -> bool:
    """Return whether the value is a tensor or an array of any framework."""
    return isinstance(value, torch.Tensor | np.ndarray | np.generic | jax.Array)


def named_arrays(tree: Any) -> Arrays:
    """Return the arrays and numbers in dicts, dataclasses, tuples and lists, by dotted names.

    None and text are left out. The array of a tree that is one array has the name "".
    """
    return dict(_walk(tree, ""))


def _walk(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    if is_array(tree) or isinstance(tree, bool | int | float | complex):
        yield name, tree
        return
    children = _children(tree)
    for step, child in children.items():
        yield from _walk(child, f"{name}.{step}" if name else step)


def _children(tree: Any) -> dict[str, Any]:
    if isinstance(tree, Mapping):
        return {str(key): child for key, child in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return dict(zip(tree._fields, tree, strict=True))
    if isinstance(tree, tuple | list):
        return {str(index): child for index, child in enumerate(tree)}
    if is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: getattr(tree, field.name) for field in fields(tree)}
    return {}


def mapped(function: Callable[[str, Any], Any], tree: Any, name: str = "") -> Any:
    """Return the tree with each array replaced by `function(its name, the array)`."""
    if is_array(tree):
        return function(name, tree)

    def below(step: str, child: Any) -> Any:
        return mapped(function, child, f"{name}.{step}" if name else step)

    if isinstance(tree, Mapping):
        return {key: below(str(key), child) for key, child in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(below(key, child) for key, child in _children(tree).items()))
    if isinstance(tree, tuple | list):
        return type(tree)(below(str(index), child) for index, child in enumerate(tree))
    return tree


def is_float(array: Any) -> bool:
    """Return whether the entries of a NumPy array are floating, bfloat16 and the like included."""
    return bool(jax.numpy.issubdtype(array.dtype, jax.numpy.floating))
