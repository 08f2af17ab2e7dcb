"""The Flax msgpack format: nested dicts of NumPy arrays.

The format has no place for metadata, and `flax.serialization.msgpack_restore` shall return the
variables alone. So the last array is written in the way that Flax has for arrays above 1 GiB, as a
dict with its chunks. Flax reads that dict's `shape` and `chunks`, and the manifest is a third entry
of it. Files of older versions have the manifest at the top level, and are read too.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
from flax import serialization
from flax.traverse_util import unflatten_dict

from ...conversion.mapping import KeyPath, slashed, words
from ...files.memory import Budget
from ...files.printable import shown, with_article
from ...files.reading import InputFile, Snapshot
from ...files.writing import NO_RULES, Rules, atomic_file
from ..blocks import blocks
from ..errors import CheckpointError
from ..manifest import (
    KEY,
    Manifest,
    in_manifests_order,
    linen_or_nnx,
    manifest_of,
    start,
)
from ..reader import FileReader, Location, Reader
from ..tensors import Spec, Tensors
from . import msgpack_tree
from .parts import Select, flax_part, leaves, require_none

_NDARRAY = 1  # the extension type of flax.serialization
_BIN_32 = b"\xc6"  # the type of bytes whose length takes four bytes


def open_(path: Path, budget: Budget, select: Select = ()) -> Reader:
    """Open the file. Names and shapes are read now, values on demand.

    Raises:
        CheckpointError: the file is not msgpack, does not contain nested dicts of arrays, or has no
            such part.
        FileError: its names do not fit the budget.
    """
    with InputFile(path).kept() as file:
        arrays, manifest, left_out = _arrays(file, budget, select)
        specs = {key: array.spec for key, array in arrays.items()}
        aliases: dict[KeyPath, KeyPath] = {}
        if manifest is not None:
            specs, aliases = in_manifests_order(path, specs, manifest), dict(manifest.aliases)
        by_words = {words(key): array for key, array in arrays.items()}
        if len(by_words) != len(arrays):
            raise _broken(path, "a name occurs twice, as a number and as a string")
        layout = manifest.layout if manifest else linen_or_nnx(specs)
        return MsgpackReader(
            {key: array.chunks for key, array in by_words.items()},
            {key: Location(file, array.chunks[0][0]) for key, array in by_words.items()},
            path,
            layout,
            specs,
            manifest,
            aliases,
            budget=budget,
            snapshot=Snapshot({path: file.state}),
            left_out=left_out,
        )


def _arrays(
    file: InputFile, budget: Budget, select: Select
) -> tuple[dict[KeyPath, msgpack_tree.Array], Manifest | None, tuple[str, ...]]:
    """Return the arrays by path, the manifest, and the names of what is left out."""
    path = file.path
    reader = msgpack_tree.TreeReader(file, budget, KEY)
    try:
        tree = reader.read()
    except msgpack_tree.ListError as error:
        if error.path:
            raise _no_array(path, error.path, "list") from error
        raise _no_variables(path, "list") from error
    except (ValueError, EOFError) as error:
        raise _broken(path, shown(error)) from error
    if not isinstance(tree, dict):
        raise _no_variables(path, _what(tree))
    try:
        texts = [*reader.texts, *([tree.pop(KEY)] if KEY in tree else [])]
        if len(texts) > 1:
            raise ValueError("it has two manifests")
        manifest = Manifest.loads(texts[0], path, budget) if texts else None
    except ValueError as error:
        raise _broken(path, shown(error)) from error
    if manifest is None:
        part = flax_part(path, tree, select, _is_array, _what)
        return {key: leaf for key, (_, leaf) in part.leaves.items()}, None, part.left_out
    require_none(path, select, "the file holds only state, as `save_checkpoint` writes it")
    arrays = dict(leaves(tree))
    for key, value in arrays.items():
        if not _is_array(value):
            raise _broken(path, f"{shown(slashed(key))} is a {_what(value)}, not an array")
    return arrays, manifest, ()


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, msgpack_tree.Array)


def _what(leaf: Any) -> str:
    """Return the name of the leaf's Python type."""
    return leaf.what if isinstance(leaf, msgpack_tree.Other) else type(leaf).__name__


def _no_variables(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        path,
        f"holds {with_article(what)}; expected Linen variables",
        expected="Linen variables",
        found=with_article(what),
        mend="save only the variables",
    )


def _no_array(path: Path, key: KeyPath, what: str) -> CheckpointError:
    name = shown(slashed(key))
    return CheckpointError(
        path,
        f"{name}: is {with_article(what)}, not an array of values",
        key=name,
        expected="an array of values",
        found=with_article(what),
        mend="save only the variables; for a TrainState, {'params': state.params}",
    )


class MsgpackReader(FileReader):
    """An open msgpack file. `chunks` has the first byte and size of each chunk of each array."""

    format = "msgpack"

    def __init__(
        self,
        chunks: Mapping[tuple[str, ...], tuple[tuple[int, int], ...]],
        *header: Any,
        **more: Any,
    ) -> None:
        super().__init__(*header, **more)
        self._chunks = chunks

    def fill(self, path: KeyPath, part: memoryview, offset: int) -> None:
        """Fill the memory with the bytes of one tensor from an offset, chunk by chunk."""
        file, _ = self.location(path)
        for begin, size in self._chunks[words(path)]:
            if part.nbytes and offset < size:
                count = min(part.nbytes, size - offset)
                file.fill(part[:count], begin + offset)
                part, offset = part[count:], offset + count
            offset -= size

    def _is_mapped(self, path: KeyPath) -> bool:
        return len(self._chunks[words(path)]) == 1 and super()._is_mapped(path)


