"""Mutate valid checkpoints of every format and read them: nothing but `CheckpointError` may come out.

Two processes read, each with a limit of memory; one that crashes or hangs is named with its input,
and replaced.
"""

import json
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..conversion.errors import shown
from ..report.model import Cell, Check, Section, Table
from ..subprocesses import ON_CPU, child_environment
from .corrupt import FORMATS

HANG_SECONDS = 60.0
# Of the time; Orbax takes a hundred times as long to read as the others.
SHARES = {"safetensors": 0.3, "msgpack": 0.3, "torch": 0.2, "sharded": 0.1, "orbax": 0.1}


@dataclass
class FormatCounts:
    """What one format came to; `bad` has the seed and number of inputs that did what none may, and why."""

    inputs: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    bad: dict[tuple[str, int], str] = field(default_factory=dict)


def sections(seconds: int, seed: int = 0, keep: Path | None = None) -> Iterator[Section | str]:
    """Yield one section with a row for each format; on the way, how many inputs were read."""
    tallies = {kind: FormatCounts() for kind in FORMATS}
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as folder:
        for kind in FORMATS:
            for done in _campaign(
                kind, seed, seconds * SHARES[kind], tallies[kind], Path(folder, kind)
            ):
                yield f"{kind}: {done:,} inputs"
        kept = _keep(tallies, keep or Path("fuzz-cases"), Path(folder, "kept"))
    rows: list[list[Cell]] = [
        [
            kind,
            f"{tally.inputs:,}",
            *(f"{tally.counts[name]:,}" for name in ("refused", "the same", "unverified")),
            len(tally.bad),
        ]
        for kind, tally in tallies.items()
    ]
    total = sum(tally.inputs for tally in tallies.values())
    section = Section(
        f"{total:,} mutated checkpoints",
        [
            f"Seed {seed}, {seconds} s. Refused by CheckpointError; loaded, every value as it was saved; loaded from a "
            "file that has lost its manifest or never had one, and so without a claim.",
            Table(["format", "inputs", "refused", "the same", "unverified", "bad"], rows),
            *(
                [f"The inputs that did what none may are kept in {', '.join(map(str, kept))}"]
                if kept
                else []
            ),
        ],
    )
    for kind, tally in tallies.items():
        first = next(iter(tally.bad.items()), None)
        words = (
            f"; input {first[0][1]} of seed {first[0][0]}: {shown(first[1][-160:])}"
            if first
            else ""
        )
        section.checks.append(
            Check(
                f"{kind}: nothing but CheckpointError",
                "all",
                not tally.bad if tally.inputs or tally.bad else None,
                f"{len(tally.bad)} bad of {tally.inputs:,}{words}",
                "no other exception, crash, hang or value",
            )
        )
    yield section


class _Reader:
    """A process that reads inputs."""

    def __init__(self, kind: str, seed: str, first: int, folder: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "compare.stress.fuzz_worker",
            kind,
            seed,
            str(first),
            str(folder),
        ]
        quiet = child_environment({**ON_CPU, "TF_CPP_MIN_LOG_LEVEL": "3"})
        folder.mkdir(parents=True, exist_ok=True)
        self.errors = folder / "stderr"
        with self.errors.open("wb") as stream:
            self.process = subprocess.Popen(
                command, env=quiet, stdout=subprocess.PIPE, stderr=stream
            )
        self.seed, self.next, self.folder = seed, first, folder
        self.heard = time.monotonic()
        self.is_ready = False

    def said(self) -> str:
        """Return the end of what it wrote to stderr."""
        return self.errors.read_bytes()[-1500:].decode(errors="replace")

    def end(self) -> None:
        """Stop it."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


def _campaign(
    kind: str, seed: int, seconds: float, tally: FormatCounts, folder: Path
) -> Iterator[int]:
    """Read inputs with two processes, each with a seed of its own, for so long after both have begun.

    If nothing was heard of any input by then, wait for the first.
    """
    end = None
    readers = {lane: _Reader(kind, f"{seed}.{lane}", 0, folder / str(lane)) for lane in range(2)}
    try:
        while end is None or time.monotonic() < end or not (tally.inputs or tally.bad):
            if end is None and (tally.bad or all(reader.is_ready for reader in readers.values())):
                end = time.monotonic() + seconds
            with selectors.DefaultSelector() as selector:
                for lane, reader in readers.items():
                    assert reader.process.stdout is not None
                    selector.register(reader.process.stdout, selectors.EVENT_READ, lane)
                for key, _ in selector.select(timeout=1.0):
                    _hear(readers[key.data], tally)
            for lane, reader in readers.items():
                crashed = reader.process.poll() is not None
                if crashed or time.monotonic() - reader.heard > HANG_SECONDS:
                    readers[lane] = _replaced(kind, reader, tally, crashed)
            yield tally.inputs
    finally:
        for reader in readers.values():
            reader.end()


def _hear(reader: _Reader, tally: FormatCounts) -> None:
    assert reader.process.stdout is not None
    line = reader.process.stdout.readline()
    reader.heard = time.monotonic()
    if not line:
        return
    content = json.loads(line)
    if "ready" in content:
        reader.is_ready = True
        return
    if "bad" in content:
        tally.bad[reader.seed, content["bad"]] = content["why"]
        return
    tally.inputs += content["done"] - reader.next
    tally.counts.update(content["counts"])
    reader.next = content["done"]


def _replaced(kind: str, reader: _Reader, tally: FormatCounts, crashed: bool) -> _Reader:
    """Name the input at which the process ended or hung: the first behind what it reported that does it again."""
    number = _culprit(
        kind, reader.seed, reader.next, reader.folder.with_name(f"search-{reader.folder.name}")
    )
    code = reader.process.returncode
    tally.bad[reader.seed, number] = (
        f"the process ended with {code}: {reader.said()}" if crashed else "hung"
    )
    reader.end()
    tally.inputs += number + 1 - reader.next
    return _Reader(kind, reader.seed, number + 1, reader.folder)


def _culprit(kind: str, seed: str, first: int, folder: Path) -> int:
    """Return the number of the input that ends a process, each of the next hundred in one of its own."""
    for number in range(first, first + 100):
        shutil.rmtree(folder, ignore_errors=True)
        code = (
            "import sys, warnings; warnings.simplefilter('ignore')\n"
            "from pathlib import Path\n"
            "from compare.stress.fuzz_worker import Input, outcome\n"
            "print(outcome(Input(sys.argv[1], sys.argv[2], Path(sys.argv[4])).make(int(sys.argv[3]))))\n"
        )
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, kind, seed, str(number), str(folder)],
                capture_output=True,
                timeout=HANG_SECONDS,
                env=child_environment(ON_CPU),
            )
        except subprocess.TimeoutExpired:
            return number
        if done.returncode:
            return number
    return first


def _keep(tallies: dict[str, FormatCounts], keep: Path, work: Path) -> list[Path]:
    """Copy the bad inputs to where they stay, ten of each format at most."""
    from .fuzz_worker import Input

    kept = []
    for kind, tally in tallies.items():
        for seed, number in list(tally.bad)[:10]:
            made = Input(kind, seed, work / f"{kind}-{seed}-{number}").make(number)
            keep.mkdir(parents=True, exist_ok=True)
            target = keep / f"{kind}-{seed}-{number}{made.suffix}"
            shutil.copytree(made, target, dirs_exist_ok=True) if made.is_dir() else shutil.copy(
                made, target
            )
            kept.append(target)
    return kept
