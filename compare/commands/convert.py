"""Carry a checkpoint into another format, layout or dtype, show the table, and compare what was written."""

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
    """Yield one section with the table of tensors and what was compared; before, what is being done."""
    table = StateMapping.load(mapping) if mapping else None
    yield f"converting {source}"
    done = convert_checkpoint(
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
    section = _section(source, target, done, dry_run)
    if not dry_run and verify:
        yield f"comparing {target}"
        differences = verify_checkpoint(
            source, target, mapping=table, dtype=dtype, progress=progress
        )
        section.checks.append(compared(differences, len(done.lines), done.nbytes))
    yield section


def _section(source: Path, target: Path, done: Conversion, dry_run: bool) -> Section:
    rows: list[list[Cell]] = [_row(line) for line in done.lines]
    verb = "would become" if dry_run else "became"
    words = f"{source} {verb} {target}: {len(done.lines)} tensors, {done.nbytes:,} bytes."
    left = [
        f"{item.torch_key} has no place on the other side and is left ({item.policy})."
        for item in done.left
    ]
    unverified = (
        "The source has no manifest: whether its values are those that were saved is not known."
    )
    blocks: list[Block] = [Table(["from", "to", "kind", "shape", "dtype", "layout"], rows), words]
    section = Section("Conversion", [*blocks, *left, *([] if done.checked else [unverified])])
    if not dry_run:
        section.checks.append(
            Check(
                "written", "all", True, f"{len(done.lines)} tensors", "every tensor of the source"
            )
        )
    return section


def _row(line: Line) -> list[Cell]:
    shape = "x".join(map(str, line.shape)) or "scalar"
    return [line.source, line.target, line.kind, shape, line.dtype, line.layout]


def compared(differences: list[Difference], tensors: int, nbytes: int) -> Check:
    """Return the check that every element is the same on both sides."""
    first = (
        f"{len(differences)} differ; {differences[0].name} {differences[0].what}"
        if differences
        else ""
    )
    return Check(
        "every element, bit for bit",
        "all",
        not differences,
        first or f"{tensors} tensors, {nbytes:,} bytes",
        "the same names, shapes, dtypes and bits",
    )
