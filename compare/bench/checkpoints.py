"""Save, load and convert beside the plain library calls, interleaved on the same data in one run.

Each format has a process of its own, as in a program that saves or loads: how fast memory is to be
had depends on what a process did before (NumPy leaves huge pages behind in the allocator).
"""

import ctypes
import os
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
from ..files import forget
from ..report.model import Cell, Check, Section, Table

SIDE = 2048
MATRIX_BYTES = 4 * SIDE * SIDE
SUFFIXES = (".pth", ".safetensors", ".msgpack", ".orbax")
CONVERT = "convert"
MEMORY = 5  # times the data: as much as either needs at once
# What ours may take beside the plain call, or beside reading and writing.
LEAST, LEAST_CONVERTING = 0.8, 1 / 1.5

Timed = tuple[str, str, str]  # job, format, whose


class Job(NamedTuple):
    """What is timed: the plain library call, and ours. `before` is not."""

    name: str
    suffix: str
    plain: Callable[[], Any]
    ours: Callable[[], Any]
    before: Callable[[str], None] = lambda whose: None


class Bench:
    """The data, as a torch module and as Linen variables, and where it is written."""

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

    def path(self, whose: str, suffix: str) -> Path:
        """Return where one side writes."""
        return self.folder / f"{whose}{suffix}"

    def source(self, suffix: str) -> Any:
        """Return the state as the format's own framework has it."""
        return self.variables if suffix in (".msgpack", ".orbax") else self.module

    def jobs(self, group: str) -> Iterator[Job]:
        """Yield what is timed of a format, or of converting."""
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
            "load, not cached", group, plain, load, lambda whose: forget(self.path(whose, group))
        )
        yield Job("load, cached by reading", group, plain, load)

    def save(self, suffix: str) -> None:
        """Save by the plain library."""
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
        """Load by the plain library into the module, or into JAX arrays."""
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
        """Read every value into memory, and write as many."""
        from safetensors.torch import load_file

        for tensor in load_file(self.path("ours", ".safetensors")).values():
            tensor.clone()
        self.save(suffix)


def matrices(megabytes: int) -> int:
    """Return how many matrices make about that many megabytes."""
    return max(1, megabytes * 1_000_000 // MATRIX_BYTES)


def sections(megabytes: int, rounds: int) -> Iterator[Section | str]:
    """Yield one section with the ratios; on the way, which round it is."""
    times: dict[Timed, list[float]] = {}
    for group in (*SUFFIXES, CONVERT):
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(
                1, get_context("spawn"), _prepare, (Path(folder), megabytes, group)
            ) as process,
        ):
            yield f"{group}: round 0 of {rounds}"
            for number, found in enumerate(process.map(_round, range(rounds + 1))):
                yield f"{group}: round {min(number + 1, rounds)} of {rounds}"
                for key, seconds in found.items() if number else ():  # the first warms up
                    times.setdefault(key, []).append(seconds)
    yield _section(times, megabytes, rounds)


_PREPARED: list[tuple[Bench, list[Job]]] = []  # of the process that times


def _prepare(folder: Path, megabytes: int, group: str) -> None:
    bench = Bench(folder, megabytes)
    _PREPARED.append((bench, list(bench.jobs(group))))


def _round(number: int) -> dict[Timed, float]:
    """Return the seconds of every job of the process, each side once."""
    ((bench, jobs),) = _PREPARED
    times = {}
    for job in jobs:
        both = [("plain", job.plain), ("ours", job.ours)]
        for whose, call in (
            both if number % 2 else reversed(both)
        ):  # each comes after the other as often
            job.before(whose)
            _settle(bench.nbytes)
            begin = time.perf_counter()
            found = call()
            jax.block_until_ready(found if isinstance(found, dict) else None)
            times[job.name, job.suffix, whose] = time.perf_counter() - begin
            del found
    return times


def _settle(nbytes: int) -> None:
    """Leave nothing to be written, no memory in the allocator's hand, and enough of it in the system's.

    Else one would wait for what the other has left to be written, use again memory that the other
    gave back, or wait for memory from the host of a virtual machine.
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
        "Seconds, median (least to greatest), of the plain library call and of ours, now one first and now the other, "
        "nothing left to be written, memory as in a new process, each format in its own. Ours takes and checks a "
        "CRC-32 of every tensor, flushes to the disk and renames. Loading is into the module, or into JAX arrays. Just "
        "written: the file is in the system's cache as it was written; not cached: the system was asked to forget it; "
        "cached by reading: it is loaded once more. Converting, every kernel transposed, is beside reading every value "
        "and the plain call that writes as many. Ratio: the plain call's time over ours.",
        Table(["job", "format", "plain", "ours", "ratio"], rows),
    ]
    return section


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
