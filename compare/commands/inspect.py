"""Show what a module, a file or a folder holds, or the differences between two of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import nnx

from ..checkpoint.errors import CheckpointError
from ..checkpoint.formats import open_checkpoint
from ..checkpoint.manifest import is_mask
from ..checkpoint.tensors import Spec, spec_of
from ..checkpoint.transforms import Progress, silent
from ..conversion.mapping import slashed
from ..conversion.state_kinds import entries
from ..conversion.unmatched import host_values
from ..files.printable import shown
from ..report.model import Block, Cell, Check, Panels, Section, Table

# Larger masks are shown as a grid of squares, this many along each axis.
_GRID_SIZE = 16


@dataclass(frozen=True)
class InspectedEntry:
    """One entry. `spec` and `array` are None where it has no plain array of values."""

    name: str
    kind: str
    spec: Spec | None
    array: np.ndarray | None


def sections(
    source: str, other: str | None = None, progress: Progress = silent
) -> Iterator[Section | str]:
    """Yield progress messages, then one section: the source's entries, or how the two differ."""
    yield f"reading {source}"
    source_entries, source_notes = read_entries(source, progress)
    if other is None:
        yield _section(source, source_entries, source_notes)
        return
    yield f"reading {other}"
    other_entries, other_notes = read_entries(other, progress)
    notes = [*source_notes, *other_notes]
    yield _difference(source, other, source_entries, other_entries, notes)


def read_entries(source: str, progress: Progress) -> tuple[list[InspectedEntry], list[str]]:
    """Return the entries of a file, a folder, or `package.module:name`, and notes on the whole.

    Raises:
        CheckpointError: the source does not exist or cannot be read.
    """
    if not Path(source).exists() and ":" in source:
        return _module_entries(source), []
    with open_checkpoint(source) as stored:
        listed = []
        total = sum(spec.nbytes for spec in stored.specs.values())
        done = 0
        arrays = {}
        for path, array in stored.read():
            kind = stored.kinds.get(path, "unknown")
            listed.append(InspectedEntry(slashed(path), kind, stored.specs[path], array))
            arrays[path] = array
            done += array.nbytes
            progress(done, total)
        for path, first in stored.aliases.items():
            kind = f"alias of {slashed(first)}"
            listed.append(InspectedEntry(slashed(path), kind, stored.specs[first], arrays[first]))
        checked = (
            "all checksums match" if stored.checked else "no manifest, so nothing could be checked"
        )
        note = f"{source}: {stored.format}, {stored.layout} layout, {total:,} bytes, {checked}."
        return listed, [note]


def _module_entries(source: str) -> list[InspectedEntry]:
    """Return the entries of the object `package.module:name`; a function is called first."""
    module_name, _, name = source.partition(":")
    try:
        target = getattr(import_module(module_name), name)
        if callable(target) and not isinstance(target, torch.nn.Module | nnx.Module):
            target = target()
        state_entries = entries(target)
    # The user's module may raise anything when it is imported or called.
    except (Exception, SystemExit) as error:
        raise CheckpointError(
            source,
            f"is not a module that can be inspected ({type(error).__name__}: {shown(error)})",
            expected="a file, a folder, or package.module:name of a torch or NNX module, "
            "Linen variables, or a function without arguments that returns one",
        ) from error
    listed = []
    for entry in state_entries:
        kind = f"alias of {slashed(entry.first)}" if entry.first is not None else entry.kind
        if kind == "left behind":
            kind = "plain: will be left behind"
        array = _values(entry.value) if entry.kind != "stream" else None
        spec = spec_of(array) if array is not None else None
        listed.append(InspectedEntry(entry.name, kind, spec, array))
    return listed


def _values(value: Any) -> np.ndarray | None:
    """Return the values as an array, or None where there is no plain array."""
    try:
        array = host_values(value)
        return array if array is None or spec_of(array) else None
    except (ValueError, TypeError, RuntimeError):
        return None


def _section(source: str, listed: list[InspectedEntry], notes: list[str]) -> Section:
    """Show a row for every entry, and pictures of the masks."""
    columns = ["name", "kind", "shape", "dtype", "bytes", "min", "mean", "max", "notes"]
    section = Section(source, [Table(columns, [_row(entry) for entry in listed]), *notes])
    section.blocks += _mask_panels({source: listed})
    return section


def _row(entry: InspectedEntry) -> list[Cell]:
    if entry.spec is None:
        return [shown(entry.name), entry.kind, None, None, None, None, None, None, ""]
    shape = "x".join(map(str, entry.spec.shape)) or "scalar"
    return [
        shown(entry.name),
        entry.kind,
        shape,
        entry.spec.dtype,
        f"{entry.spec.nbytes:,}",
        *_statistics(entry.array),
    ]


