"""Tensors in another layout or dtype. Each is computed from the source on demand."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np

from ..conversion.apply_mapping import (
    differing_dtypes,
    flax_values,
    torch_shape,
    unequal_twin,
    unfit,
)
from ..conversion.errors import ConversionError, Mismatch, MismatchEntry, dropping
from ..conversion.layouts import flax_shape, is_one_of, layout, to_torch
from ..conversion.mapping import KeyPath, Left, Row, StateMapping, slashed
from ..conversion.unmatched import objection, refill_of, refilled
from ..dtypes import FLOATING, FLOATS, numpy_dtype
from ..files.printable import shown
from .errors import CheckpointError
from .manifest import is_cast
from .tensors import Spec, Tensors, whole

_COPIED = ("heads_in", "heads_out", "flatten")  # layouts that a view may not show


def relaid(path: Path, source: Tensors, mapping: StateMapping) -> Tensors:
    """Return the tensors of a torch source in Flax's layout, or those of a Flax source in torch's.

    Raises:
        CheckpointError: the source and the mapping do not have the same entries.
    """
    try:
        return _to_flax(source, mapping) if source.layout == "torch" else _to_torch(source, mapping)
    except ConversionError as error:
        reason = "does not fit the mapping; nothing was converted"
        mend = "make the mapping of this state: compare.match(module, template)"
        if error.mismatch.refused:
            mend = error.mismatch.refused[0].mend or mend
        raise CheckpointError.unfit(path, reason, error.mismatch, mend) from error


def _to_flax(source: Tensors, mapping: StateMapping) -> Tensors:
    stored = {str(key[0]): spec for key, spec in source.specs.items()}
    stored |= {str(key[0]): source.specs[first] for key, first in source.aliases.items()}
    missing, misshaped, refused = [], [], []
    specs: dict[KeyPath, Spec] = {}
    for path, row in mapping.by_path.items():
        keys = row.keys
        if absent := [key for key in keys if key not in stored]:
            missing += [MismatchEntry(key, row.place) for key in absent if row.required]
            continue
        try:
            shape = row.shape or _flax_shape(row, stored[keys[0]].shape)
        except ValueError as error:
            refused.append(
                MismatchEntry(row.torch_key, row.place, stored[keys[0]].shape, reason=str(error))
            )
            continue
        unfitting = [entry for key in keys if (entry := unfit(row, key, stored[key], shape))]
        unfitting += differing_dtypes(row.torch_key, row.place, [stored[key].dtype for key in keys])
        misshaped += [entry for entry in unfitting if not entry.reason]
        refused += [entry for entry in unfitting if entry.reason]
        specs[path] = Spec(shape, stored[keys[0]].dtype)
    refused += _objections(
        source, mapping, lambda item: (item.torch_key,) if item.path is None else None
    )
    known = mapping.by_key.keys() | mapping.left_keys()
    unexpected = [
        MismatchEntry(key, "", spec.shape) for key, spec in stored.items() if key not in known
    ]
    for row in mapping.rows:
        key, first = row.torch_key, mapping.by_path[row.path].torch_key
        tied = source.aliases.get((key,)) == (first,) or source.aliases.get((first,)) == (key,)
        if row.kind == "alias" and key in stored and first in stored and not tied:
            refused += _differing(source, row, first)
    _raise(missing, unexpected, misshaped, refused)
    kinds = {path: mapping.by_path[path].kind for path in specs}
    mapping = _with_refills(source, mapping)

    def pieces(path: KeyPath) -> Iterable[np.ndarray]:
        row = mapping.by_path[path]
        parts = [_whole(source, (key,)) for key in row.keys]
        return [flax_values(row, specs[path].shape, parts, copy=True)]

    copies = source.copies + _new_copies(mapping)
    return Tensors(mapping.flax, specs, pieces, kinds, mapping=mapping, copies=copies)


def _to_torch(source: Tensors, mapping: StateMapping) -> Tensors:
    missing, refused = [], []
    specs: dict[KeyPath, Spec] = {}
    for key, rows in mapping.by_key.items():
        parts = [row for row in rows if row.kind != "alias"]
        if not parts:
            continue
        if absent := [row for row in parts if row.path not in source.specs]:
            missing += [MismatchEntry(key, row.place) for row in absent if row.required]
            continue
        spec = source.specs[parts[0].path]
        try:
            shapes = {torch_shape(row, source.specs[row.path].shape) for row in parts}
            if len(shapes) > 1:
                raise ValueError(
                    f"its parts imply different shapes: {' and '.join(map(str, sorted(shapes)))}"
                )
            specs[(key,)] = Spec(shapes.pop(), spec.dtype)
            dtypes = [source.specs[row.path].dtype for row in parts]
            refused += differing_dtypes(key, parts[0].place, dtypes)
        except ValueError as error:
            refused.append(
                MismatchEntry(key, parts[0].place, spec.shape, reason=f"{parts[0].place}: {error}")
            )
    missing += [
        MismatchEntry(row.torch_key, row.place)
        for row in mapping.rows
        if row.twin and row.required and row.path not in source.specs
    ]
    refused += _unequal_twins(source, mapping)
    refused += _objections(source, mapping, lambda item: item.path)
    known = mapping.by_path.keys() | {item.path for item in mapping.left}
    unexpected = [
        MismatchEntry(slashed(path), "", spec.shape)
        for path, spec in source.specs.items()
        if path not in known
    ]
    _raise(missing, unexpected, [], refused)
    first_keys: dict[KeyPath, KeyPath] = {
        (row.torch_key,): (mapping.by_path[row.path].torch_key,)
        for row in mapping.rows
        if row.kind == "alias"
    }
    aliases = {key: first for key, first in first_keys.items() if first in specs}
    kinds = {(key,): rows[0].kind for key, rows in mapping.by_key.items()}
    for key, refill in mapping.refills.items():
        specs[(key,)] = Spec(refill.shape, refill.dtype)
        kinds[(key,)] = "buffer"

    def pieces(path: KeyPath) -> Iterator[np.ndarray]:
        if path[0] in mapping.refills:
            yield refilled(mapping.refills[path[0]])
            return
        rows = mapping.by_key[path[0]]
        made = (_of_key(path[0], row, _whole(source, row.path)) for row in rows)
        part = rows[0].part
        if part is None or part.lies_in_pieces:
            yield from made
        else:
            yield part.join(list(made))

    copies = source.copies + _new_copies(mapping)
    return Tensors("torch", specs, pieces, kinds, aliases, mapping, copies=copies)


def _unequal_twins(source: Tensors, mapping: StateMapping) -> list[MismatchEntry]:
    """List the arrays that torch has once, and that have other values in the source."""
    refused = []
    for twin in [row for row in mapping.rows if row.twin and row.path in source.specs]:
        key, rows = twin.torch_key, mapping.by_key[twin.torch_key]
        if any(row.path not in source.specs for row in rows):
            continue
        try:
            here = _of_key(key, twin, _whole(source, twin.path))
            parts = [_of_key(key, row, _whole(source, row.path)) for row in rows]
            there = twin.part_of(rows[0].part.join(parts) if rows[0].part else parts[0])
        except ValueError as error:
            refused.append(MismatchEntry(key, twin.place, reason=f"{twin.place}: {error}"))
            continue
        if not _same_bits(here, there):
            refused.append(unequal_twin(twin))
    return refused


def _of_key(key: str, row: Row, array: np.ndarray) -> np.ndarray:
    """Return what the row's array holds of the torch tensor, in torch's layout."""
    chosen = layout(row.layout, row.slice_shape(array.shape))
    part = to_torch(chosen, array[row.stack.index(key)] if row.stack else array)
    return np.zeros_like(part) if key == row.plus else part


def _new_copies(mapping: StateMapping) -> int:
    """Return how many copies another layout makes: none where a view shows it, two for a sum."""
    if any(
        row.plus or row.stack or (row.part and not row.part.lies_in_pieces) for row in mapping.rows
    ):
        return 2
    return int(any(is_one_of(row.layout, _COPIED) for row in mapping.rows))


def _with_refills(source: Tensors, mapping: StateMapping) -> StateMapping:
    """Return the mapping with the refills of the source's causal masks, for the way back."""

    def with_refill(item: Left) -> Left:
        path = (item.torch_key,)
        if item.policy != "verify" or item.path is not None or path not in source.specs:
            return item
        return item._replace(refill=refill_of(_whole(source, path)))

    if not any(item.policy == "verify" for item in mapping.left):
        return mapping
    return StateMapping(mapping.rows, tuple(map(with_refill, mapping.left)), mapping.flax)


