"""The safetensors format, read and written without the safetensors library.

The library accepts a name that occurs twice, needs all tensors in memory to write them, and writes
a transposed NumPy view as another matrix (its issue 825). Source: the format's README,
https://github.com/huggingface/safetensors.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...conversion.mapping import KeyPath, slashed
from ...files.memory import Budget
from ...files.printable import shown
from ...files.reading import InputFile, Snapshot, parse_json
from ...files.writing import NO_RULES, Rules, atomic_file
from ..blocks import BATCH_BYTES, blocks, in_batches
from ..errors import CheckpointError
from ..manifest import (
    KEY,
    Manifest,
    in_manifests_order,
    linen_or_nnx,
    manifest_of,
    start,
    torch_or_flax,
)
from ..reader import PART_BYTES, FileReader, Location, Reader
from ..tensors import FileLayout, Spec, Tensors, checked, with_copies

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}
_NUMPY_NAMES = {name: dtype for dtype, name in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the library's limit
MAX_TENSORS = 100_000
_MAX_METADATA = 200_000  # entries of the metadata, of which tied names need one each
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


class Header(NamedTuple):
    """The header: the spec of each tensor, where its bytes are, and the metadata."""

    specs: dict[str, Spec]
    locations: dict[str, Location]
    metadata: dict[str, str]


def open_(path: Path, budget: Budget) -> Reader:
    """Open the file. Only its header is read now.

    Raises:
        CheckpointError: the file is not a whole safetensors file.
        FileError: its header does not fit the budget.
    """
    with InputFile(path).kept() as file:
        header = read_header(file, budget)
        return SafetensorsReader(path, header, budget, Snapshot({path: file.state}))


class SafetensorsReader(FileReader):
    """One open file, or several with an index. The tensors are in the manifest's order.

    Args:
        path: the file or folder.
        header: the names, shapes, dtypes and metadata of all files together.
        budget: the limit of what is read and held.
        snapshot: the files, as they were when they were opened.
    """

    format = "safetensors"

    def __init__(self, path: Path, header: Header, budget: Budget, snapshot: Snapshot) -> None:
        manifest = _manifest(path, header.metadata, budget)
        if manifest is None and header.metadata.get("format") == "flax":
            joint = "/" if any("/" in name for name in header.specs) else "."
            names = {tuple(name.split(joint)): name for name in header.specs}
            layout: FileLayout = linen_or_nnx(names)
        else:
            layout = manifest.layout if manifest else torch_or_flax(header.specs)
            names = {_path_of(name, layout): name for name in header.specs}
        specs: dict[KeyPath, Spec] = {key: header.specs[name] for key, name in names.items()}
        if manifest is not None:
            specs = in_manifests_order(path, specs, manifest)
        aliases = dict(manifest.aliases) if manifest else _aliases(header)
        self._copies: dict[KeyPath, list[KeyPath]] = {}
        for key in [key for key in aliases if key in specs]:
            self._copies.setdefault(aliases[key], []).append(key)
        super().__init__(
            {key: header.locations[name] for key, name in names.items()},
            path,
            layout,
            {key: spec for key, spec in specs.items() if key not in aliases},
            manifest,
            aliases,
            budget=budget,
            snapshot=snapshot,
        )

    def require_checksum(self, path: KeyPath, digest: str) -> None:
        """Check the copies under further names too: the library reads those."""
        super().require_checksum(path, digest)
        for copy in self._copies.get(path, ()):
            super().require_checksum(copy, self._checksum(copy, self.specs[path]))

    def _checksum(self, path: KeyPath, spec: Spec) -> str:
        """Return the checksum of what lies in the file."""
        assert self.algorithm is not None
        digest = start(spec, self.algorithm)
        for offset in range(0, spec.nbytes, PART_BYTES):
            part = np.empty(min(PART_BYTES, spec.nbytes - offset), np.uint8)
            self.fill(path, part.data, offset)
            digest.update(part)
        return str(digest.hexdigest())


def write(path: Path, tensors: Tensors, rules: Rules = NO_RULES) -> None:
    """Write the tensors one by one. Torch names are written as they are, Flax paths with slashes.

    The format has no names for one tensor twice, so tied torch tensors are written under each of
    their names: `load_file` then returns a whole state dict.

    Raises:
        CheckpointError: the format lacks a dtype, or a name cannot be written.
    """
    tensors = with_copies(tensors)
    names = {key: _name_of(path, key, tensors.layout) for key in tensors.specs}
    for key, spec in tensors.specs.items():
        if spec.dtype not in _DTYPES:
            raise CheckpointError(
                path,
                f"{shown(names[key])} is {spec.dtype}, which safetensors lacks",
                key=names[key],
                expected=f"one of {', '.join(_DTYPES)}",
                found=spec.dtype,
                mend="save it as .pth, .msgpack or .orbax",
            )
    # The library's own order: wide dtypes first, so that each tensor is aligned.
    order = sorted(tensors.specs, key=lambda key: (-tensors.specs[key].numpy.itemsize, names[key]))
    manifest = manifest_of(tensors)
    begins, end = {}, 0
    for key in order:
        begins[key] = end
        end += tensors.specs[key].nbytes

    def header(manifest: Manifest) -> bytes:
        metadata = {KEY: manifest.dumps()}
        if tensors.layout == "torch":
            metadata["format"] = "pt"
        entries = {
            names[key]: {
                "dtype": _DTYPES[tensors.specs[key].dtype],
                "shape": list(tensors.specs[key].shape),
                "data_offsets": [begins[key], begins[key] + tensors.specs[key].nbytes],
            }
            for key in order
        }
        text = json.dumps(
            {"__metadata__": metadata, **entries}, separators=(",", ":"), ensure_ascii=False
        ).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with atomic_file(path, rules) as stream:
        descriptor, data_begin = stream.fileno(), len(header(manifest))

        def write_tensor(key: KeyPath) -> str:
            digest, offset = start(tensors.specs[key]), data_begin + begins[key]
            alone = tensors.specs[key].nbytes > BATCH_BYTES
            for block in (
                block for piece in tensors.pieces(key) for block in blocks(piece, alone=alone)
            ):
                digest.update(block)
                _pwrite(descriptor, block.data, offset)
                offset += block.nbytes
            return digest.hexdigest()

        sums = dict(in_batches(order, lambda key: tensors.specs[key].nbytes, write_tensor))
        _pwrite(descriptor, memoryview(header(manifest.with_checksums(sums))), 0)


def read_header(file: InputFile, budget: Budget) -> Header:
    """Read and check the header of an open file.

    Raises:
        CheckpointError: the header breaks a rule of the format, or a name occurs twice.
        FileError: the header does not fit the budget.
    """
    path, size = file.path, file.size
    if size < 10:
        raise _broken(path, "its length", "at least 10 bytes", f"{size}")
    length = int.from_bytes(file.read(8, 0), "little")
    if not 2 <= length <= min(size - 8, _MAX_HEADER):
        raise _broken(
            path, "its header's length", f"2 to {min(size - 8, _MAX_HEADER):,} bytes", f"{length:,}"
        )
    budget.require(length, path, "its header")
    raw = file.read(length, 8)
    if len(raw) != length or not raw.startswith(b"{"):
        raise _broken(path, "the start of its header", "a JSON object", repr(raw[:8]))
    _require_plain(path, raw)
    try:
        content = parse_json(raw, path, budget, "its header")
        metadata = content.pop("__metadata__", {})
        entries = {name: _entry(name, entry) for name, entry in content.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("a metadata value that is not a string")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(
            path,
            "its header",
            "names, shapes and offsets",
            shown(str(error) or type(error).__name__),
        ) from error
    _require_whole(path, entries, size - 8 - length)
    return Header(
        {name: spec for name, (spec, _, _) in entries.items()},
        {name: Location(file, 8 + length + begin) for name, (_, begin, _) in entries.items()},
        metadata,
    )


def _require_plain(path: Path, raw: bytes) -> None:
    """Raise CheckpointError if the header has more objects than its tensors need.

    They are counted before the header is parsed, because an empty list takes 25 times its text.
    """
    count = raw.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise _broken(path, "the number of its tensors", f"at most {MAX_TENSORS:,}", f"{count:,}")
    structure = _STRINGS.sub(b"", raw)
    for bracket, most in (
        (b"{", count + 2),
        (b"[", 2 * count + 1),
        (b",", 40 * count + _MAX_METADATA),
    ):
        if (actual := structure.count(bracket)) > most:
            raise _broken(
                path,
                "its header",
                f"at most {most:,} {bracket.decode()!r} for {count:,} tensors",
                f"{actual:,}",
            )


def _manifest(path: Path, metadata: Mapping[str, str], budget: Budget) -> Manifest | None:
    try:
        return Manifest.loads(metadata[KEY], path, budget) if KEY in metadata else None
    except ValueError as error:
        raise CheckpointError(
            path,
            shown(error),
            expected="a valid manifest",
            found=shown(error),
            mend="the file was changed: take another copy",
        ) from error


def _path_of(name: str, layout: FileLayout) -> tuple[str, ...]:
    """Return the path of a name in the file."""
    return (name,) if layout == "torch" else tuple(name.split("/"))


def _name_of(path: Path, key: KeyPath, layout: FileLayout) -> str:
    if layout != "torch" and (
        unwritable := [step for step in key if "/" in str(step) or not str(step)]
    ):
        raise CheckpointError(
            path,
            f"the name {unwritable[0]!r} in {key} is empty or looks like a path",
            key=slashed(key),
            expected="a name without a slash",
            found=shown(repr(unwritable[0])),
            mend="save it as .msgpack or .orbax, or rename it",
        )
    name = key[0] if layout == "torch" else slashed(key)
    if name == "__metadata__":
        raise CheckpointError(
            path,
            "the name __metadata__ is reserved by the format",
            key=name,
            expected="another name",
            found="__metadata__",
            mend="rename it",
        )
    return str(name)


def _aliases(header: Header) -> dict[KeyPath, KeyPath]:
    """Return the tied names that the library's `save_model` writes into the metadata."""
    specs, metadata = header.specs, header.metadata
    others = {*specs, "format"}
    return {
        (name,): (first,)
        for name, first in metadata.items()
        if name not in others and first in specs
    }


