"""The import contracts of `pyproject.toml` hold, and an import that breaks one is reported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")

ROOT = Path(__file__).parent.parent
PACKAGES = ("compare", "flax_impl", "torch_impl")
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def copy_packages(folder: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package,
            folder / package,
            ignore=shutil.ignore_patterns("records", "__pycache__"),
        )
    shutil.copy(ROOT / "pyproject.toml", folder)


def test_the_contracts_hold() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("compare/conversion/tensors.py", "from .. import checkpoint", "compare has floors"),
        ("compare/report/model.py", "from ..runners import run", "compare has floors"),
        (
            "compare/files/reading.py",
            "def late() -> None:\n    from .commands import jobs",
            "compare has floors",
        ),
        ("compare/proof/agreement.py", "import torch", "the proof needs no framework"),
        ("torch_impl/attention.py", "import jax", "torch_impl stands alone"),
        ("flax_impl/attention.py", "import torch_impl", "flax_impl stands alone"),
    ],
)
def test_an_import_against_them_is_seen(
    module: str, line: str, contract: str, tmp_path: Path
) -> None:
    copy_packages(tmp_path)
    with (tmp_path / module).open("a") as stream:
        stream.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout
    assert f"{contract} BROKEN" in done.stdout


def test_a_new_room_needs_a_floor(tmp_path: Path) -> None:
    """A package of `compare` that no layer names breaks the contract."""
    copy_packages(tmp_path)
    (tmp_path / "compare/attic.py").write_text("")
    assert "attic" in lint(tmp_path).stdout
