"""Compare two checkpoints of the same state bit for bit, in any formats and layouts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.transforms import Progress, silent
from ..checkpoint.verify import Comparison, compare_checkpoints
from ..conversion.mapping import StateMapping
from ..report.model import Block, Cell, Check, Section, Table
from .match import mapping_of


def sections(
    source: Path,
    target: Path,
    mapping: Sequence[Path] = (),
    like: Path | None = None,
    select: Sequence[str] = (),
    layouts: Mapping[str, str] | None = None,
    rules: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    ignore: Sequence[str] = (),
    tolerance: float | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> Iterator[Section | str]:
    """Yield a progress message, then one section with the differences."""
    yield f"comparing {source} and {target}"
    mappings = [StateMapping.load(file, memory) for file in mapping]
    if rules:
        every = {**rules, "layouts": layouts}
        mappings = [mapping_of(str(source), str(like or target), every, select, memory)]
        like = layouts = None
    comparison = compare_checkpoints(
        source,
        target,
        mapping=mappings,
        like=like,
        select=select,
        layouts=layouts,
        dtype=dtype,
        ignore=ignore,
        tolerance=tolerance,
        memory=memory,
        progress=progress,
    )
    section = Section(f"{source} and {target}", described(comparison))
    section.checks.append(comparison_check(comparison, tolerance))
    if not comparison.differences and comparison.tensors and tolerance is None:
        cast = f", after the cast to {dtype}" if dtype else ""
        section.blocks.append(f"All {comparison.tensors} tensors are the same, bit for bit{cast}.")
    elif not comparison.differences and comparison.tensors:
        section.blocks.append(
            f"All {comparison.tensors} tensors have the same names, shapes and dtypes. Floating "
            f"entries are within {tolerance:g} of the largest of their tensor; buffers and other "
            "tensors are the same, bit for bit."
        )
    elif comparison.differences:
        rows: list[list[Cell]] = [
            [difference.name, difference.what] for difference in comparison.differences
        ]
        section.blocks.append(Table(["name", "difference"], rows))
    yield section


def described(comparison: Comparison) -> list[Block]:
    """Say how the names were paired, and which files claim a pairing of their own."""
    blocks: list[Block] = [f"The tensors were paired {comparison.pairing}."]
    if comparison.claims:
        files = " and ".join(comparison.claims)
        blocks.append(
            f"The mapping in {files} did not decide this: it was compared with that pairing."
        )
    return blocks


def comparison_check(comparison: Comparison, tolerance: float | None = None) -> Check:
    """Return the check that every element is the same on both sides, or within the tolerance."""
    differences = comparison.differences
    if differences:
        measured = f"{len(differences)} differ; {differences[0].name} {differences[0].what}"
    elif comparison.tensors:
        measured = f"{comparison.tensors} tensors, {comparison.nbytes:,} bytes"
    else:
        measured = "there are no tensors"
    return Check(
        "every element, bit for bit" if tolerance is None else "every element",
        "all",
        None if not differences and not comparison.tensors else not differences,
        measured,
        "the same names, shapes, dtypes and bits"
        if tolerance is None
        else f"floating entries within {tolerance:g} of the largest of their tensor; else the same",
    )
