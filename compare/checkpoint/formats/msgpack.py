"""The Flax msgpack format: nested dicts of NumPy arrays, with the manifest at the top level."""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

from ...conversion.errors import shown
from ...conversion.mapping import KeyPath, slashed
from ...files import atomic_file
from ..blocks import blocks
from ..errors import CheckpointError
from ..manifest import (
    KEY,
    Manifest,
    in_manifests_order,
    linen_or_nnx,
    manifest_of,
    no_name_twice,
    start,
)
from ..reader import ArrayAndChecksum, Reader
from ..tensors import Spec, Tensors, checked, spec_of

_NDARRAY, _SCALAR = 1, 3  # the extension types of flax.serialization
_BIN_32 = b"\xc6"  # the type of bytes whose length takes four bytes
_MAX_HEAD = 1024  # dtype and shape take fewer bytes
_CHUNKED = "__msgpack_chunked_array__"


def open_(path: Path) -> Reader:
    """Read the file into memory.

    Raises:
        CheckpointError: the file is not msgpack, or does not contain nested dicts of arrays.
    """
    try:
        data = np.fromfile(path, np.uint8).data  # uses huge pages of memory, unlike `read_bytes`
        tree = msgpack.unpackb(
            data, ext_hook=_array, object_pairs_hook=_object, strict_map_key=False, raw=False
        )
    except RecursionError:
        raise _broken(path, "nested too deeply") from None
    except Exception as error:  # msgpack and NumPy raise a dozen unrelated types on bad bytes
        raise _broken(path, shown(error) if str(error) else type(error).__name__) from error
    if not isinstance(tree, dict):
        raise CheckpointError(path, f"holds a {type(tree).__name__}; expected Linen variables")
    try:
        manifest = Manifest.loads(tree.pop(KEY)) if KEY in tree else None
    except ValueError as error:
        raise _broken(path, shown(error)) from error
    try:
        arrays: dict[KeyPath, np.ndarray] = flatten_dict(tree)
    except RecursionError:
        raise _broken(path, "nested too deeply") from None
    for key, value in arrays.items():
        if not isinstance(value, np.ndarray):
            name = shown(slashed(key))
            raise CheckpointError(
                path,
                f"{name}: is a {type(value).__name__}, not an array of values",
                key=name,
                mend="save only the variables; for a TrainState, {'params': state.params}",
            )
    try:
        specs: dict[KeyPath, Spec] = {key: spec_of(array) for key, array in arrays.items()}
    except ValueError as error:
        raise _broken(path, shown(error)) from error
    aliases: dict[KeyPath, KeyPath] = {}
    if manifest is not None:
        specs, aliases = in_manifests_order(path, specs, manifest), dict(manifest.aliases)
    by_words = {tuple(map(str, key)): array for key, array in arrays.items()}
    if len(by_words) != len(arrays):
        raise _broken(path, "a name occurs twice, as a number and as a string")
    layout = manifest.layout if manifest else linen_or_nnx(specs)
    return MsgpackReader(by_words, path, layout, specs, manifest, aliases)


class MsgpackReader(Reader):
    """An open msgpack file. Its arrays are views of the file's bytes in memory."""

    format = "msgpack"

    def __init__(self, arrays: dict[tuple[str, ...], np.ndarray], *header: Any) -> None:
        super().__init__(*header)
        self._arrays = arrays

    def read_tensor(self, path: KeyPath) -> ArrayAndChecksum:
        """Return the array; no checksum was computed."""
        return self._arrays[tuple(map(str, path))], None

    def close(self) -> None:
        """Release the file's bytes."""
        self._arrays = {}


