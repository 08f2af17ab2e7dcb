"""Show what a module, a file or a folder holds, or the differences between two of them.

Files are read part by part, so their size does not matter. What a report shows of the values is
gathered on the way: statistics, and a coarse picture of the masks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ..checkpoint.blocks import BLOCK_BYTES
from ..checkpoint.formats import open_checkpoint
from ..checkpoint.manifest import is_mask
from ..checkpoint.reader import Reader
from ..checkpoint.tensors import Spec
from ..checkpoint.transforms import Progress, silent
from ..conversion.mapping import KeyPath, slashed, words
from ..files.printable import shown
from ..report.model import Block, Cell, Check, Panels, Section, Table
from .inspect_module import InspectedEntry, module_entries

# Larger masks are shown as a grid of squares, this many along each axis.
_GRID_SIZE = 16
_MAX_PICTURES = 12

Key = tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What is inspected: its name, its entries in order, and notes on the whole."""

    name: str
    entries: Mapping[Key, InspectedEntry]
    notes: list[str]


def sections(
    source: str | None = None,
    other: str | None = None,
    modules: Iterable[str] = (),
    select: Sequence[str] = (),
    memory: int | None = None,
    progress: Progress = silent,
) -> Iterator[Section | str]:
    """Yield progress messages, then one section: one source's entries, or how two of them differ.

    Args:
        source: a file or folder.
        other: another one.
        modules: modules as `package.module:name`, which are imported.
        select: the part of the first file that holds the state.
        memory: the most bytes that what is read and held at once may take.
        progress: called with the bytes done and the total bytes.
    """
    with ExitStack() as opened:
        given: list[Source] = []
        readers: list[Reader] = []
        for name, part in ((source, select), (other, ())):
            if name is None:
                continue
            yield f"reading {name}"
            stored = open_checkpoint(name, memory, select=part)
            readers.append(opened.enter_context(stored))
            given.append(_file(readers[-1], name))
        for name in modules:
            yield f"importing {name}"
            entries = {tuple(entry.name.split("/")): entry for entry in module_entries(name)}
            given.append(Source(name, entries, []))
        if len(given) == 1:
            section = _section(given[0], progress)
        else:
            section = _difference(given[0], given[1], progress)
        for reader in readers:
            reader.require_current()
        yield section


def _file(stored: Reader, name: str) -> Source:
    def parts_of(path: KeyPath) -> Any:
        return lambda: stored.parts(path)

    entries = {}
    for path, spec in stored.specs.items():
        kind = stored.kinds.get(path, "unknown")
        entries[words(path)] = InspectedEntry(slashed(path), kind, spec, parts_of(path))
    for path, first in stored.aliases.items():
        kind = f"alias of {slashed(first)}"
        entries[words(path)] = InspectedEntry(
            slashed(path), kind, stored.specs[first], parts_of(first)
        )
    checked = (
        "every value is as it was saved (checksums)"
        if stored.checked
        else "no manifest, so it is not known whether its values are those that were saved"
    )
    total = sum(spec.nbytes for spec in stored.specs.values())
    note = f"{name}: {stored.format}, {stored.layout} layout, {total:,} bytes, {checked}."
    if stored.left_out:
        note += f" Left out: {', '.join(map(shown, stored.left_out))}."
    return Source(name, entries, [note])


