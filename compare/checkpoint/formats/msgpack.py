"""The Flax msgpack format: nested dicts of NumPy arrays, and the manifest as one more entry at the top."""

from collections.abc import Iterator, Mapping
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
from ..reader import Stored, fetch_each
from ..tensors import Spec, Tensors, checked, spec_of

_NDARRAY, _SCALAR = 1, 3  # the extension types of flax.serialization
_BIN_32 = b"\xc6"  # begins bytes of a length in four
_MAX_HEAD = 1024  # more than dtype and shape take
_CHUNKED = "__msgpack_chunked_array__"


def open_(path: Path) -> Stored:
    """Read the file into memory.

    Raises:
        CheckpointError: no msgpack file, or anything in it but nested dicts of arrays.
    """
    try:
        data = np.fromfile(
            path, np.uint8
        ).data  # its memory comes in huge pages, that of bytes in small ones
        tree = msgpack.unpackb(
            data, ext_hook=_array, object_pairs_hook=_object, strict_map_key=False, raw=False
        )
    except RecursionError:
        raise _broken(path, "lists within lists") from None
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
        raise _broken(path, "dicts within dicts") from None
    for key, value in arrays.items():
        if not isinstance(value, np.ndarray):
            name = shown(slashed(key))
            raise CheckpointError(
                path,
                f"{name}: is a {type(value).__name__}, not an array of values",
                key=name,
                mend="save the variables alone: of a TrainState {'params': state.params}",
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
        raise _broken(path, "a name that stands twice, as a number and as a word")
    layout = manifest.layout if manifest else linen_or_nnx(specs)
    stored = Stored(path, "msgpack", layout, specs, manifest, aliases=aliases)
    stored.fetch = fetch_each(stored, lambda key: (by_words[tuple(map(str, key))], None))
    return stored


def write(path: Path, tensors: Tensors) -> None:
    """Write the tree, tensor by tensor; its steps are words, and the manifest tells which of them were numbers.

    `flax.serialization.msgpack_serialize` would hold all of it in memory, twice.

    Raises:
        CheckpointError: names that would coincide.
    """
    tree = tree_of(path, {key: key for key in tensors.specs})
    sums: dict[KeyPath, str] = {}
    packer = msgpack.Packer()
    with atomic_file(path) as stream:

        def put(node: Any, more: int = 0) -> None:
            if isinstance(node, dict):
                stream.write(packer.pack_map_header(len(node) + more))
                for name, inner in node.items():
                    stream.write(packer.pack(name))
                    put(inner)
                return
            spec, digest = tensors.specs[node], start(tensors.specs[node])
            sizes = iter(_chunks(stream, packer, spec))
            room = 0
            for block in (
                block for piece in tensors.pieces(node) for block in blocks(piece, alone=True)
            ):
                digest.update(block)
                while block.nbytes:
                    room = room or next(sizes)
                    part, block = block[:room], block[room:]
                    stream.write(part.data)
                    room -= part.nbytes
            for _ in sizes:  # an array without elements has an entry all the same
                pass
            sums[node] = digest.hexdigest()

        put(tree, more=1)
        stream.write(
            packer.pack(KEY) + packer.pack(manifest_of(tensors).with_checksums(sums).dumps())
        )


def _chunks(stream: BinaryIO, packer: msgpack.Packer, spec: Spec) -> Iterator[int]:
    """Write the head of each entry of an array, yielding how many bytes have to follow it.

    Source: `flax.serialization`: an extension entry of shape, dtype and bytes; above
    `MAX_CHUNK_SIZE` a dict of them.
    """
    most = serialization.MAX_CHUNK_SIZE
    if spec.nbytes <= most:
        yield from _head(stream, packer, spec.shape, spec)
        return
    each, size = max(1, most // spec.numpy.itemsize), prod(spec.shape)
    counts = [min(each, size - begin) for begin in range(0, size, each)]
    stream.write(packer.pack_map_header(3) + packer.pack(_CHUNKED) + packer.pack(True))
    stream.write(
        packer.pack("shape")
        + packer.pack({str(axis): length for axis, length in enumerate(spec.shape)})
    )
    stream.write(packer.pack("chunks") + packer.pack_map_header(len(counts)))
    for index, count in enumerate(counts):
        stream.write(packer.pack(str(index)))
        yield from _head(stream, packer, (count,), spec)


def _head(
    stream: BinaryIO, packer: msgpack.Packer, shape: tuple[int, ...], spec: Spec
) -> Iterator[int]:
    nbytes = prod(shape) * spec.numpy.itemsize
    inner = (
        packer.pack_array_header(3)
        + packer.pack(shape)
        + packer.pack(spec.dtype)
        + _BIN_32
        + nbytes.to_bytes(4, "big")
    )
    stream.write(b"\xc9" + (len(inner) + nbytes).to_bytes(4, "big") + bytes([_NDARRAY]) + inner)
    yield nbytes


def tree_of(path: Path, leaves: Mapping[KeyPath, Any]) -> dict[str, Any]:
    """Return the leaves as nested dicts of words.

    Raises:
        CheckpointError: names that would coincide, as 0 and "0", or one that is the manifest's.
    """
    words = {tuple(map(str, key)): leaf for key, leaf in leaves.items()}
    if len(words) != len(leaves) or any(key[0] == KEY or _CHUNKED in key for key in words):
        raise CheckpointError(
            path, "two of its names are the same when they are written as words", mend="rename one"
        )
    if twice := [key for key in words if any(key[:end] in words for end in range(1, len(key)))]:
        raise CheckpointError(
            path, f"{'/'.join(twice[0])} lies within another array", mend="rename one"
        )
    return unflatten_dict(words)


def _array(kind: int, data: bytes) -> Any:
    """Return the array of an extension entry, exactly as large as it says."""
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
        return np.frombuffer(data, spec.numpy, offset=begin).reshape(
            spec.shape
        )  # a large one is not copied
    _, _, values = msgpack.unpackb(data, raw=True)
    if len(values) != spec.nbytes:
        raise ValueError(f"an array {spec.dtype} {spec.shape} in {len(values)} bytes")
    return np.frombuffer(values, dtype=spec.numpy).reshape(spec.shape)


def _object(pairs: list[tuple[Any, Any]]) -> Any:
    found = no_name_twice(pairs)
    return _joined(found) if _CHUNKED in found else found


def _joined(parts: Mapping[Any, Any]) -> np.ndarray:
    """Return the array that Flax wrote in chunks, since one entry holds less than 4 GiB."""
    shape = [parts["shape"][str(axis)] for axis in range(len(parts["shape"]))]
    chunks = [parts["chunks"][str(index)] for index in range(len(parts["chunks"]))]
    spec = checked(shape, chunks[0].dtype.name)
    flat = np.concatenate(chunks)
    if flat.nbytes != spec.nbytes or parts.keys() != {_CHUNKED, "shape", "chunks"}:
        raise ValueError(f"an array {spec.dtype} {spec.shape} in {flat.nbytes} bytes")
    return flat.reshape(spec.shape)


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(path, f"not a whole Flax msgpack file ({why})", mend="take another copy")
