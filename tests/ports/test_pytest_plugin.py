"""The fixture `check_port` in somebody's tests."""

import json
import os
import re
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


def again(script: Path) -> tuple[int, str]:
    """Run a script that was left in a folder of reports."""
    folder = script.parents[1]
    done = subprocess.run(
        [sys.executable, script],
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


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
        "replay_test_mine.py_test_wrong.py",
        "test_mine.py_test_right.html",
        "test_mine.py_test_right.json",
        "test_mine.py_test_wrong.html",
        "test_mine.py_test_wrong.json",
        "test_mine.py_test_wrong.safetensors",
    ]
    report = json.loads((tmp_path / "reports" / "test_mine.py_test_wrong.json").read_text())
    assert report["held"] is False
    assert "linen.gelu" in report["divergence"]["flax_source"][0]["code"]
    assert "linen.gelu" in (tmp_path / "reports" / "test_mine.py_test_wrong.html").read_text()
    code, printed = again(tmp_path / "reports" / "replay_test_mine.py_test_wrong.py")
    assert code == 1
    assert "1 failed" in printed and "linen.gelu(hidden" in printed


UNSEEDED = """
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen


class Flax(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        return jnp.maximum(linen.Dense(3, name="layer")(inputs), 0.0)


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, inputs):
        return self.layer(inputs)


def test_random(check_port):
    check_port(torch.nn.Linear(4, 3), linen.Dense(3), np.ones((2, 4)), dtypes=())
    print("seen:", inputs := np.random.default_rng().standard_normal((9, 4)))
    check_port(Torch(), Flax(), {"inputs": inputs}, dtypes=())
"""


@pytest.mark.slow
@pytest.mark.again
def test_a_script_checks_again_with_the_same_numbers(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(UNSEEDED, encoding="utf-8")
    code, printed = run("--port-report", "reports", folder=tmp_path)
    assert code == 1, printed
    script = tmp_path / "reports" / "replay_test_mine.py_test_random_2.py"
    assert f"python {script}" in printed
    worst = re.search(r"found .* at \(.*\)", printed)
    assert worst, printed
    code, printed = again(script)
    assert code == 1
    assert worst[0] in printed


@pytest.mark.slow
@pytest.mark.again
def test_what_does_not_fit_the_test_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "test_mine.py"
    file.write_text(UNSEEDED, encoding="utf-8")
    run("--port-report", "reports", folder=tmp_path)
    file.write_text(UNSEEDED.replace("(9, 4)", "(8, 4)"), encoding="utf-8")
    code, printed = again(tmp_path / "reports" / "replay_test_mine.py_test_random_2.py")
    assert code == 1
    assert "inputs has the shape (9, 4) in the file and (8, 4) in the test" in printed
    (tmp_path / "other.txt").write_text("nothing", encoding="utf-8")
    code, printed = run("--port-replay", "other.txt", folder=tmp_path)
    assert code == 1
    assert "no sound record" in printed


def test_no_framework_is_imported_before_a_port_is_checked(tmp_path: Path) -> None:
    text = TESTS.replace("from tests.ports.blocks import LinenBlock, inputs, torch_block\n", "")
    (tmp_path / "test_mine.py").write_text(text, encoding="utf-8")
    code, printed = run("-k", "something_else", folder=tmp_path)
    assert code == 0, printed