class _Statistics:
    """The least, mean and greatest finite value, the number of others, and a picture of a mask."""

    def __init__(self, entry: InspectedEntry) -> None:
        self.least, self.greatest, self.sum = np.inf, -np.inf, 0.0
        self.finite = self.nans = self.infinities = 0
        self.mask = _MaskPicture(entry.spec) if _is_shown_mask(entry) and entry.spec else None

    def add(self, part: np.ndarray) -> None:
        """Add a consecutive part of the values."""
        if self.mask is not None:
            self.mask.add(part)
        if part.dtype.kind == "c":
            return
        for begin in range(0, part.size, BLOCK_BYTES // 8):
            wide = part[begin : begin + BLOCK_BYTES // 8].astype(np.float64)
            finite = wide[np.isfinite(wide)]
            self.finite += finite.size
            nans = int(np.isnan(wide).sum())
            self.nans += nans
            self.infinities += wide.size - finite.size - nans
            if finite.size:
                self.least = min(self.least, float(finite.min()))
                self.greatest = max(self.greatest, float(finite.max()))
                # Numbers near the largest one would overflow in a plain sum.
                self.sum += float((finite / 2**20).sum())

    def cells(self) -> list[Cell]:
        """Return least, mean and greatest, and a note on the others."""
        notes = ", ".join(
            f"{count} {name}"
            for name, count in (("NaN", self.nans), ("inf", self.infinities))
            if count
        )
        if not self.finite:
            return [None, None, None, notes]
        mean = self.sum / self.finite * 2**20
        return [self.least, mean, self.greatest, notes]


class _MaskPicture:
    """A small mask as it is, a large one as a grid of blocked shares in ninths."""

    def __init__(self, spec: Spec) -> None:
        rows, columns = spec.shape
        self.columns, self.position = columns, 0
        self.is_whole = max(rows, columns) < _GRID_SIZE
        self.values: list[float] = []
        self.row_edges = _edges(rows)
        self.column_edges = _edges(columns)
        self.blocked = np.zeros((len(self.row_edges), len(self.column_edges)), np.int64)
        self.sizes = np.outer(_sizes(self.row_edges, rows), _sizes(self.column_edges, columns))

    def add(self, part: np.ndarray) -> None:
        """Add a consecutive part of the values."""
        if self.is_whole:
            self.values += part.astype(np.float64).tolist()
            return
        nonzero = np.flatnonzero(part.astype(bool)) + self.position
        rows, columns = np.divmod(nonzero, self.columns)
        squares = (
            np.searchsorted(self.row_edges, rows, "right") - 1,
            np.searchsorted(self.column_edges, columns, "right") - 1,
        )
        np.add.at(self.blocked, squares, 1)
        self.position += part.size

    def matrix(self) -> list[list[float]]:
        """Return the picture."""
        if self.is_whole:
            return np.reshape(self.values, (-1, self.columns)).tolist()
        return np.round(9 * self.blocked / self.sizes).tolist()


def _edges(size: int) -> np.ndarray:
    """Return where each of the squares begins along an axis."""
    parts = np.array_split(np.arange(size), min(size, _GRID_SIZE))
    return np.array([part[0] for part in parts])


def _sizes(edges: np.ndarray, size: int) -> np.ndarray:
    return np.diff([*edges, size])


def _is_shown_mask(entry: InspectedEntry) -> bool:
    if entry.spec is None or len(entry.spec.shape) != 2 or 0 in entry.spec.shape:
        return False
    kind = entry.kind.partition(" of ")[0]
    return is_mask(tuple(entry.name.split("/")), kind) and entry.spec.dtype[:7] != "complex"


def _section(source: Source, progress: Progress) -> Section:
    """Show a row for every entry, and pictures of the masks."""
    columns = ["name", "kind", "shape", "dtype", "bytes", "min", "mean", "max", "notes"]
    rows: list[list[Cell]] = []
    pictures: dict[str, Mapping[str, list[list[float]]]] = {}
    total, done = _nbytes(source), 0
    for entry in source.entries.values():
        row, matrix = _row(entry)
        rows.append(row)
        if matrix is not None:
            pictures[entry.name] = {source.name: matrix}
        done += entry.spec.nbytes if entry.spec is not None else 0
        progress(done, total)
    return Section(source.name, [Table(columns, rows), *source.notes, *_panels(pictures)])


def _nbytes(source: Source) -> int:
    return sum(entry.spec.nbytes for entry in source.entries.values() if entry.spec is not None)


def _row(entry: InspectedEntry) -> tuple[list[Cell], list[list[float]] | None]:
    name = shown(entry.name)
    if entry.spec is None:
        return [name, entry.kind, None, None, None, None, None, None, ""], None
    statistics = _Statistics(entry)
    for part in entry.parts():
        statistics.add(part)
    shape = "x".join(map(str, entry.spec.shape)) or "scalar"
    cells = statistics.cells()
    if not entry.spec.nbytes:
        cells[3] = "empty"
    row: list[Cell] = [name, entry.kind, shape, entry.spec.dtype, f"{entry.spec.nbytes:,}", *cells]
    return row, statistics.mask.matrix() if statistics.mask is not None else None


def _panels(pictures: Mapping[str, Mapping[str, list[list[float]]]]) -> list[Block]:
    """Return pictures of the first masks; masks of one name stand side by side."""
    blocks: list[Block] = []
    for name, matrices in islice(pictures.items(), _MAX_PICTURES):
        whole = all(len(matrix) < _GRID_SIZE for matrix in matrices.values())
        content = "nonzero blocks" if whole else "blocked share of each square, in ninths"
        blocks.append(Panels(f"{shown(name)}: {content}", matrices))
    if len(pictures) > _MAX_PICTURES:
        blocks.append(f"… and the pictures of {len(pictures) - _MAX_PICTURES:,} more masks.")
    return blocks


def _difference(left: Source, right: Source, progress: Progress) -> Section:
    """Show a row for every entry that differs, and check that there is none."""
    rows: list[list[Cell]] = []
    pictures: dict[str, dict[str, list[list[float]]]] = {}
    total, done = _nbytes(left), 0
    for key in dict.fromkeys([*left.entries, *right.entries]):
        one, other = left.entries.get(key), right.entries.get(key)
        entry = one or other
        assert entry is not None
        if one is None or other is None:
            difference: str | None = f"is only in {right.name if one is None else left.name}"
        else:
            difference = _describe_difference(one, other)
            done += one.spec.nbytes if one.spec is not None else 0
            progress(done, total)
        if difference is not None:
            rows.append([shown(entry.name), difference])
            _draw(pictures, entry.name, {left.name: one, right.name: other})
    section = Section(f"{left.name} and {right.name}", [*left.notes, *right.notes])
    if rows:
        section.blocks.append(Table(["name", "difference"], rows))
    section.blocks += _panels(pictures)
    both = len(left.entries.keys() & right.entries.keys())
    measured = f"{len(rows)} entries differ" if rows else f"{both} entries are the same"
    held = None if not rows and not both else not rows
    section.checks.append(Check("no difference", "all", held, measured, "none"))
    return section


def _draw(
    pictures: dict[str, dict[str, list[list[float]]]],
    name: str,
    sides: Mapping[str, InspectedEntry | None],
) -> None:
    """Add the pictures of masks that differ."""
    for side, entry in sides.items():
        if entry is not None and _is_shown_mask(entry) and len(pictures) <= _MAX_PICTURES:
            _, matrix = _row(entry)
            if matrix is not None:
                pictures.setdefault(name, {})[side] = matrix


def _describe_difference(left: InspectedEntry, right: InspectedEntry) -> str | None:
    """Say how two entries differ, or return None if they are the same."""
    if left.spec != right.spec:
        return f"{_describe_spec(left.spec)} and {_describe_spec(right.spec)}"
    if left.spec is None or not left.spec.nbytes:
        return None
    count, largest = 0, 0.0
    wide = np.complex128 if left.spec.dtype.startswith("complex") else np.float64
    for first, second in _side_by_side(left.parts(), right.parts()):
        width = first.dtype.itemsize
        same = first.view(np.uint8) == second.view(np.uint8)
        differing = ~same.reshape(-1, width).all(axis=1)
        if differing.any():
            count += int(differing.sum())
            with np.errstate(all="ignore"):
                distances = np.abs(first[differing].astype(wide) - second[differing].astype(wide))
            largest = max(largest, float(np.nanmax(distances, initial=0.0)))
    if not count:
        return None
    size = left.spec.nbytes // left.spec.numpy.itemsize
    return f"{count:,} of {size:,} values, by up to {largest:.3g}"


def _side_by_side(
    left: Iterable[np.ndarray], right: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield parts of equal size from two sequences of parts."""
    others = iter(right)
    rest = np.empty(0)
    for part in left:
        while part.size:
            rest = rest if rest.size else next(others)
            size = min(part.size, rest.size)
            yield part[:size], rest[:size]
            part, rest = part[size:], rest[size:]
    for _ in others:  # the checksum comes after the last part
        pass


def _describe_spec(spec: Spec | None) -> str:
    if spec is None:
        return "nothing"
    return f"{spec.dtype} {'x'.join(map(str, spec.shape)) or 'scalar'}"
