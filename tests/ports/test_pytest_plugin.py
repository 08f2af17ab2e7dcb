"""The fixture `check_port` in somebody's tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
from tests.ports.blocks import LinenBlock, inputs, torch_block


def test_right(check_port):
    assert check_port(torch_block(), LinenBlock(), inputs(), dtypes=()).held


def test_wrong(check_port):
    check_port(torch_block(), LinenBlock(approximate=True), inputs(), dtypes=())


def test_something_else(pytestconfig):
    import sys
    assert not {"torch", "jax", "flax"} & sys.modules.keys()
"""


def run(*arguments: str, folder: Path) -> tuple[int, str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "-m", "pytest", "-p", "compare.ports.pytest_plugin", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_wrong_port_fails_with_its_lines_and_leaves_a_page(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(TESTS, encoding="utf-8")
    code, printed = run("-m", "port", "--port-report", "reports", folder=tmp_path)
    assert code == 1, printed
    assert "1 failed, 1 passed, 1 deselected" in printed
    assert "The outputs part first here:" in printed
    assert "linen.gelu(hidden, approximate=self.approximate)" in printed
    names = sorted(path.name for path in (tmp_path / "reports").iterdir())
    assert names == [
        f"test_mine.py_{test}.{suffix}"
        for test in ("test_right", "test_wrong")
        for suffix in ("html", "json")
    ]
    report = json.loads((tmp_path / "reports" / "test_mine.py_test_wrong.json").read_text())
    assert report["held"] is False
    assert "linen.gelu" in report["divergence"]["flax_source"][0]["code"]
    assert "linen.gelu" in (tmp_path / "reports" / "test_mine.py_test_wrong.html").read_text()


def test_no_framework_is_imported_before_a_port_is_checked(tmp_path: Path) -> None:
    text = TESTS.replace("from tests.ports.blocks import LinenBlock, inputs, torch_block\n", "")
    (tmp_path / "test_mine.py").write_text(text, encoding="utf-8")
    code, printed = run("-k", "something_else", folder=tmp_path)
    assert code == 0, printed
