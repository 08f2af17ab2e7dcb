"""One checkpoint into another format, layout or dtype, tensor by tensor."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from ..conversion.errors import ConversionError
from ..conversion.mapping import LINEN, NNX, KeyPath, Left, StateMapping, slashed
from ..conversion.match import match
from .errors import CheckpointError
from .formats import KNOWN, exists, format_of, open_checkpoint, shards
from .load import named, side_of, steady
from .reader import Reader
from .save import writable, write
from .tensors import Spec, Tensors
from .transforms import Progress, cast, relaid, silent, watched

Wanted = Literal["torch", "flax"]
_MEND = "give --map FILE, or --like a checkpoint of the other framework's; in Python mapping=compare.match(...)"


@dataclass(frozen=True)
class Line:
    """One tensor on its way: its name on both sides, shape and dtype, and what changes."""

    source: str
    target: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    nbytes: int


@dataclass(frozen=True)
class Conversion:
    """What a conversion did, or would do.

    Attributes:
        lines: one for each tensor.
        checked: whether the source's values could be.
        left: what has no place on the other side.
    """

    lines: list[Line]
    checked: bool
    left: tuple[Left, ...] = ()

    @property
    def nbytes(self) -> int:
        """How many bytes the target's values take."""
        return sum(line.nbytes for line in self.lines)


def convert_checkpoint(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    mapping: StateMapping | None = None,
    like: str | PathLike[str] | None = None,
    layout: Wanted | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Write what the source holds into the target, whose suffix names the format.

    Sharded and single safetensors, and Orbax folders, are read and written tensor by tensor.

    Args:
        source: the file or folder to read.
        target: the file or folder to write, atomically.
        mapping: how torch and Flax names pair, where the layout changes; without, what the source
            says, or what pairs with `like`. The attention classes need none.
        like: a checkpoint of the other framework's, whose names and shapes are matched.
        layout: of a safetensors target: without, that of the source.
        dtype: what floating tensors but masks are cast to. Refused if a finite number would become
            infinite.
        shard_bytes: write a folder of safetensors files of at most that size, with an index.
        dry_run: only find out what would be done.
        progress: is called with the bytes done and the bytes in all.

    Raises:
        CheckpointError: the source cannot be read, does not fit the mapping, or the target cannot
            be written. The target is then as it was.
    """
    path = Path(target)
    chosen = format_of(path) if shard_bytes is None else None
    allowed = chosen.layouts if chosen else ("torch", "linen", "nnx")
    resolved = writable(path, chosen) if chosen else _folder(path)
    read = Path(source)
    if exists(read) and (resolved == read.resolve() or resolved in read.resolve().parents):
        raise CheckpointError(
            path, "is what is to be read, or holds it: write beside it, then rename"
        )

    def work(stored: Reader) -> Conversion:
        tensors, lines = planned(
            stored, allowed, mapping=mapping, like=like, layout=layout, dtype=dtype
        )
        if not dry_run:
            counted = watched(tensors, progress)
            if chosen is not None:
                write(path, resolved, chosen, counted)
            else:
                assert shard_bytes is not None
                put = partial(shards.write, shard_bytes=shard_bytes)
                write(path, resolved, format_of("x.safetensors")._replace(write=put), counted)
        left = tensors.mapping.left if tensors.layout != stored.layout and tensors.mapping else ()
        return Conversion(lines, stored.checked, left)

    return steady(source, work)


def planned(
    stored: Reader,
    allowed: Iterable[str],
    *,
    mapping: StateMapping | None = None,
    like: str | PathLike[str] | None = None,
    beside: str | PathLike[str] | None = None,
    layout: Wanted | None = None,
    dtype: str | None = None,
) -> tuple[Tensors, list[Line]]:
    """Return the tensors as the target is to hold them, and a line for each; `beside` is matched if all else fails.

    Raises:
        CheckpointError: nothing says how, or the source does not fit.
    """
    allowed = tuple(allowed)
    wanted = layout or ("torch" if stored.layout == "torch" else "flax")
    if wanted == "torch" and "torch" not in allowed:
        wanted = "flax"
    if wanted == "flax" and allowed == ("torch",):
        wanted = "torch"
    if (wanted == "torch") != (stored.layout == "torch"):
        table = stored.spell(_mapping(stored, mapping, like, beside))
        laid = relaid(stored.path, stored.tensors(), table)
    else:
        laid = stored.tensors()
    tensors = laid if dtype is None else cast(laid, dtype, stored.path)
    is_relaid = laid.layout != stored.layout
    lines = [
        _line(path, spec, tensors, laid.specs[path].dtype, is_relaid)
        for path, spec in tensors.specs.items()
    ]
    return tensors, lines


def _mapping(
    stored: Reader,
    mapping: StateMapping | None,
    like: str | PathLike[str] | None,
    beside: str | PathLike[str] | None,
) -> StateMapping:
    table = mapping or (_matched(stored, like) if like is not None else stored.mapping)
    if table is not None:
        return table
    own = LINEN if stored.layout in ("torch", "linen") else NNX
    known = {(key,) for key in own.by_key} if stored.layout == "torch" else set(own.by_path)
    if stored.specs.keys() <= known:
        return own
    if beside is not None:
        return _matched(stored, beside)
    raise CheckpointError(
        stored.path, "does not say how its names and the other framework's pair", mend=_MEND
    )


def _matched(stored: Reader, like: str | PathLike[str]) -> StateMapping:
    with open_checkpoint(like) as other:
        if (other.layout == "torch") == (stored.layout == "torch"):
            raise CheckpointError(
                like,
                f"is in the layout of {other.layout}, as the source is: give one of the other's",
            )
        torch, flax = (stored, other) if stored.layout == "torch" else (other, stored)
        try:
            return match(named(torch), side_of(flax))
        except ConversionError as error:
            raise CheckpointError(
                stored.path, f"does not pair with {other.path}:\n{error.mismatch}", error.mismatch
            ) from error


def _line(path: KeyPath, spec: Spec, tensors: Tensors, source_dtype: str, is_relaid: bool) -> Line:
    name = slashed(path)
    source, how = name, "same"
    if is_relaid and tensors.mapping is not None:
        rows = (
            [tensors.mapping.by_path[path]]
            if tensors.layout != "torch"
            else tensors.mapping.by_key[name]
        )
        source = " + ".join(row.place if tensors.layout == "torch" else _keys(row) for row in rows)
        how = rows[0].layout
    dtype = spec.dtype if source_dtype == spec.dtype else f"{source_dtype} -> {spec.dtype}"
    return Line(
        source, name, tensors.kinds.get(path, "unknown"), spec.shape, dtype, how, spec.nbytes
    )


def _keys(row: Any) -> str:
    part = f"[{row.part[0]}/{row.part[1]}]" if row.part else ""
    return " + ".join(f"{key}{part}" for key in (row.torch_key, row.plus) if key)


def _folder(path: Path) -> Path:
    if path.suffix.lower() in KNOWN:
        raise CheckpointError(
            path,
            f"would be a folder of shards, and {path.suffix} says another format",
            mend="name it without suffix",
        )
    if exists(path) and not path.is_dir():
        raise CheckpointError(path, "is no folder, which shards need: choose another name")
    target = path.resolve()
    if not target.parent.is_dir():
        raise CheckpointError(path, f"the folder {target.parent} does not exist; make it first")
    return target
