"""The learners' notebook runs and prints the outputs that are stored in it."""

from pathlib import Path
from typing import Any

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "compare/notebooks/buffers_in_two_frameworks.ipynb"


def printed(cell: Any) -> str:
    """The text that a code cell shows, with its streams joined as a front end joins them."""
    return "".join(
        output.get("text") or output.get("data", {}).get("text/plain", "") + "\n"
        for output in cell.outputs
    )


# The kernel's own libraries warn about their transport and their event loop.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_it_prints_what_it_is_stored_with(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel must take no GPU memory from the suite.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        fresh, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    for before, after in zip(stored.cells, fresh.cells, strict=True):
        if before.cell_type == "code":
            assert before.outputs or before is stored.cells[1]
            assert printed(after) == printed(before), before.source
            assert all(output.get("name") != "stderr" for output in after.outputs), before.source
