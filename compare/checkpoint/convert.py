"""Convert a checkpoint to another format, layout or dtype, tensor by tensor."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Literal

from ..conversion.arguments import require_callback, require_flags
from ..conversion.errors import Mismatch
from ..conversion.mapping import LINEN, NNX, KeyPath, Left, StateMapping, require_mapping, slashed
from ..conversion.match import pair
from ..files import writing
from ..files.memory import collector_paused
from ..files.printable import shown
from ..files.reading import as_path
from .errors import CheckpointError, naming
from .formats import KNOWN, exists, format_of, shards
from .load import named, side_of, steady
from .reader import Reader
from .save import require_folder, writable, write
from .tensors import FileLayout, Spec, Tensors
from .transforms import Progress, cast, relaid, silent, watched

Wanted = Literal["torch", "flax"]
_MEND = (
    "give --map FILE, or --like a checkpoint of the other framework; "
    "in Python, pass mapping=compare.match(...)"
)


@dataclass(frozen=True)
class Line:
    """One converted tensor: its names on both sides, its kind, shape, dtype, layout and size."""

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
        lines: one line for each tensor.
        checked: whether the source has checksums for its values.
        mapping: how the names were paired, if the layout changed.
        left_out: the names of what the source holds beside the state.
    """

    lines: list[Line]
    checked: bool
    mapping: StateMapping | None = None
    left_out: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[Left, ...]:
        """The entries without a counterpart on the other side, which are left out."""
        made = {line.target for line in self.lines}
        left = self.mapping.left if self.mapping is not None else ()
        return tuple(item for item in left if item.torch_key not in made)

    @property
    def nbytes(self) -> int:
        """The size of the target's values in bytes."""
        return sum(line.nbytes for line in self.lines)


def convert_checkpoint(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    mapping: StateMapping | None = None,
    like: str | PathLike[str] | None = None,
    select: str | Sequence[str] = (),
    layouts: Mapping[str, str] | None = None,
    layout: Wanted | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    dry_run: bool = False,
    memory: int | None = None,
    progress: Progress = silent,
) -> Conversion:
    """Write the content of the source to the target. The target's suffix selects the format.

    Safetensors, sharded or not, and Orbax folders are read and written tensor by tensor.

    Args:
        source: the file or folder to read.
        target: the file or folder to write, atomically.
        mapping: how torch and Flax names pair, if the layout changes. Default: the mapping in the
            source's manifest. The attention classes need none.
        like: a checkpoint of the other framework; its names and shapes are matched with the
            source's to get the mapping.
        select: the part of the source that holds the state, if a training program wrote more: names
            joined by slashes, or several for Flax, as ("params", "batch_stats").
        layouts: how tensors are laid out whose layout neither side shows, as `compare.match` takes
            them. Needs names that are matched: `like`.
        layout: the layout of a safetensors target. Default: the layout of the source.
        dtype: the dtype that floating tensors, except buffers, are cast to. Refused if a finite
            number would become infinite.
        shard_bytes: write a folder of safetensors files with an index. Each holds tensors of at
            most this size together, or one larger tensor; its header comes on top.
        dry_run: only return what would be done.
        memory: the most bytes that what is read and held at once may take. Default: the memory that
            is free.
        progress: called with the bytes done and the total bytes.

    Raises:
        CheckpointError: the source cannot be read or does not fit the mapping, an argument has no
            effect, or the target cannot be written. The target is then unchanged.
    """
    require_mapping(mapping)
    require_flags(dry_run=dry_run)
    require_callback(progress)
    source, path = as_path(source), as_path(target)
    if shard_bytes is not None and (type(shard_bytes) is not int or shard_bytes < 1):
        raise CheckpointError(
            path,
            f"shard_bytes={shard_bytes!r} is no size",
            expected="a whole number of bytes, at least 1",
            found=repr(shard_bytes),
            mend="give one, as 2_000_000_000",
            is_usage=True,
        )
    if str(target).endswith("/") and not path.is_dir():
        raise CheckpointError(
            target,
            "ends with a slash, and is not a folder yet",
            expected="a name",
            found="a slash at its end",
            mend="leave the slash out",
            is_usage=True,
        )
    chosen = format_of(path) if shard_bytes is None else None
    allowed = chosen.layouts if chosen else ("torch", "linen", "nnx")
    known = list(dict.fromkeys(map(_torch_or_flax, allowed)))
    if layout is not None and layout not in known:
        names = " or ".join(map(repr, known))
        raise CheckpointError(
            path,
            f"layout={layout!r}: {path.suffix or 'an Orbax folder'} holds the layout {names}",
            expected=f"layout={names}, or none",
            found=f"layout={layout!r}",
            mend=f"leave layout (--layout) out, or give {names}",
            is_usage=True,
        )
    if mapping is not None and like is not None:
        raise CheckpointError(
            path,
            "like has no effect beside mapping",
            expected="one of them",
            found="both",
            mend="leave mapping or like out",
            is_usage=True,
        )
    if layouts and like is None:
        raise CheckpointError(
            path,
            "layouts has no effect without like: no names are matched",
            expected="like (--like)",
            found="layouts (--layout-of)",
            mend="give like, or leave layouts out",
            is_usage=True,
        )
    resolved = writable(path, chosen) if chosen else _folder(path)
    other = None if like is None else as_path(like)
    others = [] if other is None else [other, *shards.files_in(other)]
    require_apart(path, resolved, [source, *others])

    def work(stored: Reader) -> Conversion:
        is_relaid = _target_layout(stored, allowed, layout) != _torch_or_flax(stored.layout)
        for argument, value in (("mapping (--map)", mapping), ("like (--like)", like)):
            if value is not None and not is_relaid:
                raise CheckpointError(
                    path,
                    f"{argument} has no effect: source and target both have "
                    f"the {_torch_or_flax(stored.layout)} layout",
                    expected="no mapping",
                    found=argument,
                    mend="leave it out",
                    is_usage=True,
                )
        tensors, lines = planned(
            stored,
            allowed,
            mapping=mapping,
            like=like,
            layouts=layouts,
            layout=layout,
            dtype=dtype,
        )
        if not dry_run:
            require_apart(path, resolved, stored.snapshot.states)
            if chosen is not None and chosen.holds_all:
                nbytes = sum(spec.nbytes for spec in tensors.specs.values())
                with naming(path):
                    stored.budget.require(nbytes, path, f"a {path.suffix} file as a whole")
            stored.require_copies(tensors)
            counted = watched(tensors, progress)
            if chosen is not None:
                write(path, resolved, chosen, counted, stored.require_current)
            else:
                assert shard_bytes is not None
                write_shards = partial(shards.write, shard_bytes=shard_bytes)
                sharded = format_of("x.safetensors")._replace(write=write_shards, open=shards.open_)
                write(path, resolved, sharded, counted, stored.require_current)
        used = tensors.mapping if is_relaid else None
        return Conversion(lines, stored.checked, used, stored.left_out)

    return steady(source, work, memory, select=select, is_settled=not dry_run)


