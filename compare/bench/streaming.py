"""Convert a checkpoint larger than memory need be: how much memory does it take beyond the largest tensor?"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from ..checkpoint.formats import safetensors
from ..checkpoint.tensors import InMemory, Spec
from ..checkpoint.verify import verify_checkpoint
from ..conversion.mapping import KeyPath, Row, StateMapping
from ..report.model import Cell, Check, Section, Table
from ..subprocesses import ON_CPU, run_module

# Allowed beyond the largest tensor: for blocks, batches of small tensors, the libraries' buffers.
ROOM_BYTES = 300_000_000
_HIDDEN, _INNER = 4096, 11008


class Synthetic(InMemory):
    """A model's tensors, an embedding and layers, made when they are asked for."""

    def __init__(self, megabytes: int) -> None:
        words = max(1, min(32768, megabytes * 1_000_000 // 15 // (2 * _HIDDEN)))
        layers = max(
            1, (megabytes * 1_000_000 - 2 * words * _HIDDEN) // (2 * _HIDDEN * (_INNER + 1))
        )
        specs: dict[KeyPath, Spec] = {("embed.weight",): Spec((words, _HIDDEN), "bfloat16")}
        for layer in range(layers):
            specs[(f"layers.{layer}.fc.weight",)] = Spec((_INNER, _HIDDEN), "bfloat16")
            specs[(f"layers.{layer}.norm.weight",)] = Spec((_HIDDEN,), "bfloat16")
        super().__init__("torch", {}, specs)

    def pieces(self, path: KeyPath) -> Iterable[np.ndarray]:
        """Return random bits, the same whenever they are asked for."""
        random = np.random.default_rng(list(str(path[0]).encode()))
        return [
            random.integers(0, 2**16, self.specs[path].shape, dtype=np.uint16).view(
                ml_dtypes.bfloat16
            )
        ]

    def table(self) -> StateMapping:
        """Return where Flax keeps them."""
        rows = [Row("embed.weight", ("params", "embed", "embedding"))]
        for name in (str(path[0]) for path in self.specs if path[0] != "embed.weight"):
            _, layer, module, _ = name.split(".")
            leaf = ("kernel", "transposed") if module == "fc" else ("scale", "same")
            rows.append(Row(name, ("params", f"layers_{layer}", module, leaf[0]), leaf[1]))
        return StateMapping(tuple(rows))


def sections(megabytes: int) -> Iterator[Section | str]:
    """Yield one section with a row for each conversion; on the way, what is being done."""
    synthetic = Synthetic(megabytes)
    nbytes = sum(spec.nbytes for spec in synthetic.specs.values())
    largest = max(spec.nbytes for spec in synthetic.specs.values())
    section = Section(f"{nbytes / 1e9:.2f} GB converted tensor by tensor")
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield "making the checkpoint"
        safetensors.write(folder / "torch.safetensors", synthetic)
        synthetic.table().save(folder / "map.json")
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
        f"{len(synthetic.specs)} tensors of bfloat16, the largest of {largest / 1e6:,.0f} MB. Peak resident memory "
        "above what the process has once everything is imported, and that, in MB; seconds.",
        Table(["from", "to", "peak above base", "base", "seconds"], rows),
    ]
    yield section