def write(path: Path, tensors: Tensors, rules: Rules = NO_RULES) -> None:
    """Write the tree, tensor by tensor.

    All steps of a path are written as strings; the manifest records which were numbers.
    `flax.serialization.msgpack_serialize` would keep the whole file in memory, twice.

    Raises:
        CheckpointError: two names would be the same.
    """
    tree = tree_of(path, {key: key for key in tensors.specs})
    keys = [key for _, key in leaves(tree)]
    checksums: dict[KeyPath, str] = {}
    packer = msgpack.Packer()
    with atomic_file(path, rules) as stream:

        def write_node(node: Any) -> None:
            if isinstance(node, dict):
                stream.write(packer.pack_map_header(len(node)))
                for name, child in node.items():
                    stream.write(packer.pack(name))
                    write_node(child)
                return
            spec, pieces, is_last = tensors.specs[node], tensors.pieces(node), node == keys[-1]
            checksums[node] = _write_array(stream, packer, spec, pieces, has_manifest=is_last)
            if is_last:
                manifest = manifest_of(tensors).with_checksums(checksums)
                stream.write(packer.pack(KEY) + packer.pack(manifest.dumps()))

        write_node(tree)


def _write_array(
    stream: BinaryIO,
    packer: msgpack.Packer,
    spec: Spec,
    pieces: Iterable[np.ndarray],
    *,
    has_manifest: bool,
) -> str:
    """Write one array as Flax does, and return its checksum.

    Source: `flax.serialization`. An array is an extension entry with shape, dtype and bytes. An
    array larger than `MAX_CHUNK_SIZE` is a dict of such entries. So is the one that `has_manifest`,
    which the caller writes after it.
    """
    digest = start(spec)
    data = (block for piece in pieces for block in blocks(piece, alone=True))
    if spec.nbytes <= serialization.MAX_CHUNK_SIZE and not has_manifest:
        _write_entry(stream, packer, spec.shape, spec, data, digest)
        return str(digest.hexdigest())
    counts = _chunk_sizes(spec)
    shape = {str(axis): length for axis, length in enumerate(spec.shape)}
    stream.write(packer.pack_map_header(4 if has_manifest else 3))
    stream.write(packer.pack(msgpack_tree.CHUNKED) + packer.pack(True))
    stream.write(packer.pack("shape") + packer.pack(shape))
    stream.write(packer.pack("chunks") + packer.pack_map_header(len(counts)))
    left_over = np.empty(0, np.uint8)
    for index, count in enumerate(counts):
        stream.write(packer.pack(str(index)))
        left_over = _write_entry(stream, packer, (count,), spec, data, digest, left_over)
    return str(digest.hexdigest())


def _chunk_sizes(spec: Spec) -> list[int]:
    """Return the number of elements in each chunk of an array."""
    largest, size = max(1, serialization.MAX_CHUNK_SIZE // spec.numpy.itemsize), prod(spec.shape)
    return [min(largest, size - begin) for begin in range(0, size, largest)] or [0]


def _write_entry(
    stream: BinaryIO,
    packer: msgpack.Packer,
    shape: tuple[int, ...],
    spec: Spec,
    data: Iterator[np.ndarray],
    digest: Any,
    left_over: np.ndarray | None = None,
) -> np.ndarray:
    """Write one entry, header and bytes, and return the bytes of its last block not yet written.

    Args:
        stream: where to write.
        packer: packs the header.
        shape: the shape of the entry.
        spec: the dtype of the entry.
        data: the bytes of the whole array, in blocks.
        digest: the checksum, updated with every byte that is written.
        left_over: the bytes that the previous entry returned.
    """
    missing = prod(shape) * spec.numpy.itemsize
    head = packer.pack_array_header(3) + packer.pack(shape) + packer.pack(spec.dtype)
    head += _BIN_32 + missing.to_bytes(4, "big")
    stream.write(b"\xc9" + (len(head) + missing).to_bytes(4, "big") + bytes([_NDARRAY]) + head)
    block = np.empty(0, np.uint8) if left_over is None else left_over
    while missing:
        block = block if block.nbytes else next(data)
        part, block = block[:missing], block[missing:]
        digest.update(part)
        stream.write(part.data)
        missing -= part.nbytes
    return block


def tree_of(path: Path, leaves: Mapping[KeyPath, Any]) -> dict[str, Any]:
    """Return the leaves as nested dicts with string keys.

    Raises:
        CheckpointError: two names would be the same, such as 0 and "0", or a name is reserved.
    """
    by_words = {words(key): leaf for key, leaf in leaves.items()}
    if len(by_words) != len(leaves) or any(
        key[0] == KEY or msgpack_tree.CHUNKED in key for key in by_words
    ):
        raise CheckpointError(
            path,
            "two names are the same when written as strings",
            expected="names that differ as strings, none of them the format's own",
            found="two that are the same, or one of the format's",
            mend="rename one",
        )
    nested = [key for key in by_words if any(key[:end] in by_words for end in range(1, len(key)))]
    if nested:
        raise CheckpointError(
            path,
            f"the name {shown('/'.join(nested[0]))} lies within another array",
            key=shown("/".join(nested[0])),
            expected="an array or names at each place",
            found="both",
            mend="rename one",
        )
    return unflatten_dict(by_words)


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError.broken(path, "a whole Flax msgpack file", reason)