def write(path: Path, tensors: Tensors) -> None:
    """Write the tree, tensor by tensor.

    All steps of a path are written as strings; the manifest records which were numbers.
    `flax.serialization.msgpack_serialize` would keep the whole file in memory, twice.

    Raises:
        CheckpointError: two names would be the same.
    """
    tree = tree_of(path, {key: key for key in tensors.specs})
    checksums: dict[KeyPath, str] = {}
    packer = msgpack.Packer()
    with atomic_file(path) as stream:

        def write_node(node: Any, more_entries: int = 0) -> None:
            if not isinstance(node, dict):
                checksums[node] = _write_array(
                    stream, packer, tensors.specs[node], tensors.pieces(node)
                )
                return
            stream.write(packer.pack_map_header(len(node) + more_entries))
            for name, child in node.items():
                stream.write(packer.pack(name))
                write_node(child)

        write_node(tree, more_entries=1)
        manifest = manifest_of(tensors).with_checksums(checksums)
        stream.write(packer.pack(KEY) + packer.pack(manifest.dumps()))


def _write_array(
    stream: BinaryIO, packer: msgpack.Packer, spec: Spec, pieces: Iterable[np.ndarray]
) -> str:
    """Write one array as Flax does, and return its checksum.

    Source: `flax.serialization`. An array is an extension entry with shape, dtype and bytes. An
    array larger than `MAX_CHUNK_SIZE` is a dict of such entries.
    """
    digest = start(spec)
    data = (block for piece in pieces for block in blocks(piece, alone=True))
    if spec.nbytes <= serialization.MAX_CHUNK_SIZE:
        _write_entry(stream, packer, spec.shape, spec, data, digest)
        return str(digest.hexdigest())
    counts = _chunk_sizes(spec)
    shape = {str(axis): length for axis, length in enumerate(spec.shape)}
    stream.write(packer.pack_map_header(3) + packer.pack(_CHUNKED) + packer.pack(True))
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
    return [min(largest, size - begin) for begin in range(0, size, largest)]


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
    words = {tuple(map(str, key)): leaf for key, leaf in leaves.items()}
    if len(words) != len(leaves) or any(key[0] == KEY or _CHUNKED in key for key in words):
        raise CheckpointError(
            path, "two names are the same when written as strings", mend="rename one"
        )
    nested = [key for key in words if any(key[:end] in words for end in range(1, len(key)))]
    if nested:
        raise CheckpointError(
            path, f"the name {'/'.join(nested[0])} lies within another array", mend="rename one"
        )
    return unflatten_dict(words)


def _array(kind: int, data: bytes) -> Any:
    """Return the array of an extension entry, after checking its declared size."""
    if kind not in (_NDARRAY, _SCALAR):
        raise ValueError(f"an entry of the extension type {kind}")
    head = msgpack.Unpacker(raw=True)
    head.feed(data[:_MAX_HEAD])
    parts, shape, name = head.read_array_header(), head.unpack(), head.unpack()
    spec = checked(list(shape), name.decode())
    begin = len(data) - spec.nbytes
    if (
        parts == 3
        and begin > 0
        and data[head.tell() : begin] == _BIN_32 + spec.nbytes.to_bytes(4, "big")
    ):
        # Not unpacked, so that a large array is not copied.
        return np.frombuffer(data, spec.numpy, offset=begin).reshape(spec.shape)
    _, _, values = msgpack.unpackb(data, raw=True)
    if len(values) != spec.nbytes:
        raise ValueError(f"an array {spec.dtype} {spec.shape} in {len(values)} bytes")
    return np.frombuffer(values, dtype=spec.numpy).reshape(spec.shape)


def _object(pairs: list[tuple[Any, Any]]) -> Any:
    entries = no_name_twice(pairs)
    return _joined(entries) if _CHUNKED in entries else entries


def _joined(parts: Mapping[Any, Any]) -> np.ndarray:
    """Return an array that Flax wrote in chunks, because an entry holds less than 4 GiB."""
    shape = [parts["shape"][str(axis)] for axis in range(len(parts["shape"]))]
    chunks = [parts["chunks"][str(index)] for index in range(len(parts["chunks"]))]
    spec = checked(shape, chunks[0].dtype.name)
    flat = np.concatenate(chunks)
    if flat.nbytes != spec.nbytes or parts.keys() != {_CHUNKED, "shape", "chunks"}:
        raise ValueError(f"an array {spec.dtype} {spec.shape} in {flat.nbytes} bytes")
    return flat.reshape(spec.shape)


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        path, f"not a whole Flax msgpack file ({reason})", mend="take another copy"
    )
