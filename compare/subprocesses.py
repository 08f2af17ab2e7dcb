"""Run a module of this package in a new Python process, and read the JSON that it prints."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The parent may hold most of a GPU's memory: a child that needs none of it stays on the CPU.
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}

# Importing both frameworks takes seconds; a process that needs minutes hangs.
TIMEOUT_SECONDS = 240


class ChildError(RuntimeError):
    """The process failed; the message has the end of what it wrote to stderr."""


def child_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment, and more, in which a child imports this package from where it is."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, **(more or {}), "PYTHONPATH": paths}


def run_module(
    module: str, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Any:
    """Run `python -m module` and return its standard output, parsed as JSON.

    Raises:
        ChildError: the process exited with another code than 0, or took too long.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command,
            env=child_environment(environment),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"{' '.join(command)} did not end within {TIMEOUT_SECONDS} s") from error
    if done.returncode:
        raise ChildError(
            f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout)
