"""Run a module of this package in a new Python process and read the JSON that it prints."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The repository, or the folder of the installed packages.
ROOT = Path(__file__).resolve().parent.parent

# The parent may hold most of the GPU memory, so a child that needs no GPU stays on the CPU.
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}

# Importing both frameworks takes seconds. A process that takes minutes hangs.
TIMEOUT_SECONDS = 240


class ChildError(RuntimeError):
    """The process failed or took too long; the message contains the end of its stderr."""


def child_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this environment updated by `more`, with this package's root first in PYTHONPATH."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **(more or {}), "PYTHONPATH": paths}


def run_module(
    module: str, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Any:
    """Run `python -m module` and return its standard output, parsed as JSON.

    Raises:
        ChildError: the process exited with a code other than 0, or took too long.
    """
    command = [sys.executable, "-P", "-m", module, *arguments]
    try:
        process = subprocess.run(
            command,
            env=child_environment(environment),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            process_group=0,  # Ctrl-C is this process's to handle: it ends the child
        )
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"{' '.join(command)} did not end within {TIMEOUT_SECONDS} s") from error
    if process.returncode:
        raise ChildError(
            f"{' '.join(command)} exited with {process.returncode}:\n{process.stderr[-2000:]}"
        )
    return json.loads(process.stdout)
