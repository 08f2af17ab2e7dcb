"""Convert torch tensors to Flax arrays and back, row by row of the mapping."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..files.printable import kind_of
from ..frameworks import HAS_TORCH, Tensor, jax, torch
from .errors import Mismatch, MismatchEntry, Shape, dropping
from .layouts import Layout, is_one_of, layout, to_flax
from .layouts import to_torch as torch_layout
from .mapping import KeyPath, Left, Row, StateMapping, slashed
from .tensors import (
    NESTED,
    UNINITIALIZED,
    Untransferable,
    dense,
    is_nested,
    is_uninitialized,
    shape_of,
    tensor_to_numpy,
    to_host,
    to_jax,
    to_torch,
)
from .unmatched import objection_to, refilled

_COPIED = ("conv_transpose", "flatten")  # layouts that no view can show


def flax_from_torch(
    tensors: Mapping[str, Any], wanted: Mapping[KeyPath, Any], mapping: StateMapping, copy: bool
) -> tuple[dict[KeyPath, jax.Array], Mismatch]:
    """Convert each wanted entry whose tensor exists and has the right shape; list the others."""
    arrays: dict[KeyPath, jax.Array] = {}
    missing, misshaped = [], []
    refused = _refused_left_entries(mapping, tensors, wanted)
    left_paths = {item.path for item in mapping.left if item.path is not None}
    used_keys = mapping.left_keys()
    for path, row, leaf in _in_order(wanted, mapping.by_path):
        flax_name = slashed(path)
        keys = row.keys if row else ()
        used_keys.update(key for key in keys if key in tensors)
        absent = [key for key in keys if key not in tensors]
        if row is None or absent:
            missing += [
                _missing(key, row, flax_name, leaf)
                for key in absent or [flax_name]
                if path not in left_paths
            ]
            continue
        unfitting = [entry for key in keys if (entry := unfit(row, key, tensors[key], leaf.shape))]
        refused += [entry for entry in unfitting if entry.reason]
        misshaped += [entry for entry in unfitting if not entry.reason]
        if unfitting:
            continue
        try:
            parts = [dense(tensors[key], copy=copy) for key in keys]
            values = flax_values(row, leaf.shape, parts, copy)
            arrays[path] = place_like(to_jax(values, copy=_shareable(row, copy)), leaf, copy)
        except Untransferable as error:
            refused.append(
                MismatchEntry(
                    row.torch_key,
                    flax_name,
                    tuple(tensors[row.torch_key].shape),
                    reason=str(error),
                )
            )
    for row in mapping.rows:
        if row.kind == "alias" and row.path in wanted and row.torch_key in tensors:
            used_keys.add(row.torch_key)
            refused += untied(row, tensors[row.torch_key], mapping, tensors)
    unexpected = [
        MismatchEntry(str(key), "", found=shape_of(value))
        for key, value in tensors.items()
        if key not in used_keys
    ]
    return arrays, Mismatch(tuple(missing), tuple(unexpected), tuple(misshaped), tuple(refused))


def torch_from_flax(
    leaves: Mapping[KeyPath, Any], mapping: StateMapping, copy: bool
) -> tuple[dict[str, Tensor], Mismatch]:
    """Convert each leaf that has a row; list the other leaves, and required rows without a leaf."""
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    twins: list[tuple[Row, Tensor]] = []
    unexpected = []
    left_paths = {item.path for item in mapping.left if item.path is not None}
    refused = _refused_left_entries(mapping, {}, leaves)
    for path, row, leaf in _in_order(leaves, mapping.by_path):
        flax_name = slashed(path)
        if row is None:
            unexpected += (
                [MismatchEntry(flax_name, flax_name, found=tuple(getattr(leaf, "shape", ())))]
                if path not in left_paths
                else []
            )
        elif not isinstance(leaf, jax.Array | np.ndarray):
            refused.append(
                MismatchEntry(
                    row.torch_key,
                    flax_name,
                    reason=f"is {kind_of(leaf)}, not an array of values",
                )
            )
        else:
            try:
                if row.shape is not None and row.shape != leaf.shape:
                    raise ValueError(f"the mapping is for {row.shape}; this is {leaf.shape}")
                _shareable(row, copy)
                chosen = layout(row.layout, row.slice_shape(leaf.shape))
                made = _tensors(row, chosen, leaf, copy)
            except ValueError as error:
                refused.append(
                    MismatchEntry(
                        row.torch_key, flax_name, leaf.shape, reason=f"{flax_name}: {error}"
                    )
                )
                continue
            for key, values in made.items():
                if row.twin:
                    twins.append((row, values))
                elif row.part:
                    parts.setdefault(key, {})[row.part.index] = values
                    state.setdefault(key, values)  # keeps the mapping's order; joined below
                else:
                    state[key] = values
    for key, tensors in parts.items():
        first = next(row for row in mapping.by_key[key] if row.part)
        joined = [tensors[i] for i in sorted(tensors)]
        unjoined = differing_dtypes(key, first.place, [str(tensor.dtype) for tensor in joined])
        if not copy:
            reason = "several arrays make one tensor, so memory cannot be shared; use copy=True"
            unjoined.append(MismatchEntry(key, first.place, reason=reason))
        refused += unjoined
        assert first.part is not None
        if len(joined) < first.part.count or unjoined:
            del state[key]
            continue
        try:
            state[key] = first.part.join(joined)
        except ValueError as error:
            del state[key]
            refused.append(MismatchEntry(key, first.place, reason=f"{first.place}: {error}"))
    refused += [
        unequal_twin(row)
        for row, values in twins
        if row.torch_key in state and not same_bits(values, row.part_of(state[row.torch_key]))
    ]
    for row in mapping.rows:
        if row.kind == "alias" and mapping.by_path[row.path].torch_key in state:
            state[row.torch_key] = state[mapping.by_path[row.path].torch_key]
    state |= {key: to_torch(refilled(refill), copy=True) for key, refill in mapping.refills.items()}
    missing = [
        MismatchEntry(row.torch_key, row.place)
        for path, row in mapping.by_path.items()
        if row.required and path not in leaves
    ]
    return state, Mismatch(tuple(missing), tuple(unexpected), refused=tuple(refused))


def _tensors(row: Row, chosen: Layout, leaf: Any, copy: bool) -> dict[str, Tensor]:
    """Return the torch tensors of a row, or its part of them."""
    if row.stack:
        host = to_host(leaf)
        slices = [_to_tensor(chosen, host[index], True) for index in range(len(host))]
        return dict(zip(row.stack, slices, strict=True))
    tensor = _to_tensor(chosen, leaf, copy)
    zeros: Any = torch.zeros_like(tensor) if HAS_TORCH else np.zeros_like(tensor)
    return {row.torch_key: tensor} | ({row.plus: zeros} if row.plus else {})


def torch_tensors(row: Row, leaf: Any) -> dict[str, Tensor]:
    """Return copies of the torch tensors that a row makes of a Flax array, or its part of them.

    Raises:
        ValueError: the array does not fit the row's layout.
    """
    return _tensors(row, layout(row.layout, row.slice_shape(leaf.shape)), leaf, True)


def unfit(row: Row, key: str, tensor: Any, flax_shape: Sequence[int]) -> MismatchEntry | None:
    """Return why the torch tensor cannot become the row's Flax array of that shape, or None."""
    if is_uninitialized(tensor):
        return MismatchEntry(key, row.place, reason=UNINITIALIZED)
    if is_nested(tensor):
        return MismatchEntry(key, row.place, reason=NESTED)
    if not hasattr(tensor, "shape"):
        return MismatchEntry(key, row.place, reason=f"is {kind_of(tensor)}, not a tensor")
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
    shape = tuple(tensor.shape)
    if shape == expected:
        return None
    return MismatchEntry(key, row.place, shape, expected, mend=_other_axis(row, flax_shape, shape))


