"""Compare two checkpoints of the same state bit for bit, in any formats and layouts.

Neither file decides how it is checked: names pair as the user says, or as `compare.match` pairs
them. A mapping that a file carries is a claim, and is compared with that pairing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import inf
from numbers import Real
from os import PathLike
from pathlib import Path

import numpy as np

from ..conversion.arguments import require_callback, require_names
from ..conversion.mapping import (
    KeyPath,
    Left,
    Row,
    StateMapping,
    require_mapping,
    slashed,
    words,
)
from ..dtypes import FLOATING
from ..files.memory import collector_paused
from ..files.printable import shown
from .blocks import blocks
from .convert import matched, paired, pairs
from .errors import CheckpointError
from .load import steady
from .manifest import is_mask
from .reader import Reader
from .tensors import FileLayout, Tensors, whole
from .transforms import Progress, cast, relaid, silent

_MEND = (
    "give --map FILE, or --like a checkpoint whose mapping you trust "
    "(in Python, mapping=compare.match(...))"
)


@dataclass(frozen=True)
class Difference:
    """One tensor that differs between the two sides, and how."""

    name: str
    what: str


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what differs.

    Attributes:
        differences: the differences; empty if every name, shape, dtype and bit is the same.
        tensors: the number of tensors that both sides have.
        nbytes: the size of their values in bytes.
        pairing: how the names were paired, in words.
        claims: the files that carry a mapping, which was compared with the pairing.
    """

    differences: list[Difference]
    tensors: int
    nbytes: int
    pairing: str
    claims: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Pairing:
    """Two sides under the same names, and what the pairing itself has found."""

    source: Tensors
    target: Tensors
    how: str
    table: StateMapping | None = None
    left: tuple[Left, ...] = ()


