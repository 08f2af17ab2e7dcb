"""Everything that needs a GPU, in one command: tests, outputs, checks and the attention benchmark.

Each step is a process of its own, so that a crash or a hang of one does not lose the others. The
benchmark runs alone.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..report.model import VERDICTS, Block, Cell, Check, Section, Table
from ..subprocesses import ROOT, child_environment

# torch and JAX share the GPU: JAX would otherwise reserve most of its memory at once.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: the name of the check, and of the files.
        arguments: what follows `python -m`. "{json}", "{html}" and "{png}" stand for files in the
            folder.
    """

    name: str
    arguments: Sequence[str]


REPORTS = ("--json", "{json}", "--html", "{html}")
CHECKS = "tests/checks/test_checks.py::test_it_holds"
TOGETHER = (
    Step("outputs", ("compare", "outputs", "--device", "cuda", *REPORTS)),
    Step("checks", ("compare", "checks", "--device", "cuda", *REPORTS)),
    # The checks are a step of their own.
    Step("tests", ("pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--deselect", CHECKS)),
)
ALONE = Step(
    "attention",
    ("compare", "bench", "attention", "--quick", "--device", "cuda", "--plot", "{png}", *REPORTS),
)
SHARE = 0.6  # of the time, for the steps that run together


def sections(out: Path, minutes: float) -> Iterator[Section | str]:
    """Run the steps, and yield a section for each; before each, say what is being done.

    Args:
        out: an existing folder, which gets the records, the pages and the logs.
        minutes: the time for all steps together.
    """
    end = time.monotonic() + 60 * minutes
    yield _machine()
    seconds = SHARE * 60 * minutes
    yield f"{', '.join(step.name for step in TOGETHER)}: at most {seconds:.0f} s"
    with ThreadPoolExecutor(len(TOGETHER)) as threads:
        yield from threads.map(partial(_run, out=out, seconds=seconds), TOGETHER)
    seconds = end - time.monotonic()
    yield f"{ALONE.name}: at most {seconds:.0f} s"
    yield _run(ALONE, out, seconds)


def _machine() -> Section:
    import jax
    import torch

    rows: list[list[Cell]] = [
        ["PyTorch", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"],
        ["JAX", ", ".join(map(str, jax.devices()))],
        ["CUDA of PyTorch", str(torch.version.cuda)],
    ]
    return Section("The GPU", [Table(["seen by", "device"], rows)])


def _run(step: Step, out: Path, seconds: float) -> Section:
    """Run one step, and return what came of it."""
    files = {kind: out / f"{step.name}-cuda.{kind}" for kind in ("json", "html", "png", "log")}
    arguments = [argument.format(**files) for argument in step.arguments]
    command = [sys.executable, "-m", *arguments]
    begin = time.monotonic()
    with files["log"].open("w") as log:
        log.write(f"$ python -m {' '.join(arguments)}\n")
        log.flush()
        try:
            process = subprocess.run(
                command,
                cwd=ROOT,
                env=child_environment(ENVIRONMENT),
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                process_group=0,
            )
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            code = None
    took = time.monotonic() - begin
    record = files["json"]
    checks = _checks(record) if record.is_file() else None
    return Section(
        f"{step.name} on cuda",
        [f"`python -m {' '.join(arguments)}` took {took:.0f} s.", *_content(record, checks)],
        [_verdict(step.name, code, took, checks, files["log"])],
    )


def _checks(record: Path) -> list[Check]:
    sections = json.loads(record.read_text(encoding="utf-8"))["sections"]
    return [Check(**check) for section in sections for check in section["checks"]]


def _verdict(
    name: str, code: int | None, seconds: float, checks: Sequence[Check] | None, log: Path
) -> Check:
    """Return whether the step held: by its exit code, and by how much it ran."""
    expected = "exit code 0, and something that ran"
    if code is None:
        return Check(name, "all", None, f"stopped after {seconds:.0f} s", expected)
    last = next(
        (line for line in reversed(log.read_text().splitlines()) if line.strip()), "no output"
    )
    measured = f"exit code {code}: {last.strip()[:200]}"
    # pytest ends with 0 although every test was skipped.
    # A benchmark has no checks.
    ran = (
        " passed" in last
        if checks is None
        else not checks or any(check.held is not None for check in checks)
    )
    return Check(name, "all", code == 0 and ran, measured, expected)


def _content(record: Path, checks: Sequence[Check] | None) -> list[Block]:
    """Return the counts of a step's report, and its failed checks."""
    if checks is None:
        return []
    counts = ", ".join(
        f"{sum(check.held is held for check in checks)} {word}" for held, word in VERDICTS.items()
    )
    failed: list[Sequence[Cell]] = [
        [check.name, check.implementation, check.measured, check.expected]
        for check in checks
        if check.held is False
    ]
    table = [Table(["failed check", "framework", "measured", "expected"], failed)] if failed else []
    return [f"{counts}. Record: {record.name}.", *table]