def _other_axis(row: Row, flax_shape: Sequence[int], shape: Shape) -> str:
    """Return the argument with which the part fits, if it lies along the other axis."""
    if row.part is None:
        return ""
    axis = 0 if row.part.axis else -1
    other = replace(row, part=replace(row.part, axis=axis))
    try:
        fits = torch_shape(other, flax_shape) == shape
    except ValueError:
        return ""
    return f"its parts fit along another axis: compare.Split([…], axis={axis})" if fits else ""


def differing_dtypes(key: str, place: str, dtypes: Sequence[str]) -> list[MismatchEntry]:
    """Return an entry if the parts of one tensor have different dtypes."""
    names = list(dict.fromkeys(dtypes))
    if len(names) < 2:
        return []
    reason = f"its parts have different dtypes: {' and '.join(names)}"
    return [MismatchEntry(key, place, reason=reason, mend="cast them to one of these first")]


def torch_shape(row: Row, flax_shape: Sequence[int]) -> Shape:
    """Return the shape of the whole torch tensor; the row may be only a part of it.

    Raises:
        ValueError: a Flax array of that layout cannot have this shape.
    """
    shape = layout(row.layout, row.slice_shape(flax_shape)).torch_shape
    return shape if row.part is None else row.part.shape_of_whole(shape)


def flax_values(row: Row, flax_shape: Sequence[int], tensors: Sequence[Any], copy: bool) -> Any:
    """Return the values of the Flax array from those of its torch tensors (or arrays)."""
    chosen = layout(row.layout, row.slice_shape(flax_shape))
    if not row.stack:
        return to_flax(chosen, combined(row, tensors, copy))
    dtypes = [str(tensor.dtype) for tensor in tensors]
    if different := differing_dtypes(row.torch_key, row.place, dtypes):
        raise Untransferable(different[0].reason)
    slices = [to_flax(chosen, row.part_of(each)) for each in tensors]
    return torch.stack(slices) if isinstance(slices[0], Tensor) else np.stack(slices)