def require_apart(path: Path, target: Path, inputs: Iterable[Path]) -> None:
    """Raise CheckpointError if writing the target would change an input."""
    with naming(path):
        writing.require_apart(target, inputs, path)


def planned(
    stored: Reader,
    allowed: Iterable[str],
    *,
    mapping: StateMapping | None = None,
    like: str | PathLike[str] | None = None,
    layouts: Mapping[str, str] | None = None,
    layout: Wanted | None = None,
    dtype: str | None = None,
) -> tuple[Tensors, list[Line]]:
    """Return the tensors in the target's layout and dtype, and a line for each.

    Raises:
        CheckpointError: there is no mapping, or the source does not fit it.
    """
    if _target_layout(stored, tuple(allowed), layout) != _torch_or_flax(stored.layout):
        table = stored.spell(_mapping(stored, mapping, like, layouts))
        in_layout = relaid(stored.path, stored.tensors(), table)
    else:
        in_layout = stored.tensors()
    tensors = in_layout if dtype is None else cast(in_layout, dtype, stored.path)
    is_relaid = in_layout.layout != stored.layout
    lines = [
        _line(path, spec, tensors, in_layout.specs[path].dtype, is_relaid)
        for path, spec in tensors.specs.items()
    ]
    return tensors, lines


def _torch_or_flax(layout: str) -> Wanted:
    return "torch" if layout == "torch" else "flax"


def _target_layout(stored: Reader, allowed: tuple[str, ...], layout: Wanted | None) -> Wanted:
    """Return the wanted layout, or else the source's, or else the only one that is allowed."""
    wanted = layout or _torch_or_flax(stored.layout)
    if wanted == "torch" and "torch" not in allowed:
        return "flax"
    return "torch" if allowed == ("torch",) else wanted


def _mapping(
    stored: Reader,
    mapping: StateMapping | None,
    like: str | PathLike[str] | None,
    layouts: Mapping[str, str] | None,
) -> StateMapping:
    table = mapping or (
        matched(stored, like, layouts=layouts) if like is not None else stored.mapping
    )
    if table is not None:
        return table
    attention = LINEN if stored.layout in ("torch", "linen") else NNX
    if stored.layout == "torch":
        known = {(key,) for key in attention.by_key}
    else:
        known = set(attention.by_path)
    if stored.specs.keys() <= known:
        return attention
    raise CheckpointError(
        stored.path,
        "does not say how its names pair with the other framework's",
        expected="a mapping in it, or the names of the attention classes",
        found="neither",
        mend=_MEND,
        is_usage=True,
    )