def _objections(
    source: Tensors, mapping: StateMapping, path_of: Callable[[Left], KeyPath | None]
) -> list[MismatchEntry]:
    """List the source's entries without a counterpart that their policy does not allow."""
    refused = []
    for item in mapping.left:
        path = path_of(item)
        if path is not None and path in source.specs and item.policy != "ignore":
            reason = objection(item.policy, _whole(source, path))
            if reason:
                shape, mend = source.specs[path].shape, dropping(item.torch_key, item.policy)
                refused.append(MismatchEntry(item.torch_key, "", shape, reason=reason, mend=mend))
    return refused


def _differing(source: Tensors, row: Row, first_key: str) -> list[MismatchEntry]:
    """Return an entry if the alias and its first key have different values."""
    alias, first = _whole(source, (row.torch_key,)), _whole(source, (first_key,))
    if _same_bits(alias, first):
        return []
    return [
        MismatchEntry(
            row.torch_key,
            row.place,
            reason=f"is tied to {first_key} in Flax, and has other values here",
        )
    ]


def _same_bits(array: np.ndarray, other: np.ndarray) -> bool:
    """Return whether both have the same dtype, shape and bits."""
    is_same_type = (array.dtype, array.shape) == (other.dtype, other.shape)
    return is_same_type and array.tobytes() == other.tobytes()


