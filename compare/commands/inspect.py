"""Show what a module, a file or a folder holds; of two, what differs."""

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
from ..conversion.errors import shown
from ..conversion.mapping import slashed
from ..conversion.state_kinds import entries
from ..conversion.unmatched import host_values
from ..report.model import Block, Cell, Check, Panels, Section, Table

_PICTURE = 16


@dataclass(frozen=True)
class Shown:
    """One entry: what it is, and its values if they are to be had."""

    name: str
    kind: str
    spec: Spec | None
    array: np.ndarray | None


def sections(
    source: str, other: str | None = None, progress: Progress = silent
) -> Iterator[Section | str]:
    """Yield a section for the source, and with another one a section of what differs; before, what is being done."""
    yield f"reading {source}"
    mine, words = held(source, progress)
    if other is None:
        yield _section(source, mine, words)
        return
    yield f"reading {other}"
    its, more = held(other, progress)
    yield _difference(source, other, mine, its, [*words, *more])


def held(source: str, progress: Progress) -> tuple[list[Shown], list[str]]:
    """Return the entries of a file, a folder, or `package.module:name`, and what there is to say of it.

    Raises:
        CheckpointError: there is no such thing.
    """
    if not Path(source).exists() and ":" in source:
        return _of_module(source), []
    with open_checkpoint(source) as stored:
        found, total, done = [], sum(spec.nbytes for spec in stored.specs.values()), 0
        arrays = {}
        for path, array in stored.read():
            name = slashed(path)
            found.append(Shown(name, stored.kinds.get(path, "unknown"), stored.specs[path], array))
            arrays[path] = array
            done += array.nbytes
            progress(done, total)
        found += [
            Shown(
                slashed(path),
                f"alias of {slashed(first)}",
                stored.specs[first],
                arrays[first],
            )
            for path, first in stored.aliases.items()
        ]
        checked = (
            "every checksum is right"
            if stored.checked
            else "no manifest, so nothing could be checked"
        )
        return found, [
            f"{source}: {stored.format}, {stored.layout} layout, {total:,} bytes, {checked}."
        ]


def _of_module(source: str) -> list[Shown]:
    """Return the entries of an object that a module has, called if it is a function."""
    place, _, name = source.partition(":")
    try:
        found = getattr(import_module(place), name)
        if callable(found) and not isinstance(found, torch.nn.Module | nnx.Module):
            found = found()
        held_ = entries(found)
    except (
        Exception,
        SystemExit,
    ) as error:  # whatever the user's module does when it is imported or called
        raise CheckpointError(
            source,
            f"is no module to look at ({type(error).__name__}: {shown(error)})",
            expected="a file, a folder, or package.module:name of a torch or NNX module, Linen variables, or a "
            "function without arguments that returns one",
        ) from error
    shown_ = []
    for entry in held_:
        kind = f"alias of {slashed(entry.first)}" if entry.first is not None else entry.kind
        array = _values(entry.value) if entry.kind != "stream" else None
        shown_.append(
            Shown(
                entry.name,
                "plain: will be left behind" if kind == "left behind" else kind,
                spec_of(array) if array is not None else None,
                array,
            )
        )
    return shown_


def _values(value: Any) -> np.ndarray | None:
    """Return the values, or None where there are no plain ones."""
    try:
        array = host_values(value)
        return array if array is None or spec_of(array) else None
    except (ValueError, TypeError, RuntimeError):
        return None


def _section(source: str, found: list[Shown], words: list[str]) -> Section:
    columns = ["name", "kind", "shape", "dtype", "bytes", "min", "mean", "max", "notes"]
    section = Section(source, [Table(columns, [_row(entry) for entry in found]), *words])
    section.blocks += _pictures({source: found})
    return section


def _row(entry: Shown) -> list[Cell]:
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
    """Return least, mean and greatest finite value, and what is not finite."""
    if array is None or not array.size or array.dtype.kind == "c":
        return [None, None, None, "" if array is None else "empty" if not array.size else ""]
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


def _pictures(sides: Mapping[str, list[Shown]]) -> list[Block]:
    """Return the masks, those of the same name side by side."""
    blocks: list[Block] = []
    names = {entry.name: None for found in sides.values() for entry in found if _pictured(entry)}
    for name in names:
        matrices = {
            side: _coarse(entry.array)
            for side, found in sides.items()
            for entry in found
            if entry.name == name and _pictured(entry) and entry.array is not None
        }
        whole = all(len(matrix) < _PICTURE for matrix in matrices.values())
        title = f"{name}: nonzero blocks" if whole else f"{name}: ninths of each square that block"
        blocks.append(Panels(title, matrices))
    return blocks


def _pictured(entry: Shown) -> bool:
    kind = entry.kind.partition(" of ")[0]
    return (
        entry.array is not None
        and entry.array.ndim == 2
        and entry.array.size > 0
        and is_mask(tuple(entry.name.split("/")), kind)
    )


def _coarse(array: Any) -> list[list[float]]:
    if max(array.shape) < _PICTURE:
        return array.astype(np.float64).tolist()
    rows, columns = (np.array_split(np.arange(size), min(size, _PICTURE)) for size in array.shape)
    blocked = array.astype(bool)
    return [
        [float(np.round(9 * blocked[np.ix_(row, column)].mean())) for column in columns]
        for row in rows
    ]


def _difference(
    source: str, other: str, mine: list[Shown], its: list[Shown], words: list[str]
) -> Section:
    left, right = {entry.name: entry for entry in mine}, {entry.name: entry for entry in its}
    rows: list[list[Cell]] = []
    for name in dict.fromkeys([*left, *right]):
        what = _what_differs(left.get(name), right.get(name), source, other)
        rows += [[shown(name), what]] if what else []
    section = Section(f"{source} and {other}", [*words])
    if rows:
        section.blocks.append(Table(["name", "difference"], rows))
    section.blocks += _pictures({source: mine, other: its})
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


def _what_differs(mine: Shown | None, its: Shown | None, source: str, other: str) -> str | None:
    if mine is None or its is None:
        return f"is only in {other if mine is None else source}"
    if mine.spec != its.spec or mine.array is None or its.array is None:
        return None if mine.spec == its.spec else f"{_words(mine.spec)} and {_words(its.spec)}"
    one, two = (np.ascontiguousarray(array).reshape(-1) for array in (mine.array, its.array))
    differing = (
        (one.view(np.uint8) != two.view(np.uint8)).reshape(one.size, -1).any(axis=1)
        if one.size
        else np.zeros(0)
    )
    if not differing.any():
        return None
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    apart = np.abs(one[differing].astype(wide) - two[differing].astype(wide))
    return f"{int(differing.sum()):,} of {one.size:,} values, by up to {float(np.nanmax(apart, initial=0.0)):.3g}"


def _words(spec: Spec | None) -> str:
    return (
        "nothing" if spec is None else f"{spec.dtype} {'x'.join(map(str, spec.shape)) or 'scalar'}"
    )