def verify_checkpoint(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    mapping: StateMapping | Sequence[StateMapping] | None = None,
    like: str | PathLike[str] | None = None,
    select: str | Sequence[str] = (),
    layouts: Mapping[str, str] | None = None,
    dtype: str | None = None,
    ignore: Sequence[str] = (),
    tolerance: float | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> list[Difference]:
    """Read both checkpoints, in Flax's layout if one is Flax's, and compare every element.

    Args:
        source: the checkpoint that was converted.
        target: the checkpoint that it was converted to.
        mapping: how torch and Flax names pair. Two are needed, one for each, if a Linen and an NNX
            checkpoint are compared whose names differ. Default: what `compare.match` finds.
        like: a checkpoint whose mapping you trust; it may be one of the two.
        select: the part of the source that holds the state, if a training program wrote more: names
            joined by slashes, or several for Flax, as ("params", "batch_stats").
        layouts: how tensors are laid out whose layout neither side shows, as `compare.match` takes
            them, where names pair by themselves.
        dtype: the dtype that the source's floating tensors were cast to.
        ignore: patterns of the names that may be on one side only.
        tolerance: how far entries of floating tensors may be apart, relative to the largest entry
            of their tensor. Default: every bit must be the same, as those of buffers must.
        memory: the most bytes that what is read and held at once may take. Default: the memory that
            is free.
        progress: called with the bytes done and the total bytes.

    Returns:
        The differences; empty if every name, shape, dtype and bit is the same, and the same names
        are tied.

    Raises:
        CheckpointError: a checkpoint cannot be read, their names do not pair, or there was nothing
            to compare.
        ValueError: the tolerance is negative, 1 or more, or no number.
    """
    comparison = compare_checkpoints(
        source,
        target,
        mapping=mapping,
        like=like,
        select=select,
        layouts=layouts,
        dtype=dtype,
        ignore=ignore,
        tolerance=tolerance,
        memory=memory,
        progress=progress,
    )
    if not comparison.tensors and not comparison.differences:
        raise CheckpointError(
            target,
            f"and {shown(source)} have no tensors, so nothing was compared",
            expected="tensors",
            found="no tensors",
            mend="name the checkpoints that hold the state",
        )
    return comparison.differences


def compare_checkpoints(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    mapping: StateMapping | Sequence[StateMapping] | None = None,
    like: str | PathLike[str] | None = None,
    select: str | Sequence[str] = (),
    layouts: Mapping[str, str] | None = None,
    dtype: str | None = None,
    ignore: Sequence[str] = (),
    tolerance: float | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare as `verify_checkpoint` does, and say also what was compared and how."""
    is_number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
    if tolerance is not None and not (is_number and 0.0 <= float(tolerance) < 1.0):
        raise ValueError(f"tolerance is {tolerance}; expected a number from 0 to below 1")
    given = mapping if isinstance(mapping, Sequence) else [mapping]
    for table in given:
        require_mapping(table)
    tables = [table for table in given if table is not None]
    require_names(ignore=ignore)
    require_callback(progress)

    def with_target(written: Reader) -> Comparison:
        def with_source(stored: Reader) -> Comparison:
            with collector_paused():
                pairing = _paired(stored, written, tables, like, layouts, dtype)
            # The target is compared as a whole, which copies a view.
            is_view = pairing.target.layout != written.layout
            held = pairing.source.largest_bytes + is_view * pairing.target.largest_bytes
            written.require_copies(pairing.target, held=held)
            return _compared(stored, written, pairing, ignore, tolerance, progress)

        return steady(source, with_source, memory, select=select)

    return steady(target, with_target, memory)


def _paired(
    stored: Reader,
    written: Reader,
    tables: Sequence[StateMapping],
    like: str | PathLike[str] | None,
    layouts: Mapping[str, str] | None,
    dtype: str | None,
) -> _Pairing:
    """Bring both sides under the same names."""
    torch_layouts = [reader.layout == "torch" for reader in (stored, written)]
    if all(torch_layouts) or {stored.layout, written.layout} in ({"linen"}, {"nnx"}):
        _require_no_effect(written.path, tables, like)
        _require_no_layouts(written.path, layouts)
        return _Pairing(_cast(stored, dtype), written.tensors(), "by their names")
    if any(torch_layouts):
        return _torch_and_flax(stored, written, tables, like, layouts, dtype)
    _require_no_layouts(written.path, layouts)
    return _linen_and_nnx(stored, written, tables, like, dtype)


def _require_no_effect(
    target: Path, tables: Sequence[StateMapping], like: str | PathLike[str] | None
) -> None:
    if tables or like is not None:
        raise CheckpointError(
            target,
            "mapping= and like= have no effect: both have the same layout",
            expected="no mapping",
            found="a mapping",
            mend="leave them out",
            is_usage=True,
        )


def _require_no_layouts(target: Path, layouts: Mapping[str, str] | None) -> None:
    if layouts:
        raise CheckpointError(
            target,
            "layouts has no effect: no names of torch and Flax are matched",
            expected="no layouts",
            found="layouts (--layout-of)",
            mend="leave it out",
            is_usage=True,
        )


def _cast(stored: Reader, dtype: str | None) -> Tensors:
    return stored.tensors() if dtype is None else cast(stored.tensors(), dtype, stored.path)


def _torch_and_flax(
    stored: Reader,
    written: Reader,
    tables: Sequence[StateMapping],
    like: str | PathLike[str] | None,
    layouts: Mapping[str, str] | None,
    dtype: str | None,
) -> _Pairing:
    flax_layout = written.layout if stored.layout == "torch" else stored.layout
    given = next((table for table in tables if table.flax == flax_layout), None)
    if len(tables) + (like is not None) > 1:
        raise CheckpointError(
            written.path,
            "only one mapping can have an effect: the names are those of torch and of one Flax API",
            expected="one mapping, or like=",
            found="several",
            mend="leave all but one out",
            is_usage=True,
        )
    if tables and given is None:
        raise CheckpointError(
            written.path,
            f"the mapping is for {tables[0].flax}; these are torch and {flax_layout}",
            expected=f"a mapping for {flax_layout}",
            found=tables[0].flax,
            mend="give the mapping that belongs to them",
            is_usage=True,
        )
    left: tuple[Left, ...] = ()
    if given is not None or like is not None:
        _require_no_layouts(written.path, layouts)
    if given is not None:
        how, table = "by the given mapping", given
    elif like is not None:
        how, table = f"by the mapping of {shown(like)}", matched(stored, like, flax_layout)
    else:
        how, table = "by their names", _paired_by_name(stored, written, layouts)
        left = table.left
    table = stored.spell(written.spell(table))
    # Both are compared in Flax's layout: two biases of torch have one sum, and not the reverse.
    source, target = (_in_flax(reader, table) for reader in (stored, written))
    source = source if dtype is None else cast(source, dtype, stored.path)
    return _Pairing(source, target, how, table, left)


def _paired_by_name(
    stored: Reader, written: Reader, layouts: Mapping[str, str] | None
) -> StateMapping:
    """Return how the names pair. Entries on one side only are left out, to be findings.

    Raises:
        CheckpointError: nothing pairs, or a pair does not fit.
    """
    table, mismatch = pairs(stored, written, layouts)
    if mismatch.misshaped or mismatch.refused or not table.rows:
        return paired(stored, written, _MEND, layouts)
    flax = stored if written.layout == "torch" else written
    paths = {slashed(path): path for path in flax.specs}
    left = [Left(entry.name, "ignore") for entry in mismatch.unexpected]
    left += [Left(entry.place, "ignore", paths[entry.place]) for entry in mismatch.missing]
    return StateMapping(table.rows, (*table.left, *left), table.flax)


def _in_flax(reader: Reader, table: StateMapping) -> Tensors:
    """Return the tensors in Flax's layout, with the kinds of state that the mapping knows."""
    if reader.layout == "torch":
        return relaid(reader.path, reader.tensors(), table)
    tensors = reader.tensors()
    return replace(tensors, kinds={path: row.kind for path, row in table.by_path.items()})


def _linen_and_nnx(
    stored: Reader,
    written: Reader,
    tables: Sequence[StateMapping],
    like: str | PathLike[str] | None,
    dtype: str | None,
) -> _Pairing:
    by_layout: dict[str, StateMapping] = {table.flax: table for table in tables}
    if like is not None or (tables and len(by_layout) < 2):
        raise CheckpointError(
            written.path,
            f"and {shown(stored.path)} are a Linen and an NNX checkpoint",
            expected="no mapping, or one from torch to each",
            found="like=" if like is not None else "one",
            mend="give --map twice, or leave it out",
            is_usage=True,
        )
    if tables:
        source, target = (
            relaid(reader.path, reader.tensors(), reader.spell(by_layout[_flax(reader)]))
            for reader in (stored, written)
        )
        source = source if dtype is None else cast(source, dtype, stored.path)
        return _Pairing(source, target, "by the given mappings")
    source, target = _cast(stored, dtype), written.tensors()
    names = _by_name(source, target.layout, True)
    others = _by_name(target, source.layout, True)
    if names.keys() != others.keys() and stored.mapping and written.mapping:
        raise CheckpointError(
            written.path,
            f"and {shown(stored.path)} have different names; that their own mappings would pair "
            "them proves nothing",
            expected="the same names, or two mappings",
            found="different names",
            mend="give --map twice, one mapping from torch to each",
            is_usage=True,
        )
    return _Pairing(source, target, "by their names")


def _flax(reader: Reader) -> str:
    return "linen" if reader.layout == "linen" else "nnx"


def _compared(
    stored: Reader,
    written: Reader,
    pairing: _Pairing,
    ignore: Sequence[str],
    tolerance: float | None,
    progress: Progress,
) -> Comparison:
    def is_ignored(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in ignore)

    table = pairing.table
    left = () if table is None else table.left
    accepted = {slashed(item.path) if item.path else item.torch_key for item in left}
    # Between the frameworks, a tied Flax array has several torch names but no further Flax names.
    has_ties = table is None
    alone, differences, tensors, nbytes = _differences(
        pairing.source, pairing.target, has_ties, tolerance, progress
    )
    differences = [
        *(one for one in alone if one.name not in accepted and not is_ignored(one.name)),
        *differences,
    ]
    names = [*(one.name for one in alone), *(item.torch_key for item in pairing.left)]
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CheckpointError(
                written.path,
                f"ignore={pattern!r} has no effect: no name on one side only fits it",
                expected="a name on one side only",
                found=pattern,
                mend="leave it out (--ignore)",
                is_usage=True,
            )
    differences += [
        Difference(
            item.torch_key,
            f"has no counterpart; if that is right, say --ignore {shown(item.torch_key)}",
        )
        for item in pairing.left
        if not is_ignored(item.torch_key)
    ]
    claims = []
    for reader in (stored, written):
        if reader.mapping is not None and table is not None and reader.mapping.flax == table.flax:
            claims.append(shown(reader.path))
            differences += _claimed(reader, table)
    return Comparison(differences, tensors, nbytes, pairing.how, tuple(claims))


def _claimed(reader: Reader, table: StateMapping) -> list[Difference]:
    """Return where the mapping that a file carries is not the pairing of the comparison."""
    assert reader.mapping is not None
    claims = {words(path): row for path, row in reader.mapping.by_path.items()}
    differences = []
    for path, row in table.by_path.items():
        claim = claims.get(words(path))
        if claim is not None and _rule(claim) != _rule(row):
            what = f"{shown(reader.path)} claims {_rule_text(claim)}; it is {_rule_text(row)}"
            differences.append(Difference(row.place, what))
    return differences


def _rule(row: Row) -> tuple[object, ...]:
    return row.torch_key, row.layout, row.part, row.plus, row.stack


def _rule_text(row: Row) -> str:
    part = f", part {row.part}" if row.part else ""
    plus = f" + {shown(row.plus)}" if row.plus else ""
    return f"{shown(row.torch_key)}{plus} ({row.layout}{part})"


def _differences(
    source: Tensors,
    target: Tensors,
    has_ties: bool,
    tolerance: float | None,
    progress: Progress,
) -> tuple[list[Difference], list[Difference], int, int]:
    """Return the tensors of one side only, the other differences, and what both sides have.

    The two numbers are the count and the bytes of the tensors that both sides have.
    """
    here = _by_name(source, target.layout, has_ties)
    there = _by_name(target, source.layout, has_ties)
    alone = [
        Difference("/".join(name), "is only in the source") for name in here if name not in there
    ]
    alone += [
        Difference("/".join(name), "is only in the target") for name in there if name not in here
    ]
    both = [name for name in there if name in here]
    differences = []
    first_names: dict[tuple[KeyPath, KeyPath], tuple[str, ...]] = {}
    for name in both:
        first_names.setdefault((here[name], there[name]), name)
    total, done = sum(target.specs[path].nbytes for _, path in first_names), 0
    for (source_path, target_path), name in first_names.items():
        spec, other = source.specs[source_path], target.specs[target_path]
        if spec != other:
            what = (
                f"is {spec.dtype} {spec.shape} in the source, "
                f"{other.dtype} {other.shape} in the target"
            )
            differences.append(Difference("/".join(name), what))
            continue
        array = whole(target, target_path)
        differing, distance = _apart(source.pieces(source_path), array)
        is_exact = tolerance is None or _is_buffer(source, source_path, target, target_path)
        if differing and (is_exact or not distance <= (tolerance or 0.0)):
            by = f", by up to {distance:.2g} of its largest entry" if distance < inf else ""
            what = f"differs in {differing:,} of its {array.nbytes:,} bytes{by}"
            differences.append(Difference("/".join(name), what))
        done += array.nbytes
        progress(done, total)
    if has_ties:
        differences += _tie_differences(here, there, both)
    return alone, differences, len(both), total


def _is_buffer(source: Tensors, path: KeyPath, target: Tensors, other: KeyPath) -> bool:
    """Return whether one side says that the entry is a buffer; if neither says, by its name."""
    kinds = {source.kinds.get(path, "unknown"), target.kinds.get(other, "unknown")}
    return "buffer" in kinds or (kinds == {"unknown"} and is_mask(other, "unknown"))


def _by_name(tensors: Tensors, other: FileLayout, has_ties: bool) -> dict[tuple[str, ...], KeyPath]:
    """Return the paths by name; Linen's names lose the collection if the other side is NNX."""
    first_paths = {path: path for path in tensors.specs}
    first_paths |= tensors.aliases if has_ties else {}
    names = {words(path): first for path, first in first_paths.items()}
    if (tensors.layout, other) != ("linen", "nnx"):
        return names
    shorter = {name[1:]: path for name, path in names.items()}
    return shorter if len(shorter) == len(names) else names


def _tie_differences(
    here: Mapping[tuple[str, ...], KeyPath],
    there: Mapping[tuple[str, ...], KeyPath],
    both: Sequence[tuple[str, ...]],
) -> list[Difference]:
    """Return the names that are not tied to the same other names on both sides."""
    groups: list[dict[KeyPath, set[tuple[str, ...]]]] = [{}, {}]
    for name in both:
        for side, paths in zip(groups, (here, there), strict=True):
            side.setdefault(paths[name], set()).add(name)
    are_same: dict[tuple[KeyPath, KeyPath], bool] = {}
    differences = []
    for name in both:
        key = here[name], there[name]
        one, other = groups[0][key[0]], groups[1][key[1]]
        if key not in are_same:
            are_same[key] = one == other
        if not are_same[key]:
            what = f"is tied to {_others(one, name)} in the source, {_others(other, name)} in the "
            differences.append(Difference("/".join(name), f"{what}target"))
    return differences


def _others(group: set[tuple[str, ...]], name: tuple[str, ...]) -> str:
    other = next((each for each in group if each != name), None)
    more = f" and {len(group) - 2:,} more" if len(group) > 2 else ""
    return "nothing" if other is None else shown("/".join(other)) + more


def _apart(pieces: Iterable[np.ndarray], array: np.ndarray) -> tuple[int, float]:
    """Return how many bytes differ, and how far entries are apart relative to the largest.

    The latter is inf for other dtypes than floating ones, and where only one side is finite.
    """
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    is_floating = array.dtype.name in (*FLOATING, "complex64", "complex128")
    wide = np.complex128 if array.dtype.kind == "c" else np.float64
    begin, differing, farthest, largest = 0, 0, 0.0, 0.0
    for piece in pieces:
        for block in blocks(piece):
            other = flat[begin : begin + block.nbytes]
            count = int((block != other).sum())
            if count and is_floating:
                one, two = (each.view(array.dtype).astype(wide) for each in (block, other))
                with np.errstate(invalid="ignore"):
                    apart = np.where(one == two, 0.0, np.abs(one - two))
                apart[np.isnan(one) & np.isnan(two)] = 0.0
                largest = max(largest, _largest(one))
                farthest = max(farthest, float(np.nan_to_num(apart, nan=inf, posinf=inf).max()))
            differing += count
            begin += block.nbytes
    if not differing or not is_floating:
        return differing, inf if differing else 0.0
    for block in blocks(array):
        largest = max(largest, _largest(block.view(array.dtype).astype(wide)))
    return differing, farthest / largest if farthest else 0.0


def _largest(array: np.ndarray) -> float:
    """Return the largest absolute value that is finite."""
    sizes = np.abs(array)
    return float(sizes[np.isfinite(sizes)].max(initial=0.0))
