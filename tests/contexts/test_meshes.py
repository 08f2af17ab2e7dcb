"""On a mesh, batch and heads stay on their devices, and the values are those of one device."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(implementation: str, num_batches: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.contexts.on_a_mesh", implementation, str(num_batches)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("num_batches", [1, pytest.param(2, marks=pytest.mark.again)])
@pytest.mark.slow
def test_a_sharded_array_stays_where_it_is(num_batches: int) -> None:
    results = run("auto", num_batches)
    assert {name for name, result in results.items() if not result["same"]} == set()
    compiled = {name: result for name, result in results.items() if "all-gather" in result}
    assert len(compiled) == {1: 7, 2: 13}[num_batches]
    for name, result in compiled.items():
        assert result["all-gather"] == result["all-to-all"] == 0, name
        assert result["collective-permute"] == 0, name
        # Only the sums over the heads, in `out_proj` and in the projections' gradients.
        sums = {"forward": 1, "pushed": 1, "gradient": 4}[name.split()[0]]
        assert result["all-reduce"] <= (0 if " data " in name else sums), name


@pytest.mark.again
def test_the_formula_does_the_same() -> None:
    results = run("reference", 1)
    assert all(result["same"] for result in results.values())
    assert all(result.get("all-gather", 0) == 0 for result in results.values())
