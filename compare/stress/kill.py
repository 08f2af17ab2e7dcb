"""Kill a process at random moments of saving, while another reads: is the old or the new always there, whole?"""

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
# Several saves of any format fall into this, the first of a child among them.
LONGEST_SECONDS = {".pth": 0.06, ".safetensors": 0.06, ".msgpack": 0.06, ".orbax": 0.6}


@dataclass
class FormatCounts:
    """What one format came to."""

    tries: int = 0
    lost: int = 0
    reads: int = 0
    leftovers: int = 0
    saves: int = 0
    complaints: list[str] = field(default_factory=list)


def sections(tries: int, seed: int = 0) -> Iterator[Section | str]:
    """Yield one section with a row for each format; on the way, how many tries are done."""
    tallies = {suffix: FormatCounts() for suffix in SUFFIXES}
    for suffix in SUFFIXES:
        yield from _campaign(suffix, tallies[suffix], tries, random.Random(f"{seed}{suffix}"))
    rows: list[list[Cell]] = [
        [suffix, tally.tries, tally.saves, tally.leftovers, tally.reads, tally.lost]
        for suffix, tally in tallies.items()
    ]
    section = Section(
        f"kill -9 at {tries} random moments of saving in each format",
        [
            "Before each try the checkpoint is there. A process saves again and again and is killed; meanwhile and "
            "afterwards another reads: every read has to give one of the states, whole, and none older than the last.",
            Table(["format", "killed", "finished saves", "cut short", "reads", "lost"], rows),
        ],
    )
    for suffix, tally in tallies.items():
        first = f"; first: {tally.complaints[0]}" if tally.complaints else ""
        section.checks.append(
            Check(
                f"{suffix}: old or new, whole",
                "all",
                not tally.lost and not tally.complaints and tally.tries == tries,
                f"{tally.lost} lost, {len(tally.complaints)} reads failed of {tally.reads}{first}",
                f"none of {tries} tries",
                f"{tally.tries - tally.lost}/{tally.tries}",
            )
        )
    yield section


def _campaign(suffix: str, tally: FormatCounts, tries: int, draw: random.Random) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder) / f"state{suffix}", state(1))
        command = [sys.executable, "-m", "compare.stress.kill_worker", str(path)]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=child_environment(ON_CPU),
        ) as writer:
            assert writer.stdin is not None and writer.stdout is not None
            writer.stdout.readline()
            for number in range(tries):
                if number % 10 == 0:
                    yield f"{suffix}: {number} of {tries} tries"
                _try(path, tally, writer, draw.uniform(0, LONGEST_SECONDS[suffix]))
            writer.stdin.close()
        save_checkpoint(path, state(0))
        tally.complaints += [
            f"{left.name} was left behind" for left in Path(folder).iterdir() if left != path
        ]


def _try(path: Path, tally: FormatCounts, writer: subprocess.Popen[str], seconds: float) -> None:
    assert writer.stdin is not None and writer.stdout is not None
    before = _read(path, tally, 0)
    stop = threading.Event()
    reader = threading.Thread(target=_poll, args=(path, tally, before, stop))
    reader.start()
    print(before + 1, file=writer.stdin, flush=True)
    child = int(writer.stdout.readline())
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    writer.stdout.readline()
    stop.set()
    reader.join()
    tally.tries += 1
    tally.leftovers += len(list(path.parent.glob(f".{path.name}.*.tmp")))
    after = _read(path, tally, before)
    tally.saves += max(0, after - before)
    tally.lost += after < before


def _poll(path: Path, tally: FormatCounts, least: int, stop: threading.Event) -> None:
    while not stop.is_set():
        least = max(least, _read(path, tally, least))


def _read(path: Path, tally: FormatCounts, least: int) -> int:
    """Return the value that the whole state has, or -1 if there is no whole state of at least that value."""
    tally.reads += 1
    try:
        found = read_checkpoint(path)
    except CheckpointError as error:
        tally.complaints.append(str(error))
        return -1
    values = {float(tensor.min()) for tensor in found.values()} | {
        float(tensor.max()) for tensor in found.values()
    }
    if tuple(found) != NAMES or len(values) != 1 or min(values) < least:
        tally.complaints.append(f"{sorted(values)} read after {least}")
        return -1
    return int(values.pop())
