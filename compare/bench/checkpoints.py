"""Time saving, loading and converting against plain library calls, alternating on the same data.

Each format runs in its own process, because the speed of allocation depends on what the process did
before: NumPy leaves huge pages behind in the allocator.
"""

import ctypes
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import serialization

from ..checkpoint import load_checkpoint, save_checkpoint
from ..checkpoint.convert import convert_checkpoint
from ..conversion.mapping import Row, StateMapping
from ..files.page_cache import forget
from ..report.model import Cell, Check, Section, Table

SIDE = 2048
MATRIX_BYTES = 4 * SIDE * SIDE
SUFFIXES = (".pth", ".safetensors", ".msgpack", ".orbax")
CONVERT = "convert"
MEMORY = 5  # multiple of the data size: the most that either side needs at once
# The smallest allowed ratio of the plain call's time to ours.
LEAST, LEAST_CONVERTING = 0.8, 1 / 1.5

Timed = tuple[str, str, str]  # job, format, side


class Job(NamedTuple):
    """A plain library call and our call, both timed. `before` runs before each, untimed."""

    name: str
    suffix: str
    plain: Callable[[], Any]
    ours: Callable[[], Any]
    before: Callable[[str], None] = lambda side: None


class Bench:
    """The data as a torch module and as Linen variables, and the folder that it is written to."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        count = matrices(megabytes)
        self.module = torch.nn.ModuleList(
            [torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(count)]
        )
        kernels = {
            name.split(".")[0]: tensor.numpy().T
            for name, tensor in self.module.state_dict().items()
        }
        self.variables = {
            "params": {name: {"kernel": jnp.asarray(kernel)} for name, kernel in kernels.items()}
        }
        rows = (
            Row(f"{i}.weight", ("params", str(i), "kernel"), "transposed") for i in range(count)
        )
        self.mapping = StateMapping(tuple(rows))
        self.nbytes = count * MATRIX_BYTES

    def path(self, side: str, suffix: str) -> Path:
        """Return the path that one side ("plain" or "ours") writes to."""
        return self.folder / f"{side}{suffix}"

    def source(self, suffix: str) -> Any:
        """Return the state in the framework of the format."""
        return self.variables if suffix in (".msgpack", ".orbax") else self.module

    def jobs(self, group: str) -> Iterator[Job]:
        """Yield the jobs of a format, or those of converting."""
        if group == CONVERT:
            source = save_checkpoint(self.path("ours", ".safetensors"), self.module)
            for suffix in SUFFIXES[1:]:
                target = self.path("converted", suffix)
                convert = partial(
                    convert_checkpoint, source, target, mapping=self.mapping, layout="flax"
                )
                yield Job(
                    CONVERT,
                    f".safetensors to {suffix}",
                    partial(self.read_and_write, suffix),
                    convert,
                )
            return
        path = self.path("ours", group)
        yield Job(
            "save",
            group,
            partial(self.save, group),
            partial(save_checkpoint, path, self.source(group)),
        )
        plain, load = partial(self.load, group), partial(load_checkpoint, path, self.source(group))
        yield Job("load, just written", group, plain, load)
        yield Job(
            "load, not cached", group, plain, load, lambda side: forget(self.path(side, group))
        )
        yield Job("load, cached by reading", group, plain, load)

    def save(self, suffix: str) -> None:
        """Save with the plain library."""
        import orbax.checkpoint as ocp
        from safetensors.torch import save_file

        path = self.path("plain", suffix)
        if suffix == ".pth":
            torch.save(self.module.state_dict(), path)
        elif suffix == ".safetensors":
            save_file(self.module.state_dict(), path)
        elif suffix == ".msgpack":
            path.write_bytes(serialization.to_bytes(self.variables))
        else:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, self.variables, force=True)

    def load(self, suffix: str) -> Any:
        """Load with the plain library into the module, or into JAX arrays."""
        import orbax.checkpoint as ocp
        from safetensors.torch import load_file

        path = self.path("plain", suffix)
        if suffix == ".pth":
            return self.module.load_state_dict(torch.load(path, weights_only=True))
        if suffix == ".safetensors":
            return self.module.load_state_dict(load_file(path))
        if suffix == ".msgpack":
            return jax.tree.map(
                jnp.asarray, serialization.from_bytes(self.variables, path.read_bytes())
            )
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, self.variables)

    def read_and_write(self, suffix: str) -> None:
        """Read every value into memory, then save the same amount with the plain library."""
        from safetensors.torch import load_file

        for tensor in load_file(self.path("ours", ".safetensors")).values():
            tensor.clone()
        self.save(suffix)


def matrices(megabytes: int) -> int:
    """Return how many matrices fill about that many megabytes."""
    return max(1, megabytes * 1_000_000 // MATRIX_BYTES)


def sections(megabytes: int, rounds: int) -> Iterator[Section | str]:
    """Yield the progress, then one section with the ratios."""
    times: dict[Timed, list[float]] = {}
    for group in (*SUFFIXES, CONVERT):
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(
                1, get_context("spawn"), _prepare, (Path(folder), megabytes, group)
            ) as process,
        ):
            yield f"{group}: round 0 of {rounds}"
            for number, seconds_by_job in enumerate(process.map(_round, range(rounds + 1))):
                yield f"{group}: round {min(number + 1, rounds)} of {rounds}"
                if number == 0:  # a warm-up
                    continue
                for key, seconds in seconds_by_job.items():
                    times.setdefault(key, []).append(seconds)
    yield _section(times, megabytes, rounds)


_PREPARED: list[tuple[Bench, list[Job]]] = []  # set in the timing process


def _prepare(folder: Path, megabytes: int, group: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    bench = Bench(folder, megabytes)
    _PREPARED.append((bench, list(bench.jobs(group))))


def _round(number: int) -> dict[Timed, float]:
    """Run every job of the process once for each side, and return the seconds."""
    ((bench, jobs),) = _PREPARED
    times = {}
    for job in jobs:
        sides = [("plain", job.plain), ("ours", job.ours)]
        if number % 2 == 0:  # the order alternates from round to round
            sides.reverse()
        for side, call in sides:
            job.before(side)
            _settle(bench.nbytes)
            begin = time.perf_counter()
            result = call()
            jax.block_until_ready(result if isinstance(result, dict) else None)
            times[job.name, job.suffix, side] = time.perf_counter() - begin
            del result
    return times


def _settle(nbytes: int) -> None:
    """Write dirty pages to the disk, return freed memory to the system and touch enough new pages.

    Otherwise one side would wait for the other's pending writes, reuse memory that the other freed,
    or wait for the host of a virtual machine to provide memory.
    """
    os.sync()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    np.ones(MEMORY * nbytes, np.uint8)


def _section(times: dict[Timed, list[float]], megabytes: int, rounds: int) -> Section:
    rows: list[list[Cell]] = []
    section = Section(
        f"State of {matrices(megabytes) * MATRIX_BYTES / 1e9:.2f} GB, {rounds} rounds"
    )
    for name, suffix, _ in [key for key in times if key[2] == "plain"]:
        plain, ours = times[name, suffix, "plain"], times[name, suffix, "ours"]
        ratio = statistics.median(plain) / statistics.median(ours)
        rows.append([name, suffix, _spread(plain), _spread(ours), f"{ratio:.2f}"])
        least = LEAST_CONVERTING if name == CONVERT else LEAST
        section.checks.append(
            Check(
                f"{name} {suffix}",
                "all",
                ratio >= least,
                f"ratio {ratio:.2f}",
                f"at least {least:.2f}",
            )
        )
    section.blocks = [
        "Seconds: median (minimum-maximum) of the plain library call and of ours. The order "
        "alternates. Before each call, pending writes are finished and memory is as in a new "
        "process. Each format runs in its own process. Ours computes and checks a CRC-32 of every "
        "tensor, flushes to the disk and renames. Loading fills the module, or JAX arrays. Just "
        "written: the file is in the page cache because it was written. Not cached: the system was "
        "asked to drop it. Cached by reading: it is loaded again. Converting transposes every "
        "kernel. It is compared with reading every value and saving the same amount with the plain "
        "library. Ratio: the plain call's time over ours.",
        Table(["job", "format", "plain", "ours", "ratio"], rows),
    ]
    return section


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
