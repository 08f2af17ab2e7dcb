"""Walk the table: torch tensors to Flax arrays and back, everything accounted for."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from .errors import Mismatch, MismatchEntry, Shape
from .layouts import Layout, layout, to_flax
from .layouts import to_torch as laid_for_torch
from .mapping import KeyPath, Left, Row, StateMapping, slashed
from .tensors import Untransferable, dense, tensor_to_numpy, to_host, to_jax, to_torch
from .unmatched import host_values, objection


def flax_from_torch(
    tensors: Mapping[str, Any], wanted: Mapping[KeyPath, Any], mapping: StateMapping, copy: bool
) -> tuple[dict[KeyPath, jax.Array], Mismatch]:
    """Convert each wanted entry that the tensors have in the right shape; list the others."""
    arrays: dict[KeyPath, jax.Array] = {}
    missing, misshaped = [], []
    refused = _left(mapping, tensors, wanted)
    kept = {item.path for item in mapping.left if item.path is not None}
    taken = mapping.left_keys()
    for path, row, leaf in _in_order(wanted, mapping.by_path):
        place = slashed(path)
        keys = [row.torch_key, *filter(None, [row.plus])] if row else []
        taken.update(key for key in keys if key in tensors)
        absent = [key for key in keys if key not in tensors]
        if row is None or absent:
            missing += [
                _missing(key, row, place, leaf) for key in absent or [place] if path not in kept
            ]
            continue
        wrong = [entry for key in keys if (entry := unfit(row, key, tensors[key], leaf.shape))]
        refused += [entry for entry in wrong if entry.reason]
        misshaped += [entry for entry in wrong if not entry.reason]
        if wrong:
            continue
        try:
            found = to_flax(
                layout(row.layout, leaf.shape),
                combined(row, [dense(tensors[key]) for key in keys], copy),
            )
            arrays[path] = place_like(to_jax(found, copy=_shareable(row, copy)), leaf, copy)
        except Untransferable as error:
            refused.append(
                MismatchEntry(
                    row.torch_key, place, tuple(tensors[row.torch_key].shape), reason=str(error)
                )
            )
    for row in mapping.rows:
        if row.kind == "alias" and row.path in wanted and row.torch_key in tensors:
            taken.add(row.torch_key)
            refused += untied(row, tensors[row.torch_key], mapping, tensors)
    unexpected = [
        MismatchEntry(str(key), "", found=tuple(getattr(value, "shape", ())))
        for key, value in tensors.items()
        if key not in taken
    ]
    return arrays, Mismatch(tuple(missing), tuple(unexpected), tuple(misshaped), tuple(refused))


def torch_from_flax(
    leaves: Mapping[KeyPath, Any], mapping: StateMapping, copy: bool
) -> tuple[dict[str, Tensor], Mismatch]:
    """Convert each leaf that has a row; list the others, and the required rows that lack a leaf."""
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    unexpected = []
    kept = {item.path: item for item in mapping.left if item.path is not None}
    refused = _left(mapping, {}, leaves)
    for path, row, leaf in _in_order(leaves, mapping.by_path):
        place = slashed(path)
        if row is None:
            unexpected += (
                [MismatchEntry(place, place, found=tuple(getattr(leaf, "shape", ())))]
                if path not in kept
                else []
            )
        elif not isinstance(leaf, jax.Array | np.ndarray):
            refused.append(
                MismatchEntry(
                    row.torch_key,
                    place,
                    reason=f"is a {type(leaf).__name__}, not an array of values",
                )
            )
        else:
            try:
                if row.shape is not None and row.shape != leaf.shape:
                    raise ValueError(f"the mapping is for {row.shape}; this is {leaf.shape}")
                tensor = _to_tensor(layout(row.layout, leaf.shape), leaf, copy)
            except ValueError as error:
                refused.append(
                    MismatchEntry(row.torch_key, place, leaf.shape, reason=f"{place}: {error}")
                )
                continue
            for key, values in (
                (row.torch_key, tensor),
                (row.plus, torch.zeros_like(tensor) if row.plus else tensor),
            ):
                if key is not None and row.part:
                    parts.setdefault(key, {})[row.part[0]] = values
                    state.setdefault(key, values)  # keeps the order of the table; joined below
                elif key is not None:
                    state[key] = values
    state |= {key: torch.cat([found[i] for i in sorted(found)]) for key, found in parts.items()}
    for row in mapping.rows:
        if row.kind == "alias" and mapping.by_path[row.path].torch_key in state:
            state[row.torch_key] = state[mapping.by_path[row.path].torch_key]
    missing = [
        MismatchEntry(row.torch_key, row.place)
        for path, row in mapping.by_path.items()
        if row.required and path not in leaves
    ]
    return state, Mismatch(tuple(missing), tuple(unexpected), refused=tuple(refused))


def unfit(row: Row, key: str, tensor: Any, flax_shape: Sequence[int]) -> MismatchEntry | None:
    """Say what is wrong with a torch tensor that is to become the row's Flax array of that shape."""
    if not hasattr(tensor, "shape"):
        return MismatchEntry(key, row.place, reason=f"is a {type(tensor).__name__}, not a tensor")
    if row.shape is not None and row.shape != tuple(flax_shape):
        return MismatchEntry(
            key,
            row.place,
            reason=f"the mapping is for {row.shape} in Flax; this is {tuple(flax_shape)}",
        )
    try:
        expected = torch_shape(row, flax_shape)
    except ValueError as error:
        return MismatchEntry(key, row.place, reason=str(error))
    found = tuple(tensor.shape)
    return None if found == expected else MismatchEntry(key, row.place, found, expected)


