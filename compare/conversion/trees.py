"""Trees of arrays as JAX programs have them: the leaves by path, and the tree with new leaves.

`flax.traverse_util` knows dicts alone, and `jax.tree_util` sorts their names.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ..frameworks import jax, meta, torch
from ..frameworks import linen as nn
from .mapping import KeyPath

_ABSENT = object()
_MAX_DEPTH = 500


def leaves_of(tree: Any) -> dict[KeyPath, Any]:
    """Return the leaves by path, in the tree's own order.

    Names, positions in a list and fields of a dataclass or named tuple are steps of a path. A
    `None` is no leaf. Boxes, as `nn.with_partitioning` makes them, are opened.

    Raises:
        RecursionError: the tree is nested too deeply, or contains itself.
    """
    leaves: dict[KeyPath, Any] = {}
    opened: list[tuple[KeyPath, Any]] = [((), tree)]
    while opened:
        path, node = opened.pop()
        if len(path) > _MAX_DEPTH:
            raise RecursionError("it is nested too deeply, or contains itself")
        children = _children(node)
        if children is None:
            leaves[path] = _unboxed(node)
        else:
            opened += [((*path, name), child) for name, child in reversed([*children])]
    return leaves


def with_leaves(tree: Any, leaves: Mapping[KeyPath, Any]) -> Any:
    """Return a tree like the given one, with these leaves in the same boxes.

    Mappings become dicts. What has no leaf is left out.
    """
    made = _made(tree, leaves, ())
    return {} if made is _ABSENT else made


def is_nested(tree: Mapping[Any, Any]) -> bool:
    """Return whether a value of the mapping is a node, and no leaf."""
    return any(node is not None and _children(node) is not None for node in tree.values())


def _children(node: Any) -> Iterator[tuple[Any, Any]] | None:
    """Return the names and children of a node; None for a leaf."""
    if node is None:
        return iter(())
    if isinstance(node, Mapping):
        return iter(node.items())
    if isinstance(node, torch.Tensor | meta.AxisMetadata) or hasattr(node, "shape"):
        return None
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return zip(node._fields, node, strict=True)
    if isinstance(node, list | tuple):
        return enumerate(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return ((name, getattr(node, name)) for name in _dynamic_fields(node))
    return None


def _dynamic_fields(node: Any) -> list[str]:
    """Return the fields of a dataclass that are no static part of its structure in JAX."""
    leaves = jax.tree.leaves(node)
    is_registered = not any(leaf is node for leaf in leaves)
    names = []
    for field in dataclasses.fields(node):
        is_dynamic = field.metadata.get("pytree_node", True) and not field.metadata.get("static")
        value = getattr(node, field.name)
        if is_dynamic and is_registered and isinstance(value, str | int | float):
            is_dynamic = any(leaf is value for leaf in leaves)
        names += [field.name] if is_dynamic else []
    return names


def _made(node: Any, leaves: Mapping[KeyPath, Any], path: KeyPath) -> Any:
    children = _children(node)
    if children is None:
        return _boxed(node, leaves[path]) if path in leaves else _ABSENT
    if node is None:
        return None
    made = {name: _made(child, leaves, (*path, name)) for name, child in children}
    if isinstance(node, Mapping):
        kept = {name: child for name, child in made.items() if child is not _ABSENT}
        return kept if kept or not made else _ABSENT
    if any(child is _ABSENT for child in made.values()):  # arrays have no one truth
        return _ABSENT
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return dataclasses.replace(node, **made)
    return type(node)(**made) if hasattr(node, "_fields") else type(node)(made.values())


def _unboxed(leaf: Any) -> Any:
    if not isinstance(leaf, meta.AxisMetadata):
        return leaf
    # The sharding of a box applies to arrays; a template may have only shapes.
    inner = leaf.unbox(apply_constraint=False) if isinstance(leaf, nn.Partitioned) else leaf.unbox()
    return _unboxed(inner)


def _boxed(like: Any, leaf: Any) -> Any:
    return like.replace_boxed(leaf) if isinstance(like, meta.AxisMetadata) else leaf