def combined(row: Row, tensors: Sequence[Any], copy: bool) -> Any:
    """Return the row's part of the tensor (or array), or of the sum of the two tensors."""
    if row.part is not None:
        if row.part.groups > 1 and not copy:
            raise Untransferable(
                "its groups lie apart in the torch tensor, so memory cannot be shared; use "
                "copy=True"
            )
        tensors = [row.part.of(tensor) for tensor in tensors]
    if len(tensors) == 1:
        return tensors[0]
    if not copy:
        raise Untransferable(
            f"the sum with {row.plus} is a new tensor, so memory cannot be shared; use copy=True"
        )
    if tensors[0].dtype != tensors[1].dtype:
        raise Untransferable(
            f"is {tensors[0].dtype}, but {row.plus}, which is added to it, is {tensors[1].dtype}"
        )
    try:
        return tensors[0] + tensors[1]
    except NotImplementedError as error:  # float8
        raise Untransferable(f"{tensors[0].dtype} has no sum with {row.plus}") from error


def untied(
    row: Row, value: Any, mapping: StateMapping, tensors: Mapping[str, Any]
) -> list[MismatchEntry]:
    """Return an entry if the alias and the tensor that it is tied to have different values."""
    first_key = mapping.by_path[row.path].torch_key
    if first_key in tensors and not same_bits(value, tensors[first_key]):
        return [
            MismatchEntry(
                row.torch_key,
                row.place,
                reason=f"is tied to {first_key} in Flax, and has other values here",
            )
        ]
    return []


def unequal_twin(row: Row) -> MismatchEntry:
    """Return the entry of a Flax array that differs from the one it is a copy of."""
    reason = f"is one tensor in torch, and {row.place} has other values here"
    mend = "give both the same values, or keep both in torch"
    return MismatchEntry(row.torch_key, row.place, reason=reason, mend=mend)


def same_bits(tensor: Any, other: Any) -> bool:
    """Return whether two tensors have the same dtype, shape and bits."""
    if tensor is other:
        return True
    kind = Tensor if HAS_TORCH else np.ndarray
    if not (isinstance(tensor, kind) and isinstance(other, kind)):
        return False
    tensor, other = dense(tensor), dense(other)
    same = tensor.dtype == other.dtype and tensor.shape == other.shape
    return same and tensor_to_numpy(tensor).tobytes() == tensor_to_numpy(other).tobytes()


def _refused_left_entries(
    mapping: StateMapping, tensors: Mapping[str, Any], leaves: Mapping[KeyPath, Any]
) -> list[MismatchEntry]:
    """List the entries without a counterpart that their policy does not allow."""
    refused = []
    for item in mapping.left:
        value = _left_value(item, tensors, leaves)
        if value is not None and (reason := objection_to(value, item.policy)):
            mend = dropping(item.torch_key, item.policy)
            refused.append(
                MismatchEntry(item.torch_key, "", shape_of(value), reason=reason, mend=mend)
            )
    return refused


def _left_value(item: Left, tensors: Mapping[str, Any], leaves: Mapping[KeyPath, Any]) -> Any:
    return tensors.get(item.torch_key) if item.path is None else leaves.get(item.path)


def _missing(key: str, row: Row | None, flax_name: str, leaf: Any) -> MismatchEntry:
    try:
        return MismatchEntry(
            key, flax_name, expected=torch_shape(row, leaf.shape) if row else tuple(leaf.shape)
        )
    except ValueError:
        return MismatchEntry(key, flax_name, expected=tuple(leaf.shape))


def _in_order(
    leaves: Mapping[KeyPath, Any], rows: Mapping[KeyPath, Row]
) -> Iterable[tuple[KeyPath, Row | None, Any]]:
    """Yield the leaves in the mapping's order, those without a row last."""
    yield from ((path, row, leaves[path]) for path, row in rows.items() if path in leaves)
    yield from ((path, None, leaf) for path, leaf in leaves.items() if path not in rows)


def _shareable(row: Row, copy: bool) -> bool:
    if not copy and row.stack:
        raise Untransferable(
            "several tensors make one array, so memory cannot be shared; use copy=True"
        )
    if not copy and is_one_of(row.layout, _COPIED):
        raise Untransferable(
            "this layout makes a new tensor, so memory cannot be shared; use copy=True"
        )
    return copy


def _to_tensor(chosen: Layout, leaf: jax.Array | np.ndarray, copy: bool) -> Tensor:
    if not copy:
        return torch_layout(chosen, to_torch(leaf, copy=False))
    return to_torch(torch_layout(chosen, to_host(leaf)), copy=True)


def place_like(array: jax.Array, leaf: Any, copy: bool) -> jax.Array:
    """Return the array on the leaf's devices, if the leaf is committed or has a sharding."""
    has_placement = (
        leaf.committed
        if isinstance(leaf, jax.Array)
        else getattr(leaf, "sharding", None) is not None
    )
    if not has_placement:
        return array
    if not copy and not array.sharding.is_equivalent_to(leaf.sharding, array.ndim):
        raise Untransferable(
            f"the template is on {leaf.sharding}, the tensor on {array.device}; use copy=True"
        )
    return jax.device_put(array, leaf.sharding)
