"""Compare two checkpoints of the same state bit for bit, in any formats and layouts.

Neither file decides how it is checked: names pair as the user says, or as `compare.match` pairs
them. A mapping that a file carries is a claim, and is compared with that pairing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path

import numpy as np

from ..conversion.mapping import KeyPath, Left, Row, StateMapping
from ..files.printable import shown
from .blocks import blocks
from .convert import matched, paired, planned
from .errors import CheckpointError
from .load import steady
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
    dtype: str | None = None,
    ignore: Sequence[str] = (),
    memory: int | None = None,
    progress: Progress = silent,
) -> list[Difference]:
    """Read both checkpoints, the source in the target's layout, and compare every element.

    Args:
        source: the checkpoint that was converted.
        target: the checkpoint that it was converted to.
        mapping: how torch and Flax names pair. Two are needed, one for each, if a Linen and an NNX
            checkpoint are compared whose names differ. Default: what `compare.match` finds.
        like: a checkpoint whose mapping you trust; it may be one of the two.
        dtype: the dtype that the source's floating tensors were cast to.
        ignore: patterns of the names that may be on one side only.
        memory: the most bytes that what is read and held at once may take. Default: the memory that
            is free.
        progress: called with the bytes done and the total bytes.

    Returns:
        The differences; empty if every name, shape, dtype and bit is the same.

    Raises:
        CheckpointError: a checkpoint cannot be read, their names do not pair, or there was nothing
            to compare.
    """
    comparison = compare_checkpoints(
        source,
        target,
        mapping=mapping,
        like=like,
        dtype=dtype,
        ignore=ignore,
        memory=memory,
        progress=progress,
    )
    if not comparison.tensors and not comparison.differences:
        raise CheckpointError(
            target,
            f"and {shown(source)} have no tensors, so nothing was compared",
            mend="name the checkpoints that hold the state",
        )
    return comparison.differences


def compare_checkpoints(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    mapping: StateMapping | Sequence[StateMapping] | None = None,
    like: str | PathLike[str] | None = None,
    dtype: str | None = None,
    ignore: Sequence[str] = (),
    memory: int | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare as `verify_checkpoint` does, and say also what was compared and how."""
    tables = [mapping] if isinstance(mapping, StateMapping) else list(mapping or ())

    def with_target(written: Reader) -> Comparison:
        def with_source(stored: Reader) -> Comparison:
            pairing = _paired(stored, written, tables, like, dtype)
            return _compared(stored, written, pairing, ignore, progress)

        return steady(source, with_source, memory)

    return steady(target, with_target, memory)


def _paired(
    stored: Reader,
    written: Reader,
    tables: Sequence[StateMapping],
    like: str | PathLike[str] | None,
    dtype: str | None,
) -> _Pairing:
    """Bring both sides under the same names."""
    torch_layouts = [reader.layout == "torch" for reader in (stored, written)]
    if all(torch_layouts) or {stored.layout, written.layout} in ({"linen"}, {"nnx"}):
        _require_no_effect(written.path, tables, like)
        return _Pairing(_cast(stored, dtype), written.tensors(), "by their names")
    if any(torch_layouts):
        return _torch_and_flax(stored, written, tables, like, dtype)
    return _linen_and_nnx(stored, written, tables, like, dtype)


def _require_no_effect(
    target: Path, tables: Sequence[StateMapping], like: str | PathLike[str] | None
) -> None:
    if tables or like is not None:
        raise CheckpointError(
            target,
            "mapping= and like= have no effect: both have the same layout",
            mend="leave them out",
        )


def _cast(stored: Reader, dtype: str | None) -> Tensors:
    return stored.tensors() if dtype is None else cast(stored.tensors(), dtype, stored.path)


def _torch_and_flax(
    stored: Reader,
    written: Reader,
    tables: Sequence[StateMapping],
    like: str | PathLike[str] | None,
    dtype: str | None,
) -> _Pairing:
    flax_layout = written.layout if stored.layout == "torch" else stored.layout
    given = next((table for table in tables if table.flax == flax_layout), None)
    if tables and given is None:
        raise CheckpointError(
            written.path,
            f"the mapping is for {tables[0].flax}; these are torch and {flax_layout}",
            mend="give the mapping that belongs to them",
        )
    left: tuple[Left, ...] = ()
    if given is not None:
        how, table = "by the given mapping", given
    elif like is not None:
        how, table = f"by the mapping of {shown(like)}", matched(stored, like, flax_layout)
    else:
        how, table = "by their names", _by_names(stored, written)
        left = table.left
    allowed = ("torch",) if written.layout == "torch" else ("linen", "nnx")
    table = stored.spell(written.spell(table))
    tensors, _ = planned(stored, allowed, mapping=table, dtype=dtype)
    return _Pairing(tensors, written.tensors(), how, table, left)


