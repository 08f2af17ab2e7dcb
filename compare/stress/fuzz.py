"""Damage valid checkpoints of every format and read them: only `CheckpointError` may be raised.

Two processes read, each with a memory limit. If one crashes or hangs, the input that caused it is
reported and the process is replaced.
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

from ..files.printable import shown
from ..report.model import Cell, Check, Section, Table
from ..subprocesses import ON_CPU, child_environment
from .corrupt import FORMATS

HANG_SECONDS = 60.0
# Fractions of the time. Reading Orbax takes a hundred times as long as reading the others.
SHARES = {"safetensors": 0.3, "msgpack": 0.3, "torch": 0.2, "sharded": 0.1, "orbax": 0.1}


@dataclass
class FormatCounts:
    """The counts of one format. `bad` maps the seed and number of each bad input to the reason."""

    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    bad: dict[tuple[str, int], str] = field(default_factory=dict)


def sections(seconds: int, seed: int = 0, keep: Path | None = None) -> Iterator[Section | str]:
    """Yield the progress, then one section with a row for each format."""
    counts_by_format = {file_format: FormatCounts() for file_format in FORMATS}
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as folder:
        for file_format in FORMATS:
            counts = counts_by_format[file_format]
            budget = seconds * SHARES[file_format]
            for inputs in _campaign(file_format, seed, budget, counts, Path(folder, file_format)):
                yield f"{file_format}: {inputs:,} inputs"
        kept = _keep(counts_by_format, keep or Path("fuzz-cases"), Path(folder, "kept"))
    rows: list[list[Cell]] = [
        [
            file_format,
            f"{counts.inputs:,}",
            *(f"{counts.outcomes[name]:,}" for name in ("refused", "the same", "unverified")),
            len(counts.bad),
        ]
        for file_format, counts in counts_by_format.items()
    ]
    total = sum(counts.inputs for counts in counts_by_format.values())
    section = Section(
        f"{total:,} mutated checkpoints",
        [
            f"Seed {seed}, {seconds} s. Refused: reading raised CheckpointError. The same: every "
            "loaded value is as saved. Unverified: the file has no manifest, or has lost it, so "
            "its values are not judged. Bad: anything else.",
            Table(["format", "inputs", "refused", "the same", "unverified", "bad"], rows),
        ],
    )
    if kept:
        section.blocks.append(f"The bad inputs are kept in {', '.join(map(str, kept))}")
    for file_format, counts in counts_by_format.items():
        first_bad = ""
        if counts.bad:
            (reader_seed, number), reason = next(iter(counts.bad.items()))
            first_bad = f"; input {number} of seed {reader_seed}: {shown(reason[-160:])}"
        section.checks.append(
            Check(
                f"{file_format}: nothing but CheckpointError",
                "all",
                not counts.bad if counts.inputs or counts.bad else None,
                f"{len(counts.bad)} bad of {counts.inputs:,}{first_bad}",
                "no other exception, crash, hang or value",
            )
        )
    yield section


class _Reader:
    """A process that reads numbered inputs."""

    def __init__(self, file_format: str, seed: str, first: int, folder: Path) -> None:
        command = [
            sys.executable,
            "-P",
            "-m",
            "compare.stress.fuzz_worker",
            file_format,
            seed,
            str(first),
            str(folder),
        ]
        environment = child_environment({**ON_CPU, "TF_CPP_MIN_LOG_LEVEL": "3"})
        folder.mkdir(parents=True, exist_ok=True)
        self.errors = folder / "stderr"
        with self.errors.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stream,
                process_group=0,  # Ctrl-C must not reach it: `end` kills it
            )
        self.seed, self.next, self.folder = seed, first, folder
        self.last_message = time.monotonic()
        self.is_ready = False

    def stderr_tail(self) -> str:
        """Return the end of the process's stderr."""
        return self.errors.read_bytes()[-1500:].decode(errors="replace")

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


