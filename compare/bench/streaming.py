"""Measure the peak memory of converting a checkpoint much larger than its largest tensor."""

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

# Memory allowed on top of the largest tensor: blocks, batches of small tensors, library buffers.
ROOM_BYTES = 300_000_000
_HIDDEN, _INNER = 4096, 11008


def synthetic(megabytes: int) -> Tensors:
    """Return the tensors of a model, an embedding and layers of random bits, made when read."""
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
    """Return the mapping of the synthetic tensors to Flax paths."""
    rows = [Row("embed.weight", ("params", "embed", "embedding"))]
    for name in (str(path[0]) for path in tensors.specs if path[0] != "embed.weight"):
        _, layer, module, _ = name.split(".")
        leaf, layout = ("kernel", "transposed") if module == "fc" else ("scale", "same")
        rows.append(Row(name, ("params", f"layers_{layer}", module, leaf), layout))
    return StateMapping(tuple(rows))


def sections(megabytes: int) -> Iterator[Section | str]:
    """Yield the progress, then one section with a row for each conversion."""
    tensors = synthetic(megabytes)
    nbytes = sum(spec.nbytes for spec in tensors.specs.values())
    largest = max(spec.nbytes for spec in tensors.specs.values())
    section = Section(f"{nbytes / 1e9:.2f} GB converted tensor by tensor")
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
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
            usage = run_module("compare.bench.streaming_worker", arguments, ON_CPU)
            above_base = 1024 * (usage["peak"] - usage["base"])
            rows.append(
                [
                    source,
                    target,
                    f"{above_base / 1e6:,.0f}",
                    f"{usage['base'] / 1000:,.0f}",
                    f"{usage['seconds']:.1f}",
                ]
            )
            allowed = f"at most {(largest + ROOM_BYTES) / 1e6:,.0f} MB"
            section.checks.append(
                Check(
                    f"memory, {source} to {target}",
                    "all",
                    above_base <= largest + ROOM_BYTES,
                    f"{above_base / 1e6:,.0f} MB",
                    allowed,
                )
            )
            yield f"comparing {source} and {target}"
            differences = verify_checkpoint(folder / source, folder / target)
            section.checks.append(
                Check(
                    f"every bit, {source} to {target}",
                    "all",
                    not differences,
                    f"{len(differences)} tensors differ",
                    "none",
                )
            )
            if target in ("back.safetensors", "again.safetensors"):
                (folder / target).unlink()
    section.blocks = [
        f"{len(tensors.specs)} tensors in bfloat16; the largest has {largest / 1e6:,.0f} MB. The "
        "base is the resident memory of the process after all imports. Memory is in MB.",
        Table(["from", "to", "peak above base", "base", "seconds"], rows),
    ]
    yield section
