"""Copies of the repository in which changed sources are tested, a process in each."""

import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..subprocesses import ON_CPU, ROOT, ChildError, child_environment

WORKERS = 2
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "fuzz-cases")


class _Worker:
    """A process with its own copy of the repository that runs tests on changed sources."""

    def __init__(self, folder: Path, cache: Path) -> None:
        shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
        environment = child_environment(
            {
                **ON_CPU,
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "OMP_NUM_THREADS": "1",  # two workers share the cores
            }
        )
        environment["PYTHONPATH"] = str(folder)  # instead of this repository
        self._errors = folder.with_suffix(".log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "compare.commands.mechanical_worker", str(folder)],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            process_group=0,  # Ctrl-C must not reach it: `end` kills it
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            ChildError: the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise ChildError(f"the tests ended early:\n{self._errors.read()[-2000:]}")
        return json.loads(line)

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()


class Workers:
    """The workers; a request waits until one is free."""

    def __init__(self, stack: ExitStack) -> None:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="attention-parity-mutants-"))
        )
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        for index in range(WORKERS):
            worker = _Worker(folder / f"copy-{index}", folder / "jax")
            stack.callback(worker.end)
            self._free.put(worker)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request to the first worker that is free, and wait for its answer."""
        worker = self._free.get()
        try:
            return worker.ask(request)
        finally:
            self._free.put(worker)
