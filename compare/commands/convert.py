"""Convert a checkpoint to another format, layout or dtype, and compare the result bit for bit."""

from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.convert import Conversion, Line, Wanted, convert_checkpoint
from ..checkpoint.transforms import Progress, silent
from ..checkpoint.verify import Difference, verify_checkpoint
from ..conversion.mapping import StateMapping
from ..report.model import Block, Cell, Check, Section, Table


def sections(
    source: Path,
    target: Path,
    mapping: Path | None = None,
    like: Path | None = None,
    layout: Wanted | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    dry_run: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Iterator[Section | str]:
    """Yield progress messages, then one section with the table of tensors and the comparison."""
    table = StateMapping.load(mapping) if mapping else None
    yield f"converting {source}"
    conversion = convert_checkpoint(
        source,
        target,
        mapping=table,
        like=like,
        layout=layout,
        dtype=dtype,
        shard_bytes=shard_bytes,
        dry_run=dry_run,
        progress=progress,
    )
    section = _section(source, target, conversion, dry_run)
    if not dry_run and verify:
        yield f"comparing {target}"
        differences = verify_checkpoint(
            source, target, mapping=table, dtype=dtype, progress=progress
        )
        if dtype is not None:
            section.blocks.append(f"The comparison is with the source cast to {dtype}.")
        section.checks.append(
            comparison_check(differences, len(conversion.lines), conversion.nbytes)
        )
    yield section


def _section(source: Path, target: Path, conversion: Conversion, dry_run: bool) -> Section:
    rows: list[list[Cell]] = [_row(line) for line in conversion.lines]
    tensors = f"{len(conversion.lines)} tensors"
    verb = "would become" if dry_run else "became"
    blocks: list[Block] = [
        Table(["from", "to", "kind", "shape", "dtype", "layout"], rows),
        f"{source} {verb} {target}: {tensors}, {conversion.nbytes:,} bytes.",
    ]
    blocks += [
        f"{item.torch_key} has no counterpart in the target and is left out ({item.policy})."
        for item in conversion.left
    ]
    if not conversion.checked:
        blocks.append(
            "The source has no manifest, so it is not known whether its values are those that were "
            "saved."
        )
    section = Section("Conversion", blocks)
    if not dry_run:
        section.checks.append(Check("written", "all", True, tensors, "every tensor of the source"))
    return section


def _row(line: Line) -> list[Cell]:
    shape = "x".join(map(str, line.shape)) or "scalar"
    return [line.source, line.target, line.kind, shape, line.dtype, line.layout]


def comparison_check(differences: list[Difference], tensors: int, nbytes: int) -> Check:
    """Return the check that every element is the same on both sides."""
    if differences:
        measured = f"{len(differences)} differ; {differences[0].name} {differences[0].what}"
    else:
        measured = f"{tensors} tensors, {nbytes:,} bytes"
    return Check(
        "every element, bit for bit",
        "all",
        not differences,
        measured,
        "the same names, shapes, dtypes and bits",
    )
