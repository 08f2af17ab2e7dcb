"""Compare two checkpoints of the same state, in whatever formats and layouts, bit for bit."""

from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.formats import open_checkpoint
from ..checkpoint.transforms import Progress, silent
from ..checkpoint.verify import verify_checkpoint
from ..conversion.mapping import StateMapping
from ..report.model import Section, Table
from .convert import compared


def sections(
    source: Path,
    target: Path,
    mapping: Path | None = None,
    dtype: str | None = None,
    progress: Progress = silent,
) -> Iterator[Section | str]:
    """Yield one section with the differences; before, what is being done."""
    yield f"comparing {source} and {target}"
    table = StateMapping.load(mapping) if mapping else None
    found = verify_checkpoint(source, target, mapping=table, dtype=dtype, progress=progress)
    with open_checkpoint(target) as written:
        nbytes = sum(spec.nbytes for spec in written.specs.values())
        section = Section(
            f"{source} and {target}", checks=[compared(found, len(written.specs), nbytes)]
        )
    if found:
        section.blocks.append(
            Table(["name", "difference"], [[entry.name, entry.what] for entry in found])
        )
    yield section
