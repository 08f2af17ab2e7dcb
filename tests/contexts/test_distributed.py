"""Under torch's distributed engines our module is the formula: DDP, FSDP2, DTensor, checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_compute_the_formula(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.contexts.on_two_processes"]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    held: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    assert len(held) == 20
    assert {name for name, is_same in held.items() if not is_same} == set()