def _flax_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    one = flax_shape(row.layout, _part_shape(row, shape))
    return (len(row.stack), *one) if row.stack else one


def _part_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if row.part is None or not shape else row.part.shape_in(shape)


def _whole(source: Tensors, path: KeyPath) -> np.ndarray:
    return whole(source, source.aliases.get(path, path))


def _raise(
    missing: list[MismatchEntry],
    unexpected: list[MismatchEntry],
    misshaped: list[MismatchEntry],
    refused: list[MismatchEntry],
) -> None:
    mismatch = Mismatch(tuple(missing), tuple(unexpected), tuple(misshaped), tuple(refused))
    if mismatch:
        raise ConversionError(mismatch)


def cast_array(path: Path, name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the array in another floating dtype.

    Raises:
        CheckpointError: a finite number would become infinite.
    """
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if bool((np.isfinite(array) & ~np.isfinite(result)).any()):
        raise CheckpointError(
            path,
            f"{shown(name)} has numbers beyond {dtype}",
            key=name,
            expected=f"numbers in the range of {dtype}",
            found=f"up to {float(np.nanmax(np.abs(array.astype(np.float64)))):.3g}",
            mend=_wider(array, dtype),
        )
    return result


def _wider(array: np.ndarray, dtype: np.dtype) -> str:
    """Return which dtypes hold the numbers, as a next step."""
    names = [name for name in FLOATS if name != dtype.name]
    with np.errstate(over="ignore"):
        fitting = [
            name
            for name in names
            if np.isfinite(array.astype(numpy_dtype(name))[np.isfinite(array)]).all()
        ]
    return f"choose {' or '.join(fitting)}"


def cast(tensors: Tensors, dtype: str, path: Path) -> Tensors:
    """Return the tensors with floating values, except those of buffers, in another dtype.

    Raises:
        CheckpointError: the dtype is not floating; or, while the values are read, a finite number
            would become infinite.
    """
    if dtype not in FLOATS:
        raise CheckpointError(
            path,
            f"cannot be cast to {dtype}",
            expected=f"one of {', '.join(FLOATS)}",
            found=dtype,
            mend=f"choose one of {', '.join(FLOATS)}",
            is_usage=True,
        )
    changes = {
        key: spec.dtype in FLOATING and is_cast(key, tensors.kinds.get(key, "unknown"))
        for key, spec in tensors.specs.items()
    }
    specs = {
        key: spec._replace(dtype=dtype) if changes[key] else spec
        for key, spec in tensors.specs.items()
    }

    def pieces(key: KeyPath) -> Iterable[np.ndarray]:
        if not changes[key]:
            return tensors.pieces(key)
        target = numpy_dtype(dtype)
        return (cast_array(path, slashed(key), piece, target) for piece in tensors.pieces(key))

    return replace(tensors, specs=specs, pieces=pieces, copies=tensors.copies + 1)


Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Report no progress."""


def watched(tensors: Tensors, progress: Progress) -> Tensors:
    """Return tensors that call `progress(bytes done, total bytes)` with each piece."""
    total, done, lock = sum(spec.nbytes for spec in tensors.specs.values()), 0, Lock()

    def pieces(path: KeyPath) -> Iterator[np.ndarray]:
        nonlocal done
        for piece in tensors.pieces(path):
            with lock:
                done += piece.nbytes
                progress(done, total)
            yield piece

    return replace(tensors, pieces=pieces)
