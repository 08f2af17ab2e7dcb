"""Compare two checkpoints of the same state bit for bit, in any formats and layouts."""

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike

import numpy as np

from ..conversion.mapping import KeyPath, StateMapping
from .blocks import blocks
from .convert import planned
from .errors import CheckpointError
from .formats import open_checkpoint
from .load import steady
from .reader import Reader
from .tensors import FileLayout, Tensors, whole
from .transforms import Progress, cast, relaid, silent


@dataclass(frozen=True)
class Difference:
    """One tensor that differs between the two sides, and how."""

    name: str
    what: str


def verify_checkpoint(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    mapping: StateMapping | None = None,
    dtype: str | None = None,
    progress: Progress = silent,
) -> list[Difference]:
    """Read both checkpoints, the source in the target's layout, and compare every element.

    Args:
        source: the checkpoint that was converted.
        target: the checkpoint that it was converted to.
        mapping: how torch and Flax names pair. Default: the mapping in either file, or else what
            `compare.match` finds.
        dtype: the dtype that the source's floating tensors were cast to.
        progress: called with the bytes done and the total bytes.

    Returns:
        The differences; empty if every name, shape, dtype and bit is the same.

    Raises:
        CheckpointError: a checkpoint cannot be read, or their names do not pair.
    """
    with open_checkpoint(target) as written:
        allowed = ("torch",) if written.layout == "torch" else ("linen", "nnx")
        table = mapping or written.mapping

        def work(stored: Reader) -> list[Difference]:
            if mapping is not None and (stored.layout == "torch") == (written.layout == "torch"):
                raise CheckpointError(
                    target, "mapping= has no effect: both have the same layout", mend="leave it out"
                )
            both = _with_torch_names(stored, written, dtype)
            if both is not None:
                return _differences(*both, progress)
            tensors, _ = planned(stored, allowed, mapping=table, beside=target, dtype=dtype)
            return _differences(tensors, written.tensors(), progress)

        return steady(source, work)


def _with_torch_names(
    stored: Reader, written: Reader, dtype: str | None
) -> tuple[Tensors, Tensors] | None:
    """Return a Linen and an NNX checkpoint under their torch names, if both files have these."""
    if {stored.layout, written.layout} != {"linen", "nnx"}:
        return None
    if stored.mapping is None or written.mapping is None:
        return None
    source = relaid(stored.path, stored.tensors(), stored.mapping)
    target = relaid(written.path, written.tensors(), written.mapping)
    return (source if dtype is None else cast(source, dtype, stored.path)), target


def _differences(source: Tensors, target: Tensors, progress: Progress) -> list[Difference]:
    source_paths = _by_name(source, target.layout)
    target_paths = _by_name(target, source.layout)
    differences = [
        Difference("/".join(name), "is only in the source")
        for name in source_paths
        if name not in target_paths
    ]
    differences += [
        Difference("/".join(name), "is only in the target")
        for name in target_paths
        if name not in source_paths
    ]
    total, done = sum(spec.nbytes for spec in target.specs.values()), 0
    for name in [name for name in target_paths if name in source_paths]:
        spec, other = source.specs[source_paths[name]], target.specs[target_paths[name]]
        if spec != other:
            description = (
                f"is {spec.dtype} {spec.shape} in the source, "
                f"{other.dtype} {other.shape} in the target"
            )
            differences.append(Difference("/".join(name), description))
            continue
        array = whole(target, target_paths[name])
        if differing := _differing_bytes(source.pieces(source_paths[name]), array):
            differences.append(
                Difference(
                    "/".join(name), f"differs in {differing:,} of its {array.nbytes:,} bytes"
                )
            )
        done += array.nbytes
        progress(done, total)
    tied = {tuple(map(str, path)) for path in source.aliases} ^ {
        tuple(map(str, path)) for path in target.aliases
    }
    if source.layout == "torch":
        differences += [
            Difference("/".join(name), "is tied on one side only") for name in sorted(tied)
        ]
    return differences


def _by_name(tensors: Tensors, other: FileLayout) -> dict[tuple[str, ...], KeyPath]:
    """Return the paths by name; Linen's names lose the collection if the other side is NNX."""
    names = {tuple(map(str, path)): path for path in tensors.specs}
    if (tensors.layout, other) != ("linen", "nnx"):
        return names
    shorter = {name[1:]: path for name, path in names.items()}
    return shorter if len(shorter) == len(names) else names


def _differing_bytes(pieces: Iterable[np.ndarray], array: np.ndarray) -> int:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    begin, differing = 0, 0
    for piece in pieces:
        for block in blocks(piece):
            differing += int((block != flat[begin : begin + block.nbytes]).sum())
            begin += block.nbytes
    return differing
