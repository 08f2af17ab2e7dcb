"""What took too long to be run each time, from the records: the planted bugs, with the day and the versions."""

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from ..report.model import Grid, Section


def sections() -> Iterator[Section]:
    """Yield the recorded campaign of planted bugs; it settles nothing of this run."""
    record: dict[str, Any] = json.loads(files("compare").joinpath("records/mutants-cpu.json").read_text("utf-8"))
    *_, campaign = record["sections"]
    words = [block for block in campaign["blocks"] if isinstance(block, str)]
    (grid,) = [block for block in campaign["blocks"] if isinstance(block, dict) and isinstance(block["rows"], dict)]
    rows = {name: [float(value) if value is not None else None for value in row] for name, row in grid["rows"].items()}
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    yield Section(
        f"Recorded: {campaign['title']}",
        [
            f"`python -m {record['command']}` on {record['date'][:10]}, on the CPU, with {versions}; not run now.",
            words[-1],
            Grid(grid["title"], grid["columns"], rows),
        ],
    )
