"""The command for a GPU machine, tested with steps that need no GPU."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compare import cli
from compare.commands import gpu
from compare.commands.gpu import REPORTS, Step
from compare.runners.run import missing_cuda

SLEEP = Step("tests", ("timeit", "-n", "1", "import time; time.sleep(90)"))
FAILS = Step("checks", ("compare", "no-such-command"))
HOLDS = Step("outputs", ("compare", "outputs", "--device", "cpu", *REPORTS))
SKIPS = Step("attention", ("timeit", "-n", "1", "pass"))


@pytest.mark.skipif(missing_cuda() is None, reason="both frameworks see CUDA")
def test_without_cuda_it_says_so_and_ends_with_2(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["gpu", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "CUDA cannot be used: no CUDA device is seen by" in " ".join(
        done.output.replace("│", " ").split()
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_step_leaves_its_record_and_its_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("compare.cli", "compare.commands.run"):
        monkeypatch.setattr(f"{module}.require_device", lambda device: None)
    monkeypatch.setattr(gpu, "TOGETHER", (HOLDS, FAILS, SLEEP))
    monkeypatch.setattr(gpu, "ALONE", SKIPS)
    out = tmp_path / "new/out"
    done = CliRunner().invoke(cli.app, ["gpu", "--out", str(out), "--minutes", "0.6"])
    assert done.exit_code == 1, done.output
    report = json.loads((out / "summary.json").read_text())
    verdicts = {
        check["name"]: check for section in report["sections"] for check in section["checks"]
    }
    assert {name: check["held"] for name, check in verdicts.items()} == {
        "outputs": True,
        "checks": False,
        "tests": None,
        "attention": False,
    }
    assert verdicts["tests"]["measured"].startswith("stopped after ")
    assert "No such command" in (out / "checks-cuda.log").read_text()
    assert json.loads((out / "outputs-cuda.json").read_text())["held"] is True
    assert (out / "outputs-cuda.html").is_file()
    assert "NOT everything held" in (out / "summary.html").read_text()


@pytest.mark.again
def test_the_tests_step_collects_the_gpu_tests() -> None:
    """`-n` would be an unknown argument where pytest-xdist is not installed."""
    step = next(step for step in gpu.TOGETHER if step.name == "tests")
    command = [sys.executable, "-m", *step.arguments, "--collect-only", "-q"]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "-n" not in step.arguments
    assert int(re.findall(r"(\d+)/\d+ tests collected", done.stdout)[0]) > 100
