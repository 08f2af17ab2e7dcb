"""Kill a process at random moments of a save while another reads the checkpoint.

Every read must return a complete state, either the old or the new one.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint import read_checkpoint, save_checkpoint
from ..checkpoint.errors import CheckpointError
from ..report.model import Cell, Check, Section, Table
from ..subprocesses import ON_CPU, child_environment
from .kill_worker import NAMES, state

SUFFIXES = (".pth", ".safetensors", ".msgpack", ".orbax")
# The longest time until a kill. It spans several saves, including the first one of a child.
LONGEST_SECONDS = {".pth": 0.06, ".safetensors": 0.06, ".msgpack": 0.06, ".orbax": 0.6}


@dataclass
class FormatCounts:
    """The counts of one format."""

    tries: int = 0
    lost: int = 0
    reads: int = 0
    leftovers: int = 0
    saves: int = 0
    complaints: list[str] = field(default_factory=list)


def sections(tries: int, seed: int = 0) -> Iterator[Section | str]:
    """Yield the progress, then one section with a row for each format."""
    counts_by_suffix = {suffix: FormatCounts() for suffix in SUFFIXES}
    for suffix in SUFFIXES:
        yield from _campaign(
            suffix, counts_by_suffix[suffix], tries, random.Random(f"{seed}{suffix}")
        )
    rows: list[list[Cell]] = [
        [suffix, counts.tries, counts.saves, counts.leftovers, counts.reads, counts.lost]
        for suffix, counts in counts_by_suffix.items()
    ]
    section = Section(
        f"kill -9 at {tries} random moments of a save, for each format",
        [
            "A checkpoint exists before each try. One process saves repeatedly until it is killed. "
            "Another process reads during and after the saves. Every read must return a complete "
            "state that is not older than the last one read.",
            Table(["format", "killed", "finished saves", "cut short", "reads", "lost"], rows),
        ],
    )
    for suffix, counts in counts_by_suffix.items():
        failed = f"{len(counts.complaints)} reads failed of {counts.reads}"
        if counts.complaints:
            failed += f"; first: {counts.complaints[0]}"
        section.checks.append(
            Check(
                f"{suffix}: old or new, whole",
                "all",
                not counts.lost and not counts.complaints and counts.tries == tries,
                f"{counts.lost} lost, {failed}",
                f"none of {tries} tries",
                f"{counts.tries - counts.lost}/{counts.tries}",
            )
        )
    yield section


def _campaign(suffix: str, counts: FormatCounts, tries: int, rng: random.Random) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder) / f"state{suffix}", state(1))
        command = [sys.executable, "-P", "-m", "compare.stress.kill_worker", str(path)]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=child_environment(ON_CPU),
            process_group=0,  # Ctrl-C must not reach it: it ends when its stdin is closed
        ) as writer:
            assert writer.stdin is not None and writer.stdout is not None
            writer.stdout.readline()
            for number in range(tries):
                if number % 10 == 0:
                    yield f"{suffix}: {number} of {tries} tries"
                _try(path, counts, writer, rng.uniform(0, LONGEST_SECONDS[suffix]))
            writer.stdin.close()
        save_checkpoint(path, state(0))
        counts.complaints += [
            f"{entry.name} was left behind" for entry in Path(folder).iterdir() if entry != path
        ]


def _try(path: Path, counts: FormatCounts, writer: subprocess.Popen[str], seconds: float) -> None:
    assert writer.stdin is not None and writer.stdout is not None
    before = _read(path, counts, 0)
    stop = threading.Event()
    reader = threading.Thread(target=_poll, args=(path, counts, before, stop))
    reader.start()
    print(before + 1, file=writer.stdin, flush=True)
    child = int(writer.stdout.readline())
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    writer.stdout.readline()
    stop.set()
    reader.join()
    counts.tries += 1
    counts.leftovers += len(list(path.parent.glob(f".{path.name}.*.tmp")))
    after = _read(path, counts, before)
    counts.saves += max(0, after - before)
    counts.lost += after < before


def _poll(path: Path, counts: FormatCounts, least: int, stop: threading.Event) -> None:
    while not stop.is_set():
        least = max(least, _read(path, counts, least))


def _read(path: Path, counts: FormatCounts, least: int) -> int:
    """Return the value that fills the state, or -1 if the state is incomplete or below `least`."""
    counts.reads += 1
    try:
        tensors = read_checkpoint(path)
    except CheckpointError as error:
        counts.complaints.append(str(error))
        return -1
    values = {float(value) for tensor in tensors.values() for value in (tensor.min(), tensor.max())}
    if tuple(tensors) != NAMES or len(values) != 1 or min(values) < least:
        counts.complaints.append(f"read {sorted(values)} after {least}")
        return -1
    return int(values.pop())