def _statistics(array: np.ndarray | None) -> list[Cell]:
    """Return the least, mean and greatest finite value, and a note on the others."""
    if array is None or not array.size or array.dtype.kind == "c":
        is_empty = array is not None and not array.size
        return [None, None, None, "empty" if is_empty else ""]
    wide = array.reshape(-1).astype(np.float64)
    finite = wide[np.isfinite(wide)]
    notes = [
        f"{count} {name}"
        for name, count in (("NaN", np.isnan(wide).sum()), ("inf", np.isinf(wide).sum()))
        if count
    ]
    if not finite.size:
        return [None, None, None, ", ".join(notes)]
    return [float(finite.min()), float(finite.mean()), float(finite.max()), ", ".join(notes)]


def _mask_panels(sides: Mapping[str, list[InspectedEntry]]) -> list[Block]:
    """Return the masks of all sides; masks with the same name stand side by side."""
    masks: dict[str, dict[str, list[list[float]]]] = {}
    for side, listed in sides.items():
        for entry in listed:
            if entry.array is not None and _is_shown_mask(entry, entry.array):
                masks.setdefault(entry.name, {})[side] = _coarse(entry.array)
    blocks: list[Block] = []
    for name, matrices in masks.items():
        whole = all(len(matrix) < _GRID_SIZE for matrix in matrices.values())
        content = "nonzero blocks" if whole else "blocked share of each square, in ninths"
        blocks.append(Panels(f"{name}: {content}", matrices))
    return blocks


def _is_shown_mask(entry: InspectedEntry, array: np.ndarray) -> bool:
    kind = entry.kind.partition(" of ")[0]
    is_matrix = array.ndim == 2 and array.size > 0
    return is_matrix and is_mask(tuple(entry.name.split("/")), kind)


def _coarse(array: Any) -> list[list[float]]:
    """Return a small mask as it is, a large one as a grid of blocked shares in ninths."""
    if max(array.shape) < _GRID_SIZE:
        return array.astype(np.float64).tolist()
    rows, columns = (np.array_split(np.arange(size), min(size, _GRID_SIZE)) for size in array.shape)
    blocked = array.astype(bool)
    return [
        [float(np.round(9 * blocked[np.ix_(row, column)].mean())) for column in columns]
        for row in rows
    ]


def _difference(
    source: str,
    other: str,
    source_entries: list[InspectedEntry],
    other_entries: list[InspectedEntry],
    notes: list[str],
) -> Section:
    """Show a row for every entry that differs, and check that there is none."""
    left = {entry.name: entry for entry in source_entries}
    right = {entry.name: entry for entry in other_entries}
    rows: list[list[Cell]] = []
    for name in dict.fromkeys([*left, *right]):
        difference = _describe_difference(left.get(name), right.get(name), source, other)
        if difference is not None:
            rows.append([shown(name), difference])
    section = Section(f"{source} and {other}", [*notes])
    if rows:
        section.blocks.append(Table(["name", "difference"], rows))
    section.blocks += _mask_panels({source: source_entries, other: other_entries})
    same = f"{len(left.keys() & right.keys())} entries are the same"
    section.checks.append(
        Check(
            "no difference",
            "all",
            not rows,
            f"{len(rows)} entries differ" if rows else same,
            "none",
        )
    )
    return section


def _describe_difference(
    left: InspectedEntry | None, right: InspectedEntry | None, source: str, other: str
) -> str | None:
    """Say how two entries differ, or return None if they are the same."""
    if left is None or right is None:
        return f"is only in {other if left is None else source}"
    if left.spec != right.spec:
        return f"{_describe_spec(left.spec)} and {_describe_spec(right.spec)}"
    if left.array is None or right.array is None:
        return None
    first, second = (np.ascontiguousarray(array).reshape(-1) for array in (left.array, right.array))
    if not first.size:
        return None
    differing = (first.view(np.uint8) != second.view(np.uint8)).reshape(first.size, -1).any(axis=1)
    if not differing.any():
        return None
    wide = np.complex128 if first.dtype.kind == "c" else np.float64
    distances = np.abs(first[differing].astype(wide) - second[differing].astype(wide))
    largest = float(np.nanmax(distances, initial=0.0))
    return f"{int(differing.sum()):,} of {first.size:,} values, by up to {largest:.3g}"


def _describe_spec(spec: Spec | None) -> str:
    if spec is None:
        return "nothing"
    return f"{spec.dtype} {'x'.join(map(str, spec.shape)) or 'scalar'}"