def _by_names(stored: Reader, written: Reader) -> StateMapping:
    try:
        return paired(stored, written)
    except CheckpointError as error:
        raise CheckpointError(
            stored.path, error.reason, error.mismatch, mend=f"\n{_MEND}"
        ) from error


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
        )
    if tables:
        source, target = (
            relaid(reader.path, reader.tensors(), reader.spell(by_layout[_flax(reader)]))
            for reader in (stored, written)
        )
        source = source if dtype is None else cast(source, dtype, stored.path)
        return _Pairing(source, target, "by the given mappings")
    source, target = _cast(stored, dtype), written.tensors()
    names, others = _by_name(source, target.layout), _by_name(target, source.layout)
    if names.keys() != others.keys() and stored.mapping and written.mapping:
        raise CheckpointError(
            written.path,
            f"and {shown(stored.path)} have different names; that their own mappings would pair "
            "them proves nothing",
            mend="give --map twice, one mapping from torch to each",
        )
    return _Pairing(source, target, "by their names")


def _flax(reader: Reader) -> str:
    return "linen" if reader.layout == "linen" else "nnx"


def _compared(
    stored: Reader,
    written: Reader,
    pairing: _Pairing,
    ignore: Sequence[str],
    progress: Progress,
) -> Comparison:
    def is_ignored(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in ignore)

    differences, tensors, nbytes = _differences(pairing.source, pairing.target, progress)
    only_here = "has no counterpart; if that is right, say --ignore {}"
    table = pairing.table
    left = () if table is None else table.left
    accepted = {"/".join(map(str, item.path)) if item.path else item.torch_key for item in left}
    differences = [
        difference
        for difference in differences
        if not difference.what.startswith("is only in")
        or not (difference.name in accepted or is_ignored(difference.name))
    ]
    differences += [
        Difference(item.torch_key, only_here.format(shown(item.torch_key)))
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
    claims = {_words(path): row for path, row in reader.mapping.by_path.items()}
    differences = []
    for path, row in table.by_path.items():
        claim = claims.get(_words(path))
        if claim is not None and _rule(claim) != _rule(row):
            what = f"{shown(reader.path)} claims {_rule_text(claim)}; it is {_rule_text(row)}"
            differences.append(Difference(row.place, what))
    return differences


def _words(path: KeyPath) -> tuple[str, ...]:
    return tuple(map(str, path))


def _rule(row: Row) -> tuple[object, ...]:
    return row.torch_key, row.layout, row.part or (0, 1), row.plus


def _rule_text(row: Row) -> str:
    part = f", part {row.part[0] + 1} of {row.part[1]}" if row.part else ""
    plus = f" + {shown(row.plus)}" if row.plus else ""
    return f"{shown(row.torch_key)}{plus} ({row.layout}{part})"


def _differences(
    source: Tensors, target: Tensors, progress: Progress
) -> tuple[list[Difference], int, int]:
    """Return the differences, and the number and the bytes of the tensors that both have."""
    source_paths = _by_name(source, target.layout)
    target_paths = _by_name(target, source.layout)
    differences = [
        Difference("/".join(name), "is only in the source")
        for name in source_paths
        if name not in target_paths
    ]
    differences += [
        Difference("/".join(name), "is only in the target")
        for name in target_paths
        if name not in source_paths
    ]
    both = [name for name in target_paths if name in source_paths]
    total, done = sum(target.specs[target_paths[name]].nbytes for name in both), 0
    for name in both:
        spec, other = source.specs[source_paths[name]], target.specs[target_paths[name]]
        if spec != other:
            description = (
                f"is {spec.dtype} {spec.shape} in the source, "
                f"{other.dtype} {other.shape} in the target"
            )
            differences.append(Difference("/".join(name), description))
            continue
        array = whole(target, target_paths[name])
        if differing := _differing_bytes(source.pieces(source_paths[name]), array):
            differences.append(
                Difference(
                    "/".join(name), f"differs in {differing:,} of its {array.nbytes:,} bytes"
                )
            )
        done += array.nbytes
        progress(done, total)
    tied = {_words(path) for path in source.aliases} ^ {_words(path) for path in target.aliases}
    if source.layout == "torch":
        differences += [
            Difference("/".join(name), "is tied on one side only") for name in sorted(tied)
        ]
    return differences, len(both), total


def _by_name(tensors: Tensors, other: FileLayout) -> dict[tuple[str, ...], KeyPath]:
    """Return the paths by name; Linen's names lose the collection if the other side is NNX."""
    names = {_words(path): path for path in tensors.specs}
    if (tensors.layout, other) != ("linen", "nnx"):
        return names
    shorter = {name[1:]: path for name, path in names.items()}
    return shorter if len(shorter) == len(names) else names


def _differing_bytes(pieces: Iterable[np.ndarray], array: np.ndarray) -> int:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    begin, differing = 0, 0
    for piece in pieces:
        for block in blocks(piece):
            differing += int((block != flat[begin : begin + block.nbytes]).sum())
            begin += block.nbytes
    return differing
