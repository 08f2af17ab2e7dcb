"""Two checkpoints of the same state, in whatever formats and layouts: is every element the same bit for bit?"""

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike

import numpy as np

from ..conversion.mapping import KeyPath, StateMapping
from .blocks import blocks
from .convert import planned
from .formats import open_checkpoint
from .load import steady
from .reader import Reader
from .tensors import FileLayout, Tensors
from .transforms import Progress, silent


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same on both sides, and how."""

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
    """Read both again, the source relaid as the target is, and compare every element bit for bit.

    Args:
        source: what was converted.
        target: what it was converted into.
        mapping: how torch and Flax names pair; without, what either file says, or how
            `compare.match` pairs them.
        dtype: what the source's floating tensors were cast to.
        progress: is called with the bytes done and the bytes in all.

    Returns:
        The differences; none if every name, shape, dtype and bit is the same.

    Raises:
        CheckpointError: either cannot be read, or they do not pair.
    """
    with open_checkpoint(target) as written:
        allowed = ("torch",) if written.layout == "torch" else ("linen", "nnx")
        table = mapping or written.mapping

        def work(stored: Reader) -> list[Difference]:
            tensors, _ = planned(stored, allowed, mapping=table, beside=target, dtype=dtype)
            return _differences(tensors, written, progress)

        return steady(source, work)


def _differences(tensors: Tensors, written: Reader, progress: Progress) -> list[Difference]:
    mine, its = _by_name(tensors, written.layout), _by_name(written.tensors(), tensors.layout)
    found = [
        Difference("/".join(name), "is only in the source") for name in mine.keys() - its.keys()
    ]
    found += [
        Difference("/".join(name), "is only in the target") for name in its.keys() - mine.keys()
    ]
    total, done = sum(spec.nbytes for spec in written.specs.values()), 0
    for name in [name for name in its if name in mine]:
        spec, other = tensors.specs[mine[name]], written.specs[its[name]]
        if spec != other:
            what = f"is {spec.dtype} {spec.shape} in the source, {other.dtype} {other.shape} in the target"
            found.append(Difference("/".join(name), what))
            continue
        (_, array) = next(iter(written.read([its[name]])))
        if differing := _differing_bytes(tensors.pieces(mine[name]), array):
            found.append(
                Difference(
                    "/".join(name), f"differs in {differing:,} of its {array.nbytes:,} bytes"
                )
            )
        done += array.nbytes
        progress(done, total)
    tied = {tuple(map(str, path)) for path in tensors.aliases} ^ {
        tuple(map(str, path)) for path in written.aliases
    }
    if tensors.layout == "torch":
        found += [Difference("/".join(name), "is tied on one side only") for name in sorted(tied)]
    return found


def _by_name(tensors: Tensors, other: FileLayout) -> dict[tuple[str, ...], KeyPath]:
    """Return the paths by their words; beside NNX, Linen's without the collection."""
    words = {tuple(map(str, path)): path for path in tensors.specs}
    if (tensors.layout, other) != ("linen", "nnx"):
        return words
    names = {name[1:]: path for name, path in words.items()}
    return names if len(names) == len(words) else words


def _differing_bytes(pieces: Iterable[np.ndarray], array: np.ndarray) -> int:
    flat, at, differing = np.ascontiguousarray(array).reshape(-1).view(np.uint8), 0, 0
    for piece in pieces:
        for block in blocks(piece):
            differing += int((block != flat[at : at + block.nbytes]).sum())
            at += block.nbytes
    return differing