def torch_shape(row: Row, flax_shape: Sequence[int]) -> Shape:
    """Return the shape of the whole torch tensor, of which the row may be a part.

    Raises:
        ValueError: no Flax array of that layout has this shape.
    """
    shape = layout(row.layout, flax_shape).torch_shape
    return shape if row.part is None else (shape[0] * row.part[1], *shape[1:])


def combined(row: Row, tensors: Sequence[Any], copy: bool) -> Any:
    """Return the row's part of the tensor or array, or of the sum of the two."""
    if row.part is not None:
        index, count = row.part
        size = tensors[0].shape[0] // count
        tensors = [tensor[index * size : (index + 1) * size] for tensor in tensors]
    if len(tensors) == 1:
        return tensors[0]
    if not copy:
        raise Untransferable(
            f"the sum with {row.plus} has memory of its own and cannot be shared; use copy=True"
        )
    if tensors[0].dtype != tensors[1].dtype:
        raise Untransferable(
            f"is {tensors[0].dtype}, and {row.plus}, which is added, is {tensors[1].dtype}"
        )
    return tensors[0] + tensors[1]


def untied(
    row: Row, value: Any, mapping: StateMapping, tensors: Mapping[str, Any]
) -> list[MismatchEntry]:
    """List the alias whose values are not those of the entry it is tied to."""
    home = mapping.by_path[row.path].torch_key
    if home in tensors and not same_bits(value, tensors[home]):
        return [
            MismatchEntry(
                row.torch_key,
                row.place,
                reason=f"is tied to {home} in Flax, and has other values here",
            )
        ]
    return []


def same_bits(tensor: Any, first: Any) -> bool:
    """Tell whether two tensors are the same in dtype, shape and every bit."""
    if tensor is first:
        return True
    if not (isinstance(tensor, Tensor) and isinstance(first, Tensor)):
        return False
    mine, its = dense(tensor), dense(first)
    same = mine.dtype == its.dtype and mine.shape == its.shape
    return same and tensor_to_numpy(mine).tobytes() == tensor_to_numpy(its).tobytes()


def _left(
    mapping: StateMapping, tensors: Mapping[str, Any], leaves: Mapping[KeyPath, Any]
) -> list[MismatchEntry]:
    """List the entries that may not be left where they are."""
    refused = []
    for item in mapping.left:
        value = _held(item, tensors, leaves)
        if value is not None and (reason := objection(item.policy, host_values(value))):
            refused.append(MismatchEntry(item.torch_key, "", tuple(value.shape), reason=reason))
    return refused


def _held(item: Left, tensors: Mapping[str, Any], leaves: Mapping[KeyPath, Any]) -> Any:
    return tensors.get(item.torch_key) if item.path is None else leaves.get(item.path)


def _missing(key: str, row: Row | None, place: str, leaf: Any) -> MismatchEntry:
    try:
        return MismatchEntry(
            key, place, expected=torch_shape(row, leaf.shape) if row else tuple(leaf.shape)
        )
    except ValueError:
        return MismatchEntry(key, place, expected=tuple(leaf.shape))


def _in_order(
    leaves: Mapping[KeyPath, Any], rows: Mapping[KeyPath, Row]
) -> Iterable[tuple[KeyPath, Row | None, Any]]:
    """Yield the leaves in the order of the table, those without a row last."""
    yield from ((path, row, leaves[path]) for path, row in rows.items() if path in leaves)
    yield from ((path, None, leaf) for path, leaf in leaves.items() if path not in rows)


def _shareable(row: Row, copy: bool) -> bool:
    if not copy and row.layout == "conv_transpose":
        raise Untransferable(
            "a mirrored window has memory of its own and cannot be shared; use copy=True"
        )
    return copy


def _to_tensor(found: Layout, leaf: jax.Array | np.ndarray, copy: bool) -> Tensor:
    if not copy:
        return laid_for_torch(found, to_torch(leaf, copy=False))
    return to_torch(laid_for_torch(found, to_host(leaf)), copy=True)


def place_like(array: jax.Array, leaf: Any, copy: bool) -> jax.Array:
    """Return the array where the leaf was put on purpose: committed, or abstract with a sharding."""
    chosen = (
        leaf.committed
        if isinstance(leaf, jax.Array)
        else getattr(leaf, "sharding", None) is not None
    )
    if not chosen:
        return array
    if not copy and not array.sharding.is_equivalent_to(leaf.sharding, array.ndim):
        raise Untransferable(
            f"the template is on {leaf.sharding}, the tensor on {array.device}; use copy=True"
        )
    return jax.device_put(array, leaf.sharding)