def _campaign(
    file_format: str, seed: int, seconds: float, counts: FormatCounts, folder: Path
) -> Iterator[int]:
    """Read inputs in two processes with different seeds; yield how many inputs were read so far.

    The time starts when both processes are ready. If neither has reported an input when it is over,
    wait for the first report.
    """
    end = None
    readers = {
        lane: _Reader(file_format, f"{seed}.{lane}", 0, folder / str(lane)) for lane in range(2)
    }
    try:
        while end is None or time.monotonic() < end or not (counts.inputs or counts.bad):
            if end is None and (counts.bad or all(reader.is_ready for reader in readers.values())):
                end = time.monotonic() + seconds
            with selectors.DefaultSelector() as selector:
                for lane, reader in readers.items():
                    assert reader.process.stdout is not None
                    selector.register(reader.process.stdout, selectors.EVENT_READ, lane)
                for key, _ in selector.select(timeout=1.0):
                    _receive(readers[key.data], counts)
            for lane, reader in readers.items():
                crashed = reader.process.poll() is not None
                if crashed or time.monotonic() - reader.last_message > HANG_SECONDS:
                    readers[lane] = _replacement(file_format, reader, counts, crashed)
            yield counts.inputs
    finally:
        for reader in readers.values():
            reader.end()


def _receive(reader: _Reader, counts: FormatCounts) -> None:
    assert reader.process.stdout is not None
    line = reader.process.stdout.readline()
    reader.last_message = time.monotonic()
    if not line:
        return
    message = json.loads(line)
    if "ready" in message:
        reader.is_ready = True
        return
    if "bad" in message:
        counts.bad[reader.seed, message["bad"]] = message["why"]
        return
    counts.inputs += message["done"] - reader.next
    counts.outcomes.update(message["counts"])
    reader.next = message["done"]


def _replacement(file_format: str, reader: _Reader, counts: FormatCounts, crashed: bool) -> _Reader:
    """Record the input at which the process crashed or hung, and start a process after it."""
    search_folder = reader.folder.with_name(f"search-{reader.folder.name}")
    number = _first_bad_input(file_format, reader.seed, reader.next, search_folder)
    code = reader.process.returncode
    counts.bad[reader.seed, number] = (
        f"the process exited with {code}: {reader.stderr_tail()}" if crashed else "hung"
    )
    reader.end()
    counts.inputs += number + 1 - reader.next
    return _Reader(file_format, reader.seed, number + 1, reader.folder)


def _first_bad_input(file_format: str, seed: str, first: int, folder: Path) -> int:
    """Read each of the next 100 inputs in its own process; return the first that crashes or hangs.

    Return `first` if none does.
    """
    for number in range(first, first + 100):
        shutil.rmtree(folder, ignore_errors=True)
        code = (
            "import sys, warnings; warnings.simplefilter('ignore')\n"
            "from pathlib import Path\n"
            "from compare.stress.fuzz_worker import Input, outcome\n"
            "inputs = Input(sys.argv[1], sys.argv[2], Path(sys.argv[4]))\n"
            "print(outcome(inputs.make(int(sys.argv[3]))))\n"
        )
        try:
            process = subprocess.run(
                [sys.executable, "-P", "-c", code, file_format, seed, str(number), str(folder)],
                capture_output=True,
                timeout=HANG_SECONDS,
                env=child_environment(ON_CPU),
                process_group=0,
            )
        except subprocess.TimeoutExpired:
            return number
        if process.returncode:
            return number
    return first


def _keep(counts_by_format: dict[str, FormatCounts], keep: Path, work: Path) -> list[Path]:
    """Copy at most ten bad inputs of each format to the folder `keep`."""
    from .fuzz_worker import Input

    kept = []
    for file_format, counts in counts_by_format.items():
        for seed, number in list(counts.bad)[:10]:
            path = Input(file_format, seed, work / f"{file_format}-{seed}-{number}").make(number)
            keep.mkdir(parents=True, exist_ok=True)
            target = keep / f"{file_format}-{seed}-{number}{path.suffix}"
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copy(path, target)
            kept.append(target)
    return kept