def matched(
    stored: Reader,
    like: str | PathLike[str],
    layout: FileLayout | None = None,
    layouts: Mapping[str, str] | None = None,
) -> StateMapping:
    """Return how the names of a checkpoint pair with those of `like`.

    Args:
        stored: the checkpoint.
        like: a checkpoint of the other framework, or one whose mapping names every tensor.
        layout: the layout that the mapping must lead to, if it is known.
        layouts: how tensors are laid out. The mapping of `like` is then not asked.
    """

    def work(other: Reader) -> StateMapping:
        carried = other.mapping
        is_for_it = carried is not None and layout in (None, carried.flax)
        if carried is not None and is_for_it and not layouts and _has_names_of(carried, stored):
            return carried
        if (other.layout == "torch") == (stored.layout == "torch"):
            raise CheckpointError(
                like,
                f"has the {other.layout} layout, as the source has",
                expected="a checkpoint of the other framework",
                found=other.layout,
                mend="give a checkpoint of the other framework",
                is_usage=True,
            )
        return paired(stored, other, layouts=layouts)

    return steady(like, work, stored.budget.limit)


def paired(
    stored: Reader,
    other: Reader,
    mend: str = _MEND,
    layouts: Mapping[str, str] | None = None,
) -> StateMapping:
    """Return how the names of two checkpoints pair, as `compare.match` finds it.

    Args:
        stored: one checkpoint.
        other: one of the other framework.
        mend: what to do if they do not pair.
        layouts: how tensors are laid out whose layout neither side shows.

    Raises:
        CheckpointError: they do not pair.
    """
    table, mismatch = pairs(stored, other, layouts)
    if mismatch:
        raise CheckpointError.unfit(
            stored.path, f"does not pair with {shown(other.path)}", mismatch, mend
        )
    return table


def pairs(
    stored: Reader, other: Reader, layouts: Mapping[str, str] | None = None
) -> tuple[StateMapping, Mismatch]:
    """Return how the names of two checkpoints pair, and what does not."""
    torch, flax = (stored, other) if stored.layout == "torch" else (other, stored)
    with collector_paused():
        return pair(named(torch), side_of(flax), layouts=layouts)


def _has_names_of(mapping: StateMapping, stored: Reader) -> bool:
    """Return whether the mapping names every tensor of the checkpoint."""
    if stored.layout == "torch":
        return named(stored).keys() <= mapping.by_key.keys() | mapping.left_keys()
    return mapping.flax == stored.layout and stored.specs.keys() <= mapping.by_path.keys()


def _line(path: KeyPath, spec: Spec, tensors: Tensors, source_dtype: str, is_relaid: bool) -> Line:
    name = slashed(path)
    source, layout = name, "same"
    refills = tensors.mapping.refills if tensors.mapping is not None else {}
    if is_relaid and tensors.layout == "torch" and name in refills:
        source = "made again"
    elif is_relaid and tensors.mapping is not None:
        rows = (
            [tensors.mapping.by_path[path]]
            if tensors.layout != "torch"
            else tensors.mapping.by_key[name]
        )
        source = " + ".join(row.place if tensors.layout == "torch" else row.source for row in rows)
        layout = rows[0].layout
    dtype = spec.dtype if source_dtype == spec.dtype else f"{source_dtype} -> {spec.dtype}"
    return Line(
        source, name, tensors.kinds.get(path, "unknown"), spec.shape, dtype, layout, spec.nbytes
    )


def _folder(path: Path) -> Path:
    if path.name.endswith(shards.INDEX):
        raise CheckpointError(
            path,
            "would be a folder of shards, but is named like an index",
            expected="a name without a suffix",
            found=shards.INDEX,
            mend="name it without a suffix",
            is_usage=True,
        )
    if path.suffix.lower() in KNOWN:
        raise CheckpointError(
            path,
            f"would be a folder of shards, but {path.suffix} is the suffix of another format",
            expected="a name without a suffix",
            found=path.suffix,
            mend="name it without a suffix",
            is_usage=True,
        )
    if exists(path) and not path.is_dir():
        raise CheckpointError(
            path,
            "is not a folder, which shards need",
            expected="a folder",
            found="something else",
            mend="choose another name",
            is_usage=True,
        )
    target = path.resolve()
    require_folder(path, target.parent)
    return target
