"""Save, load and convert beside the plain library calls, interleaved on the same data in one run."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from flax import serialization

from ..checkpoint import load_checkpoint, save_checkpoint
from ..checkpoint.convert_file import convert_checkpoint
from ..findings import Cell, Check, Section, Table
from ..mapping import Mapping, Row

SIDE = 2048  # a matrix of 16 MiB
SUFFIXES = (".pth", ".safetensors", ".msgpack", ".orbax")
# What ours may take beside the plain call, or beside reading and writing.
LEAST, LEAST_CONVERTING = 0.8, 1 / 1.5


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
        count = max(1, megabytes * 1_000_000 // (4 * SIDE * SIDE))
        self.module = torch.nn.ModuleList([torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(count)])
        kernels = {name.split(".")[0]: tensor.numpy().T for name, tensor in self.module.state_dict().items()}
        self.variables = {"params": {name: {"kernel": jnp.asarray(kernel)} for name, kernel in kernels.items()}}
        rows = (Row(f"{i}.weight", ("params", str(i), "kernel"), "transposed") for i in range(count))
        self.mapping = Mapping(tuple(rows))
        self.nbytes = count * 4 * SIDE * SIDE

    def path(self, whose: str, suffix: str) -> Path:
        """Return where one side writes."""
        return self.folder / f"{whose}{suffix}"

    def source(self, suffix: str) -> Any:
        """Return the state as the format's own framework has it."""
        return self.variables if suffix in (".msgpack", ".orbax") else self.module

    def jobs(self) -> Iterator[Job]:
        """Yield what is timed."""
        for suffix in SUFFIXES:
            path = self.path("ours", suffix)
            yield Job("save", suffix, partial(self.save, suffix), partial(save_checkpoint, path, self.source(suffix)))
        for suffix in SUFFIXES:
            load = partial(load_checkpoint, self.path("ours", suffix), self.source(suffix))
            yield Job("load", suffix, partial(self.load, suffix), load)
            forget = partial(self.forget, suffix)
            yield Job("load, not cached", suffix, partial(self.load, suffix), load, forget)
        for suffix in SUFFIXES[1:]:
            convert = partial(
                convert_checkpoint, self.path("ours", ".safetensors"), self.path("converted", suffix),
                mapping=self.mapping, layout="flax",
            )  # fmt: skip
            yield Job("convert", f".safetensors to {suffix}", partial(self.read_and_write, suffix), convert)

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
            return jax.tree.map(jnp.asarray, serialization.from_bytes(self.variables, path.read_bytes()))
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, self.variables)

    def read_and_write(self, suffix: str) -> None:
        """Read every value into memory, and write as many."""
        from safetensors.torch import load_file

        for tensor in load_file(self.path("ours", ".safetensors")).values():
            tensor.clone()
        self.save(suffix)

    def forget(self, suffix: str, whose: str) -> None:
        """Ask the system to forget the file's pages, as after a restart."""
        path = self.path(whose, suffix)
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def sections(megabytes: int, rounds: int) -> Iterator[Section | str]:
    """Yield one section with the ratios; on the way, which round it is."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), megabytes)
        times: dict[tuple[str, str], dict[str, list[float]]] = {}
        for number in range(rounds + 1):
            for job in bench.jobs():
                yield f"round {number} of {rounds}: {job.name} {job.suffix}"
                for whose, call in (("plain", job.plain), ("ours", job.ours)):
                    job.before(whose)
                    os.sync()  # else one would wait for what the other has left to be written
                    begin = time.perf_counter()
                    found = call()
                    jax.block_until_ready(found if isinstance(found, dict) else None)
                    seconds = time.perf_counter() - begin
                    del found
                    if number:  # the first warms up
                        times.setdefault((job.name, job.suffix), {}).setdefault(whose, []).append(seconds)
        yield _section(bench, times, rounds)


def _section(bench: Bench, times: dict[tuple[str, str], dict[str, list[float]]], rounds: int) -> Section:
    rows: list[list[Cell]] = []
    section = Section(f"State of {bench.nbytes / 1e9:.2f} GB, {rounds} rounds")
    for (name, suffix), found in times.items():
        ratio = statistics.median(found["plain"]) / statistics.median(found["ours"])
        rows.append([name, suffix, _spread(found["plain"]), _spread(found["ours"]), f"{ratio:.2f}"])
        least = LEAST_CONVERTING if name == "convert" else LEAST
        section.checks.append(
            Check(f"{name} {suffix}", "all", ratio >= least, f"ratio {ratio:.2f}", f"at least {least:.2f}")
        )
    section.blocks = [
        "Seconds, median (least to greatest), of the plain library call and of ours, in turn. Ours takes and checks a "
        "CRC-32 of every tensor, flushes to the disk and renames. Loading is into the module, or into JAX arrays. Not "
        "cached: the system was asked to forget the file. Converting, every kernel transposed, is beside reading every "
        "value and the plain call that writes as many. Ratio: the plain call's time over ours.",
        Table(["job", "format", "plain", "ours", "ratio"], rows),
    ]
    return section


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
