"""Convert a checkpoint to another format, layout or dtype, and compare the result bit for bit."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.convert import Conversion, Line, Wanted, convert_checkpoint
from ..checkpoint.transforms import Progress, silent
from ..checkpoint.verify import compare_checkpoints
from ..conversion.mapping import StateMapping
from ..files.printable import shown
from ..report.model import Block, Cell, Check, Section, Table
from .match import mapping_of
from .verify import comparison_check


def sections(
    source: Path,
    target: str,
    mapping: Path | None = None,
    like: Path | None = None,
    select: Sequence[str] = (),
    layouts: Mapping[str, str] | None = None,
    rules: Mapping[str, Any] | None = None,
    layout: Wanted | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    dry_run: bool = False,
    verify: bool = True,
    memory: int | None = None,
    progress: Progress = silent,
) -> Iterator[Section | str]:
    """Yield progress messages, then one section with the table of tensors and the comparison."""
    yield f"converting {source}"
    pairing = _pairing(mapping, like)
    table = StateMapping.load(mapping, memory) if mapping else None
    if rules and like is not None:
        table = mapping_of(str(source), str(like), {**rules, "layouts": layouts}, select, memory)
        like = layouts = None
    conversion = convert_checkpoint(
        source,
        target,
        mapping=table,
        like=like,
        select=select,
        layouts=layouts,
        layout=layout,
        dtype=dtype,
        shard_bytes=shard_bytes,
        dry_run=dry_run,
        memory=memory,
        progress=progress,
    )
    section = _section(source, target, conversion, dry_run)
    if conversion.mapping is not None:
        section.blocks.append(f"The tensors were paired {pairing}.")
    if not dry_run and verify:
        yield f"comparing {target}"
        comparison = compare_checkpoints(
            source,
            target,
            mapping=conversion.mapping,
            select=select,
            dtype=dtype,
            memory=memory,
            progress=progress,
        )
        if dtype is not None:
            section.blocks.append(f"The comparison is with the source cast to {dtype}.")
        section.checks.append(comparison_check(comparison))
    yield section


def _pairing(mapping: Path | None, like: Path | None) -> str:
    if mapping is not None:
        return f"by the mapping {mapping}"
    if like is not None:
        return f"with those of {like}"
    return "as the source says, or as the attention classes are named; the table shows every pair"


def _section(source: Path, target: str, conversion: Conversion, dry_run: bool) -> Section:
    rows: list[list[Cell]] = [_row(line) for line in conversion.lines]
    tensors = f"{len(conversion.lines)} tensors"
    verb = "would become" if dry_run else "became"
    blocks: list[Block] = [
        Table(["from", "to", "kind", "shape", "dtype", "layout"], rows),
        f"{source} {verb} {target}: {tensors}, {conversion.nbytes:,} bytes.",
    ]
    blocks += [
        f"{item.torch_key} exists on one side only and is left out ({item.policy})."
        for item in conversion.left
    ]
    if conversion.left_out:
        blocks.append(f"Left out: {', '.join(map(shown, conversion.left_out))}.")
    if not conversion.checked:
        blocks.append(
            "The source has no manifest, so it is not known whether its values are those that were "
            "saved."
        )
    section = Section("Conversion", blocks)
    if not dry_run:
        held = True if conversion.lines else None
        section.checks.append(Check("written", "all", held, tensors, "every tensor of the source"))
    return section


def _row(line: Line) -> list[Cell]:
    shape = "x".join(map(str, line.shape)) or "scalar"
    return [line.source, line.target, line.kind, shape, line.dtype, line.layout]
