"""Run tests on changed sources, each time in a fork of this process, which has imported much.

Usage: `python -m compare.commands.mechanical_worker ROOT`, where ROOT is a copy of the repository.

Each line of standard input is a request in JSON, each line of standard output its answer:

- `{"measure": [folders], "tests": [paths]}`: run the tests; the answer says which tests run which
  lines of the folders' files, and how many seconds each takes.
- `{"file": …, "source": …, "tests": [ids], "seconds": …}`: run the tests with this source in place
  of the file, until one fails; the answer names it.
"""

import ast
import compileall
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

PROJECT = ("compare", "flax_impl", "tests", "torch_impl")
MEASURE_SECONDS = 3600.0
# Rewriting the assertions of tests would take longer than most tests.
OPTIONS = (
    "-q",
    "-p",
    "no:xdist",
    "-p",
    "no:cacheprovider",
    "--assert=plain",
    "-m",
    "not processors",
)


class FirstFailure:
    """A pytest plugin that keeps the id of the first test that fails."""

    def __init__(self) -> None:
        self.test: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the id of the first that failed."""
        if report.failed and self.test is None:
            self.test = report.nodeid


class Measurement:
    """A pytest plugin that notes which test runs which lines, its seconds, and whether it passes.

    A test would not run the lines of a function that an earlier test has compiled or has cached
    the results of, so that the caches are cleared before each test.
    """

    def __init__(self, folders: list[str]) -> None:
        import coverage

        self.coverage = coverage.Coverage(data_file=None, config_file=False, source=folders)
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.skipped: set[str] = set()
        self.coverage.start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Attribute the lines that run from now on to this test."""
        clear_caches()
        self.coverage.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the seconds, and note if it did not pass."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.skipped:
            self.skipped.add(report.nodeid)

    def answer(self, root: Path) -> dict[str, Any]:
        """Return the tests by file and line, and the seconds by test; only those that passed."""
        self.coverage.stop()
        data = self.coverage.get_data()
        blind = self.failed | self.skipped
        return {
            "failed": sorted(self.failed),
            "lines": {
                str(Path(file).relative_to(root)): {
                    line: [test for test in tests if test and test not in blind]
                    for line, tests in data.contexts_by_lineno(file).items()
                }
                for file in data.measured_files()
            },
            "seconds": {
                test: seconds for test, seconds in self.seconds.items() if test not in blind
            },
        }


def clear_caches() -> None:
    """Clear the caches of the project's functions, and JAX's."""
    import jax

    jax.clear_caches()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in PROJECT:
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()


def import_libraries(root: Path) -> None:
    """Import what the project's files import, except the project itself."""
    names: set[str] = set()
    for folder in PROJECT:
        for file in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names.update(alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module)
    for name in sorted(names):
        if name.split(".")[0] not in PROJECT:
            with suppress(Exception):  # a test may skip where a library is absent
                import_module(name)


def measure(request: dict[str, Any], root: Path) -> dict[str, Any]:
    """Answer which tests run which lines."""
    plugin = Measurement([str(root / folder) for folder in request["measure"]])
    code = run_pytest([], request["tests"], plugin)
    return {"code": int(code), **plugin.answer(root)}


def judge(request: dict[str, Any], root: Path) -> dict[str, Any]:
    """Answer which test fails first with the changed source, if any does."""
    write(root / request["file"], request["source"])
    plugin = FirstFailure()
    code = run_pytest(["-x"], request["tests"], plugin)
    if code and plugin.test is None:
        return {"killed_by": "the tests cannot be collected"}
    return {"killed_by": plugin.test}


def run_pytest(options: list[str], tests: list[str], plugin: object) -> int:
    """Run tests in this process, and return pytest's exit code."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(tests))
        file.flush()
        return pytest.main([*OPTIONS, *options, f"@{file.name}"], plugins=[plugin])


def write(file: Path, source: str) -> None:
    """Write a source file, and remove its bytecode, which could seem as new as the source."""
    file.write_text(source, encoding="utf-8")
    for bytecode in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
        bytecode.unlink()


def in_a_fork(work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any] | None:
    """Return what `work` returns in a fork of this process; None if it takes longer, or crashes."""
    with tempfile.TemporaryDirectory(prefix="attention-parity-mutant-") as folder:
        result = Path(folder, "result.json")
        child = os.fork()
        if not child:
            _run_and_exit(work, result)
        deadline = time.monotonic() + seconds
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
            time.sleep(0.01)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what a test may have left behind
        if result.exists():
            return json.loads(result.read_text(encoding="utf-8"))
        log = result.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
        print(log[-2000:], file=sys.stderr)
        return None


def _run_and_exit(work: Callable[[], dict[str, Any]], result: Path) -> None:
    """Write what `work` returns to a file, without the project's modules of this process."""
    try:
        os.setpgid(0, 0)
        # A background job ignores the first, one under nohup the second.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["TMPDIR"] = tempfile.tempdir = str(result.parent)
        for name in list(sys.modules):
            if name.split(".")[0] in PROJECT:
                del sys.modules[name]
        result.write_text(json.dumps(work()), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def main() -> None:
    """Answer the requests of standard input."""
    root = Path(sys.argv[1]).resolve()
    os.chdir(root)
    for folder in PROJECT:
        compileall.compile_dir(root / folder, quiet=2)
    sys.dont_write_bytecode = True
    import_libraries(root)
    for line in sys.stdin:
        request = json.loads(line)
        if "measure" in request:
            answer = in_a_fork(partial(measure, request, root), MEASURE_SECONDS) or {}
        else:
            file = root / request["file"]
            original = file.read_text(encoding="utf-8")
            work = partial(judge, request, root)
            answer = in_a_fork(work, request["seconds"]) or {"killed_by": "no end, or a crash"}
            write(file, original)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
