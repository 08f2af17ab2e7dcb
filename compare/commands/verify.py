"""Compare two checkpoints of the same state bit for bit, in any formats and layouts."""

from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.formats import open_checkpoint
from ..checkpoint.transforms import Progress, silent
from ..checkpoint.verify import verify_checkpoint
from ..conversion.mapping import StateMapping
from ..report.model import Section, Table
from .convert import comparison_check


def sections(
    source: Path,
    target: Path,
    mapping: Path | None = None,
    dtype: str | None = None,
    progress: Progress = silent,
) -> Iterator[Section | str]:
    """Yield a progress message, then one section with the differences."""
    yield f"comparing {source} and {target}"
    table = StateMapping.load(mapping) if mapping else None
    differences = verify_checkpoint(source, target, mapping=table, dtype=dtype, progress=progress)
    with open_checkpoint(target) as stored:
        tensors = len(stored.specs)
        nbytes = sum(spec.nbytes for spec in stored.specs.values())
    section = Section(f"{source} and {target}")
    section.checks.append(comparison_check(differences, tensors, nbytes))
    if not differences:
        cast = f", after the cast to {dtype}" if dtype else ""
        section.blocks.append(f"All {tensors} tensors are the same, bit for bit{cast}.")
    else:
        rows = [[difference.name, difference.what] for difference in differences]
        section.blocks.append(Table(["name", "difference"], rows))
    yield section