def _entry(name: str, entry: Mapping[str, Any]) -> tuple[Spec, int, int]:
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} has the fields {', '.join(map(shown, entry))}")
    if entry["dtype"] not in _NUMPY_NAMES:
        raise ValueError(f"{shown(name)} has the dtype {shown(entry['dtype'])}")
    try:
        spec = checked(entry["shape"], _NUMPY_NAMES[entry["dtype"]])
    except ValueError as error:
        raise ValueError(f"{shown(name)}: {error}") from error
    begin, end = entry["data_offsets"]
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise ValueError(f"{shown(name)} has the offsets {begin} and {end}")
    if end - begin != spec.nbytes:
        raise ValueError(
            f"{shown(name)} takes {spec.nbytes} bytes and has the offsets {begin} and {end}"
        )
    return spec, begin, end


def _require_whole(path: Path, entries: Mapping[str, tuple[Spec, int, int]], size: int) -> None:
    """Raise CheckpointError unless every byte of the data belongs to exactly one tensor."""
    ranges: Iterator[tuple[int, int]] = iter(
        sorted((begin, end) for _, begin, end in entries.values() if begin < end)
    )
    edges = [(0, 0), *ranges, (size, size)]
    for (_, end), (begin, _) in pairwise(edges):
        if end != begin:
            problem = "overlap" if begin < end else "leave a hole"
            problem = problem if begin != size or end > size else "end before the file does"
            raise _broken(
                path,
                "its data",
                "tensors end to end",
                f"they {problem} between bytes {end:,} and {begin:,}",
            )
    if any(end > size for _, _, end in entries.values()):
        raise _broken(path, "its length", "data for every tensor", f"{size:,} bytes")


def _pwrite(descriptor: int, block: memoryview, offset: int) -> None:
    while block.nbytes:
        done = os.pwrite(descriptor, block, offset)
        block, offset = block[done:], offset + done


def _broken(path: Path, subject: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        path,
        f"not a whole safetensors file: {subject}",
        expected=expected,
        found=found,
        mend="take another copy",
    )
