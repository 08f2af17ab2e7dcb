"""Convert a checkpoint larger than memory need be: how much memory does it take beyond the largest tensor?"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from ..checkpoint.formats import safetensors
from ..checkpoint.tensors import Spec, Tensors
from ..checkpoint.verify import verify_checkpoint
from ..conversion.mapping import KeyPath, Row, StateMapping
from ..report.model import Cell, Check, Section, Table
from ..subprocesses import ON_CPU, run_module

# Allowed beyond the largest tensor: for blocks, batches of small tensors, the libraries' buffers.
ROOM_BYTES = 300_000_000
_HIDDEN, _INNER = 4096, 11008


def synthetic(megabytes: int) -> Tensors:
    """Return the tensors of a model: an embedding and layers of random bits, made when asked for."""
    words = max(1, min(32768, megabytes * 1_000_000 // 15 // (2 * _HIDDEN)))
    layers = max(1, (megabytes * 1_000_000 - 2 * words * _HIDDEN) // (2 * _HIDDEN * (_INNER + 1)))
    specs: dict[KeyPath, Spec] = {("embed.weight",): Spec((words, _HIDDEN), "bfloat16")}
    for layer in range(layers):
        specs[(f"layers.{layer}.fc.weight",)] = Spec((_INNER, _HIDDEN), "bfloat16")
        specs[(f"layers.{layer}.norm.weight",)] = Spec((_HIDDEN,), "bfloat16")

    def pieces(path: KeyPath) -> Iterable[np.ndarray]:
        random = np.random.default_rng(list(str(path[0]).encode()))  # the same bits every time
        bits = random.integers(0, 2**16, specs[path].shape, dtype=np.uint16)
        return [bits.view(ml_dtypes.bfloat16)]

    return Tensors("torch", specs, pieces)


def flax_names(tensors: Tensors) -> StateMapping:
    """Return where Flax keeps the synthetic tensors."""
    rows = [Row("embed.weight", ("params", "embed", "embedding"))]
    for name in (str(path[0]) for path in tensors.specs if path[0] != "embed.weight"):
        _, layer, module, _ = name.split(".")
        leaf = ("kernel", "transposed") if module == "fc" else ("scale", "same")
        rows.append(Row(name, ("params", f"layers_{layer}", module, leaf[0]), leaf[1]))
    return StateMapping(tuple(rows))


def sections(megabytes: int) -> Iterator[Section | str]:
    """Yield one section with a row for each conversion; on the way, what is being done."""
    tensors = synthetic(megabytes)
    nbytes = sum(spec.nbytes for spec in tensors.specs.values())
    largest = max(spec.nbytes for spec in tensors.specs.values())
    section = Section(f"{nbytes / 1e9:.2f} GB converted tensor by tensor")
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield "making the checkpoint"
        safetensors.write(folder / "torch.safetensors", tensors)
        flax_names(tensors).save(folder / "map.json")
        for source, target, layout in (
            ("torch.safetensors", "flax.safetensors", "flax"),
            ("flax.safetensors", "back.safetensors", "torch"),
            ("torch.safetensors", "flax.orbax", "flax"),
            ("flax.orbax", "again.safetensors", "torch"),
        ):
            yield f"{source} to {target}"
            arguments = [
                str(folder / source),
                str(folder / target),
                str(folder / "map.json"),
                layout,
            ]
            done = run_module("compare.bench.streaming_worker", arguments, ON_CPU)
            above = 1024 * (done["peak"] - done["base"])
            rows.append(
                [
                    source,
                    target,
                    f"{above / 1e6:,.0f}",
                    f"{done['base'] / 1000:,.0f}",
                    f"{done['seconds']:.1f}",
                ]
            )
            allowed = f"at most {(largest + ROOM_BYTES) / 1e6:,.0f} MB"
            section.checks.append(
                Check(
                    f"memory, {source} to {target}",
                    "all",
                    above <= largest + ROOM_BYTES,
                    f"{above / 1e6:,.0f} MB",
                    allowed,
                )
            )
            yield f"comparing {source} and {target}"
            found = verify_checkpoint(folder / source, folder / target)
            section.checks.append(
                Check(
                    f"every bit, {source} to {target}",
                    "all",
                    not found,
                    f"{len(found)} tensors differ",
                    "none",
                )
            )
            if target in ("back.safetensors", "again.safetensors"):
                (folder / target).unlink()
    section.blocks = [
        f"{len(tensors.specs)} tensors of bfloat16, the largest of {largest / 1e6:,.0f} MB. Peak resident memory "
        "above what the process has once everything is imported, and that, in MB; seconds.",
        Table(["from", "to", "peak above base", "base", "seconds"], rows),
    ]
    yield section
